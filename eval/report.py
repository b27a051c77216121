"""`report.html`: one self-contained page that shows what distillation kept and what it gained."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastgen import files
from fastgen.eval import charts
from fastgen.eval.charts import short

Report = Mapping[str, Any]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]

# What each check of the gate asks, in words; "_null" marks the run without labels.
QUESTIONS = {
    "gap_closed": "How much of what the teacher loses at one step does the student take back?",
    "recall_ratio": "Does it cover as much of the data as the teacher does?",
    "nearest_ratio": "Are its images new, or copies of training images?",
    "rmse_ratio": "Does it make the teacher's own image from the same noise?",
    "label_agreement": "Does it obey labels as well as the teacher?",
    "class_shares": "Without labels, does every class come as often as from the teacher?",
}
MONITORS = {
    "teacher_gap": "distance to the teacher's end points",
    "straightness": "straightness of the paths (0 is straight)",
    "sample_std": "sample spread over the data's",
}


def write_report(folder: Path, report: Report, grids: Mapping[str, bytes], curves: Curves) -> None:
    """Write `report.json` and `report.html` into a folder; see `render`."""
    files.write_json(folder / "report.json", report)
    files.write_atomic(folder / "report.html", render(report, grids=grids, curves=curves))


def render(report: Report, *, grids: Mapping[str, bytes], curves: Curves) -> str:
    """The page as text.

    report  the content of `report.json`; a part that is missing leaves its section out
    grids   PNG bytes by name ("teacher@25", "teacher@1", "student@1"), all from the same noise
    curves  the log lines of each training stage
    """
    sections = [
        _headline(report),
        _section("From the same noise", _grids(grids)),
        _section("Distance to real data", _distance(report)),
        _section("The gate", _gate(report)),
        _section("Latency", _latency(report)),
        _section("Training", _curves(curves)),
        _section("Facts", _facts(report)),
    ]
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    title = f"fastgen: {report.get('data', 'a distilled student')}"
    return template.substitute(title=escape(title), body="\n".join(filter(None, sections)))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _few(report: Report) -> str:
    """The student's smallest number of steps, as a key."""
    return min(report.get("student", {}).get("fd", {"1": None}), key=int)


def _many(report: Report) -> str:
    return max(report.get("teacher", {}).get("fd", {"25": None}), key=int)


def _headline(report: Report) -> str:
    few, many, passed = _few(report), _many(report), report.get("gate_passed")
    steps = f"{few} step" if few == "1" else f"{few} steps"
    words = {True: ('<span class="good">passed</span>'), False: '<span class="bad">not passed</span>'}
    verdict = words.get(passed, "not measured") if isinstance(passed, bool) else "not measured"
    latency = report.get("latency_ms", {})
    slow, fast = (latency.get(m, {}).get(n, {}).get("1") for m, n in (("teacher", many), ("student", few)))
    numbers = [
        (_value(report, "gap_closed", few, percent=True), f"of the gap closed, {many} steps to {few}"),
        (f"{slow / fast:.0f} ×" if slow and fast else "n/a", "faster, one image at a time"),
        (short(_get(report, "student", "fd", few)), f"FD of the student at {steps}"),
        (short(_get(report, "teacher", "fd", many)), f"FD of the teacher at {many} steps"),
    ]
    tiles = "".join(f'<div class="number"><b>{escape(n)}</b><span>{escape(text)}</span></div>' for n, text in numbers)
    data, n = escape(str(report.get("data", "the data"))), report.get("n", "n/a")
    return (
        f"<header><h1>A {many}-step teacher in {steps}</h1>"
        f'<p>On <b>{data}</b>, judged on {escape(str(n))} samples. Gate: <span class="verdict">{verdict}</span>.</p>'
        f'<div class="numbers">{tiles}</div></header>'
    )


def _get(report: Report, *keys: str) -> Any:
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _value(report: Report, *keys: str, percent: bool = False) -> str:
    value = _get(report, *keys)
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{100 * value:.1f} %" if percent else short(value)


def _grids(grids: Mapping[str, bytes]) -> str:
    figures = []
    for name, png in grids.items():
        model, _, steps = name.partition("@")
        what = f"{model} at {steps} step{'s' if steps != '1' else ''}"
        source = base64.b64encode(png).decode()
        figures.append(
            f'<figure><img alt="Samples of the {escape(what)}" src="data:image/png;base64,{source}">'
            f"<figcaption><b>{escape(what.capitalize())}</b></figcaption></figure>"
        )
    note = "<p>Each place holds the same noise and the same label in every grid.</p>"
    return f'{note}<div class="row">{"".join(figures)}</div>' if figures else ""


