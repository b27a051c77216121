"""Small SVG charts for the report: plain strings, coloured by the page's own classes, legible at phone width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 64, 14, 34
Points = Sequence[tuple[float, float]]


def short(value: float | None) -> str:
    """Three significant figures without exponents for everyday sizes; "n/a" for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def lines(
    series: Mapping[str, Points], *, label: str, x_label: str, floor: float | None = None, ticks: Sequence[float] = ()
) -> str:
    """Lines named "teacher" or "student" (which colours them), both axes logarithmic, labelled at their last point.

    floor is a dashed level; ticks are the marked places of the x axis. Points that are not positive are left out.
    """
    kept = {name: [p for p in points if min(p) > 0 and all(map(math.isfinite, p))] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points] + list(ticks)
    ys = [y for points in kept.values() for _, y in points] + ([floor] if floor else [])
    x_at, y_at = _log(xs, LEFT, WIDTH - RIGHT), _log(ys, HEIGHT - BOTTOM, TOP)
    parts = [*_y_axis(ys, y_at), *_x_axis(ticks, x_at, x_label)]
    if floor:
        y = y_at(floor)
        parts.append(f'<line class="floor" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 5}" y="{y + 4:.1f}">real {short(floor)}</text>')
    for name, points in kept.items():
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        parts += [f'<circle class="{name}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text class="{name}" x="{x_at(x) + 7:.1f}" y="{y_at(y) - 6:.1f}">{escape(name)}</text>')
    return _svg(parts, label)


def curve(points: Points, *, label: str) -> str:
    """One quantity over training steps: values logarithmic where they span a factor 5."""
    points = [p for p in points if p[1] is not None and math.isfinite(p[1])]
    if len(points) < 2:
        return ""
    ys = [y for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 5
    y_at = (_log if logarithmic else _linear)(ys, HEIGHT - BOTTOM, TOP)
    x_at = _linear([points[0][0], points[-1][0]], LEFT, WIDTH - RIGHT)
    path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
    parts = [*_y_axis(ys, y_at), *_x_axis([points[0][0], points[-1][0]], x_at, "training step")]
    parts.append(f'<polyline class="student" points="{path}"/>')
    parts.append(f'<text class="student" x="{WIDTH - RIGHT + 5}" y="{y_at(ys[-1]) + 4:.1f}">{short(ys[-1])}</text>')
    return _svg(parts, label)


def bars(rows: Sequence[tuple[str, str, float]], *, label: str, unit: str) -> str:
    """Horizontal bars (text, "teacher" or "student", value), linear from zero, the value written at each."""
    rows = [row for row in rows if math.isfinite(row[2])]
    if not rows:
        return ""
    longest, left, right = max(value for *_, value in rows) or 1.0, 122, 78
    parts = []
    for i, (text, name, value) in enumerate(rows):
        y, length = 8 + i * 30, max((WIDTH - left - right) * value / longest, 1.5)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(text)}</text>')
        parts.append(f'<rect class="{name}" x="{left}" y="{y}" width="{length:.1f}" height="19" rx="3"/>')
        parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 14}">{short(value)} {unit}</text>')
    return _svg(parts, label, height=16 + 30 * len(rows))


def _svg(parts: Sequence[str], label: str, height: int = HEIGHT) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _linear(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return lambda v: first + (last - first) * (v - low) / span


def _log(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    inner = _linear([math.log(v) for v in values], first, last)
    return lambda v: inner(math.log(v))


def _y_axis(values: Sequence[float], at: Callable[[float], float]) -> list[str]:
    """The lowest and the highest value, each at a line of its own."""
    parts = []
    for value in {min(values), max(values)}:
        y = at(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    return parts


def _x_axis(ticks: Sequence[float], at: Callable[[float], float], label: str) -> list[str]:
    base = HEIGHT - BOTTOM
    marks = [f'<text x="{at(t):.1f}" y="{base + 17}" text-anchor="middle">{t:g}</text>' for t in ticks]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*marks, f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(label)}</text>']
