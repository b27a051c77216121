"""The gate's rows of finished runs, side by side: one Markdown table from the `evaluate.json` of each run's folder.

    python benchmarks/rows.py RUN [RUN ...]

Cells of a check are "with labels / without"; a value that misses its bound is followed by `!`. Rows may stand in one
table only if teacher and classifier agree, which is checked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CHECKS = {
    "gap_closed": ("gap closed", ">= 0.95"),
    "recall_ratio": ("recall", ">= 0.9"),
    "nearest_ratio": ("nearest", ">= 0.5"),
    "rmse_ratio": ("rmse", "<= 0.35"),
    "label_agreement": ("agreement", ">= -0.02"),
    "class_shares": ("shares", "<= 0.03"),
}
STEPS = ("1", "2", "4", "25")


def distance(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def check(gate: dict[str, Any], name: str) -> str:
    ran = [gate[key] for key in (name, f"{name}_null") if key in gate]
    return " / ".join(f"{one['value']:.3f}{'' if one['passed'] else ' !'}" for one in ran)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(runs: list[Path]) -> list[str]:
    found = [json.loads((run / "evaluate" / "evaluate.json").read_text()) for run in runs]
    if len({(one["extractor"]["sha256"], json.dumps(one["teacher"])) for one in found}) > 1:
        raise SystemExit("these runs were measured against different teachers or by different classifiers")
    width = len(STEPS) + len(CHECKS) + 2
    rows = [
        line(["run", *(f"FD@{n}" for n in STEPS), *(title for title, _ in CHECKS.values()), "gate"]),
        "|---" * width + "|",
        line(["bound", *[""] * len(STEPS), *(bound for _, bound in CHECKS.values()), ""]),
        line(["teacher", *(distance(found[0]["teacher"]["fd"].get(n)) for n in STEPS), *[""] * (len(CHECKS) + 1)]),
    ]
    for run, one in zip(runs, found, strict=True):
        cells = [distance(one["student"]["fd"].get(n)) for n in STEPS]
        checks = [check(one["gate"], name) for name in CHECKS]
        rows.append(line([run.name, *cells, *checks, "passed" if one["gate_passed"] else "missed"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    print("\n".join(table(parser.parse_args().runs)))


if __name__ == "__main__":
    main()