def _distance(report: Report) -> str:
    series = {name: _by_step(_get(report, name, "fd")) for name in ("teacher", "student")}
    floor = report.get("real_floor")
    ticks = sorted({x for points in series.values() for x, _ in points})
    label = "Frechet distance to training data against number of steps, teacher and student"
    chart = charts.lines(series, label=label, x_label="steps", floor=floor, ticks=ticks)
    if not chart:
        return ""
    head = "".join(f'<th class="n">{x:g}</th>' for x in ticks)
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td class=n>{_cell(dict(points), x)}</td>' for x in ticks)}</tr>"
        for name, points in series.items()
    )
    extractor = escape(str(_get(report, "extractor", "name") or "unknown"))
    caption = (
        f"FD-{extractor} to {escape(str(report.get('n_ref', '?')))} training images, lower is better, both axes "
        "logarithmic. Dashed: held-out real images. Few-step teacher rows take the better of two solvers."
    )
    table = f'<div class="scroll"><table><tr><th>steps</th>{head}</tr>{rows}</table></div>'
    return f'<div class="row"><figure>{chart}<figcaption>{caption}</figcaption></figure><div>{table}</div></div>'


def _by_step(values: Any) -> list[tuple[float, float]]:
    items = values.items() if isinstance(values, Mapping) else ()
    return sorted((float(steps), float(v)) for steps, v in items if v is not None)


def _cell(points: Mapping[float, float], x: float) -> str:
    return short(points[x]) if x in points else ""


def _gate(report: Report) -> str:
    rows = []
    for name, check in report.get("gate", {}).items():
        plain, free = name.removesuffix("_null"), name.endswith("_null")
        question = QUESTIONS.get(plain, plain)
        mark = '<span class="good">✓ passed</span>' if check.get("passed") else '<span class="bad">✗ failed</span>'
        where = " (no label given)" if free else ""
        rows.append(
            f"<tr><td>{escape(plain.replace('_', ' '))}{where}<small>{escape(question)}</small></td>"
            f'<td class="n">{short(check.get("value"))}</td><td class="n">{short(check.get("bound"))}</td>'
            f"<td>{mark}</td></tr>"
        )
    head = '<tr><th>check</th><th class="n">value</th><th class="n">bound</th><th></th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def _latency(report: Report) -> str:
    table = report.get("latency_ms", {})
    batches = sorted({b for model in table.values() for row in model.values() for b in row}, key=int)
    figures = []
    for batch in batches:
        rows = [
            (f"{name}, {steps} step{'s' if steps != '1' else ''}", name, float(row[batch]))
            for name, model in table.items()
            for steps, row in model.items()
            if row.get(batch) is not None
        ]
        chart = charts.bars(rows, label=f"Latency at batch {batch}", unit="ms")
        caption = f"Median time of a whole call that makes <b>{escape(batch)}</b> image{'s' if batch != '1' else ''}."
        figures.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


def _curves(curves: Curves) -> str:
    figures = []
    for stage, records in curves.items():
        keys = [key for record in records for key in record if key.startswith("loss/")][:1]
        for key in [*keys, *MONITORS]:
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            what = "loss" if key in keys else MONITORS[key]
            chart = charts.curve(points, label=f"{what} during stage {stage}")
            if chart and len(points) > 2:
                caption = f"<b>{escape(stage)}</b>: {what}"
                figures.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


def _facts(report: Report) -> str:
    rows: list[tuple[str, Any]] = [("command", report.get("command")), ("config hash", report.get("config_hash"))]
    rows += [("extractor", " ".join(str(v) for v in report.get("extractor", {}).values()))]
    rows += [("samples, seed", f"{report.get('n', 'n/a')}, {report.get('seed', 'n/a')}")]
    rows += [(key, value) for key, value in report.get("hardware", {}).items() if value is not None]
    rows += list(report.get("versions", {}).items())
    rows += [(f"seconds, {stage}", short(value)) for stage, value in report.get("seconds", {}).items()]
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in rows if v not in (None, ""))
    return f"<dl>{items}</dl>"
