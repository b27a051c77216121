"""The mixture of the consistency page: one-step error over the teacher's own, for iCT, ECT and CD, and a planted error.

    python benchmarks/consistency_mixture.py [OUT] [--seeds 0 1 2] [--runs ict ect cd cd-euler cd-reversed]

Runs `consistency/{ict,ect,cd}-mixture` (what is finished in OUT is not run again) and prints a table: the root mean
square of the distance between 4,000 one-step samples of the averaged student and the exact end points of their noises,
over that of the teacher's own single step; and the energy distance of those samples to as many exact ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.api import open_teacher
from fastgen.eval.protocol import point_protocol
from fastgen.files import is_complete
from fastgen.listing import find_config
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.student import Student
from fastgen.trainers.consistency import Consistency

N = 4000
RUNS: dict[str, list[str]] = {
    "ict": [],
    "ect": [],
    "cd": [],
    "cd-euler": ["stages.cd.method.solver=euler"],
    "cd-reversed": [],
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The error of a run: the teacher's step taken backwards, from x_hi to 2 x_hi - x_lo."""
    step = Consistency.teacher_step
    if name.endswith("-reversed"):
        wrong: Any = lambda self, x, *rest: 2 * x - step(self, x, *rest)  # noqa: E731
        Consistency.teacher_step = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        Consistency.teacher_step = step  # type: ignore[method-assign]


def measure(out: Path, name: str, seed: int) -> dict[str, Any]:
    """The figures of one run: `eval.protocol.point_protocol`."""
    kind, folder = name.split("-")[0], out / f"{name}-{seed}"
    config = find_config(f"consistency/{kind}-mixture")
    run, stages = load_run(config, [f"out={folder}", f"seed={seed}", *RUNS[name]])
    stages = [stage for stage in stages if stage.stage == "train"]
    model = folder / kind / "model"
    if not is_complete(model):
        with planted(name):
            execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    assert isinstance(run.teacher, dict)
    return point_protocol(Student.load(model), open_teacher(run.teacher), n=N, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/consistency-mixture-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    heads = [f"RMSE ratio, seed {seed}" for seed in options.seeds]
    print("| run | " + " | ".join(heads) + " | median | energy distance, median (two exact samples) |")
    print("|---|" + "---|" * (len(heads) + 2))
    for name in options.runs:
        told = [measure(options.out, name, seed) for seed in options.seeds]
        ratios = [one["rmse_ratio"] for one in told]
        energy, floor = (statistics.median(one[f"energy_{key}"] for one in told) for key in ("distance", "floor"))
        cells = [*(f"{ratio:.3f}" for ratio in ratios), f"{statistics.median(ratios):.3f}"]
        print(f"| {name} | " + " | ".join(cells) + f" | {energy:.4f} ({floor:.4f}) |", flush=True)


if __name__ == "__main__":
    main()
