"""The rows of a benchmark: what one holds, how two are compared, many runs of one brought together, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SAME = ("device", "scope", "res", "batch", "dtype", "attention", "compile", "variant")
SPREAD = 0.03  # of the medians of repeated processes, over which none of them is to be believed


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none (`unavailable`; then every figure is None).

    role         "model", or "vs": what it is compared with
    p50_ms ...   by the device's clock; wall_p50_ms by the caller's
    images_per_s batch / p50
    gflop        of one call, batch and guidance included; mfu its share of `ceiling_tflops`, measured on this device
    bytes_ms     the time to read the weights once a network call at the measured bandwidth: a floor
    repeats      processes whose medians these are; spread: (largest - smallest) / median of them
    began        of the command, UTC: rows of one command share it
    """

    model: str
    role: str
    scope: str
    variant: str
    batch: int
    steps: int
    nfe: int
    res: str
    device: str
    dtype: str
    attention: str
    compile: str
    guidance: float | None = None
    solver: str | None = None
    random_weights: bool = False
    sw: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    notes: tuple[str, ...] = ()
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    min_ms: float | None = None
    mean_ms: float | None = None
    std_ms: float | None = None
    iqr_ms: float | None = None
    wall_p50_ms: float | None = None
    launch_bound: bool | None = None
    images_per_s: float | None = None
    speed_up: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    warmup: int = 0
    open_s: float | None = None
    first_call_ms: float | None = None
    peak_alloc_mib: float | None = None
    peak_reserved_mib: float | None = None
    energy_j_per_img: float | None = None
    gflop: float | None = None
    mfu: float | None = None
    ceiling_tflops: float | None = None
    bytes_ms: float | None = None
    repeats: int = 1
    spread: float | None = None
    seed: int = 0
    began: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        return Row(**{**data, "notes": tuple(data["notes"])})


class NotComparable(Exception):
    """Two rows whose ratio would say nothing; one line that says why."""


def speed_up(row: Row, other: Row) -> float:
    """How many times faster `row` is than `other`: the ratio of their medians, under equal conditions only."""
    for key in SAME:
        if getattr(row, key) != getattr(other, key):
            raise NotComparable(f"{key} {getattr(row, key)} against {getattr(other, key)}")
    for one in (row, other):
        if one.p50_ms is None:
            raise NotComparable(f"{one.model} was not measured: {one.unavailable}")
    assert row.p50_ms and other.p50_ms
    return other.p50_ms / row.p50_ms


def compared(row: Row, others: Iterable[Row]) -> Row:
    """A row with its speed-up over its counterpart, or with a note why there is none."""
    others = list(others)
    same = [other for other in others if (other.scope, other.batch) == (row.scope, row.batch)]
    own = [other for other in same if other.steps == row.steps]
    counterpart = next(iter(same if len(same) == 1 else own), None)
    if counterpart is None:
        return row
    try:
        return replace(row, speed_up=speed_up(row, counterpart))
    except NotComparable as reason:
        return replace(row, notes=(*row.notes, f"not compared: {reason}"))


def together(rows: Sequence[Row]) -> Row:
    """The same measurement from several processes: each figure the median of theirs, and how far medians spread."""
    gone = next((row for row in rows if row.unavailable), None)
    if gone is not None:
        return replace(gone, repeats=len(rows))
    medians = [row.p50_ms for row in rows if row.p50_ms is not None]
    spread = (max(medians) - min(medians)) / statistics.median(medians)
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    if spread > SPREAD:
        notes[f"medians of {len(rows)} processes spread by {spread:.1%}: not steady enough to be quoted"] = None
    figures: dict[str, Any] = {
        name: _median([getattr(row, name) for row in rows]) for name, value in vars(rows[0]).items() if _figure(value)
    }
    whole = {name: getattr(rows[0], name) for name in ("batch", "steps", "nfe", "calls", "warmup", "seed", "guidance")}
    return replace(rows[0], **{**figures, **whole, "repeats": len(rows), "spread": spread, "notes": tuple(notes)})


def _figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _median(values: list[Any]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


HEAD = (
    "model",
    "variant",
    "scope",
    "batch",
    "steps",
    "p50 ms",
    "p90",
    "p99",
    "wall",
    "img/s",
    "GiB",
    "MFU",
    "speed-up",
)


def cells(row: Row) -> tuple[str, ...]:
    """The row as the table's texts."""
    tail = (f"not measured: {row.unavailable}",) if row.unavailable else _figures(row)
    return (row.model, row.variant, row.scope, str(row.batch), _steps(row), *tail)


def _steps(row: Row) -> str:
    guided = "" if row.guidance in (None, 1) else f", w={row.guidance:g}"
    return f"{row.steps}{guided}"


def _figures(row: Row) -> tuple[str, ...]:
    gib = None if row.peak_alloc_mib is None else row.peak_alloc_mib / 1024
    times = (row.p50_ms, row.p90_ms, row.p99_ms, row.wall_p50_ms)
    return (
        *(_short(ms) for ms in times),
        _short(row.images_per_s),
        _short(gib),
        "" if row.mfu is None else f"{row.mfu:.0%}",
        "" if row.speed_up is None else f"{row.speed_up:.1f} x",
    )


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(rows: Sequence[Row]) -> str:
    """All rows with aligned columns, notes below."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if len(line) > i and len(line) == len(HEAD)) for i in range(len(HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join([*text, *_notes(rows)])


def markdown(rows: Sequence[Row]) -> str:
    """The same as a Markdown table."""
    lines = [HEAD, *(cells(row) for row in rows)]
    body = [[*line, *[""] * (len(HEAD) - len(line))] for line in lines]
    body.insert(1, ["---"] * len(HEAD))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body) + "\n"


def _notes(rows: Sequence[Row]) -> list[str]:
    told = [f"{row.model} {row.variant} {row.scope} batch {row.batch}: {note}" for row in rows for note in row.notes]
    return list(dict.fromkeys(told))
