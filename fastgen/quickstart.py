"""`fastgen quickstart`: the whole promise on the shipped digits, and the verdict in a few lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.errors import RunFailed

logger = logging.getLogger("fastgen")

QUICK = (
    "stages.teacher.loop.steps=400",
    "stages.pairs.pairs.num=2000",
    "stages.reflow.loop.steps=400",
    "stages.distil.loop.steps=150",
    "stages.evaluate.n=1000",
)


def run(execute: Callable[[list[str]], Path], out: Path, *, quick: bool) -> None:
    """Run the shipped config into `out` and print what it showed; a full run that fails the gate is a RunFailed."""
    command = "fastgen quickstart --quick" if quick else "fastgen quickstart"
    folder = execute([f"out={json.dumps(str(out))}", f"stages.report.command={command}", *(QUICK if quick else ())])
    report = files.read_json(folder / "report" / "report.json")
    for line in summary(report):
        logger.info(line)
    logger.info("look at %s", folder / "report" / "report.html")
    if not report["gate_passed"] and not quick:
        raise RunFailed(f"the student did not pass the gate; see {folder / 'report' / 'report.html'}")


def summary(report: dict[str, Any]) -> list[str]:
    """The verdict in words and numbers."""
    teacher, student = report["teacher"]["fd"], report["student"]["fd"]
    one = min(student, key=int)
    many = max(teacher, key=int)
    fast, slow = report["latency_ms"]["student"][one]["1"], report["latency_ms"]["teacher"][many]["1"]
    lines = [
        f"FD-{report['extractor']['name']} (n = {report['n']}, real against real {report['real_floor']:.3g}):",
        f"  teacher  {many} steps {teacher[many]:.3g}, 1 step {teacher['1']:.3g}",
        f"  student  {one} step {student[one]:.3g}: {100 * report['gap_closed'][one]:.1f} % of the gap closed",
        f"latency at batch 1: teacher {slow:.2f} ms, student {fast:.2f} ms ({slow / fast:.0f} x)",
    ]
    for name, check in report["gate"].items():
        verdict = "ok" if check["passed"] else "FAILED"
        lines.append(f"  {name:<22} {check['value']:8.3f}  bound {check['bound']:6.2f}  {verdict}")
    return [*lines, f"gate: {'passed' if report['gate_passed'] else 'FAILED'}"]
