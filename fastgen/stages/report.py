"""The stage that turns an evaluation and the run's logs into `report.json` and `report.html`."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, Literal

from fastgen import files
from fastgen.config import config_hash
from fastgen.stages.config import Stage
from fastgen.stages.context import Context


class Report(Stage):
    """Gathers the stage `evaluation` and the log of every stage before it."""

    stage: Literal["report"]
    evaluation: str = "evaluate"
    command: str = "fastgen distill"

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        from fastgen.eval.report import write_report

        evaluated = run.folder(self.evaluation)
        report = files.read_json(evaluated / "evaluate.json")
        report["seconds"] = {**run.seconds, "total": sum(run.seconds.values())}
        report["hardware"], report["versions"] = hardware(), versions()
        report["config_hash"], report["command"] = config_hash(run.config), self.command
        grids = {path.stem: path.read_bytes() for path in sorted(evaluated.glob("*@*.png"))}
        curves = {log.parent.name: _curve(log) for log in sorted(run.out.glob("*/log.jsonl"), key=os.path.getmtime)}
        write_report(folder, report, grids, curves)
        return {"output": "report.json"}


def _curve(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hardware() -> dict[str, Any]:
    """The machine, as far as numbers depend on it."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    """The software that made the numbers."""
    import torch

    import fastgen

    return {"python": platform.python_version(), "torch": str(torch.__version__), "fastgen": fastgen.__version__}
