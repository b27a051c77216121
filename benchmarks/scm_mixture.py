"""The mixture of the sCM page: one-step RMSE to the exact end point, over that of the teacher's own single step.

    python benchmarks/scm_mixture.py [OUT] [--seeds 0 1 2] [--runs NAME ...]

Runs `scm/mixture` (what is finished in OUT is not run again) and prints a table of `eval.protocol.point_protocol`'s
rmse_ratio and the biased MMD^2 (kernels of width 0.3, 1 and 3, n = 4,000) of the averaged student. Planted errors are
put into the trainer for the whole budget, so that the bound is seen to tell them apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastgen.api import open_teacher
from fastgen.eval import metrics
from fastgen.eval.protocol import point_protocol
from fastgen.files import is_complete
from fastgen.listing import find_config
from fastgen.samplers.draw import draw
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.student import Student
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import scm

KERNELS, N = (0.3, 1.0, 3.0), 4000
METHOD, JUDGED = "stages.scm.method", "features: student, kernel: 1"
# The heads look at the student as it was before its first step: the closed-form teacher has no features.
RUNS: dict[str, list[str]] = {
    "sCM": [],
    "sCM + LADD": [f"{METHOD}.regulariser={{{JUDGED}, max_time: 0.0}}"],
    "LADD alone": [
        f"{METHOD}={{name: ladd, data_sd: 1.7, adversary: {{{JUDGED}}}}}",
        "stages.scm.loop.optim={lr: 5e-4, betas: [0.0, 0.99]}",
        "stages.scm.loop.networks={heads: {lr: 1e-3, betas: [0.0, 0.99]}}",
    ],
    "sCM, adaptive weight": [f"{METHOD}.weight={{}}"],
    "sCM, adaptive weight at ten times the rate": [
        f"{METHOD}.weight={{}}",
        "stages.scm.loop.networks={weight: {lr: 1e-2}}",
    ],
    "r = 0 throughout": [f"{METHOD}.tangent.warmup=1000000000"],
}


def backwards(direction: Callable[..., Any]) -> Callable[..., Any]:
    def planted(*args: Any) -> Any:
        x, t = direction(*args)
        return x, -t

    return planted


def x_term(factor: float) -> Callable[..., Any]:
    def planted(flow: Any, velocity: Any, derivative: Any, y: Any, t: Any, r: float) -> Any:
        return STEP_BACK(flow, velocity, derivative, factor * y, t, r)

    return planted


STEP_BACK = scm.step_back
PLANTED: dict[str, Callable[[], Any]] = {
    "planted: time runs backwards": lambda: mock.patch.object(scm.Scm, "direction", backwards(scm.Scm.direction)),
    "planted: c s y with the other sign": lambda: mock.patch.object(scm, "step_back", x_term(-1.0)),
    "planted: c s y left out": lambda: mock.patch.object(scm, "step_back", x_term(0.0)),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    if name not in PLANTED:
        yield
        return
    with PLANTED[name]():
        yield


def trained(out: Path, name: str, seed: int) -> tuple[Student, Teacher]:
    """The student of one run and the mixture it was made for."""
    folder = out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    words = [f"out={folder}", f"seed={seed}", *RUNS.get(name, [])]
    run, stages = load_run(find_config("scm/mixture"), words)
    if not is_complete(folder / "scm" / "model"):
        with planted(name):
            execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    assert isinstance(run.teacher, dict)
    return Student.load(folder / "scm" / "model"), open_teacher(run.teacher)


def measure(out: Path, name: str, seed: int) -> tuple[float, float]:
    """(rmse_ratio, MMD^2 to exact samples)."""
    student, teacher = trained(out, name, seed)
    truth, rows = teacher.denoiser, torch.arange(N)
    assert isinstance(truth, Mixture)
    made = draw(student, rows, seed=seed, steps=1)
    distance = metrics.mmd2_biased(made, truth.sample(seed, "benchmark", rows), KERNELS)
    return point_protocol(student, teacher, n=N, seed=seed)["rmse_ratio"], distance


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/scm-mixture-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *PLANTED], default=[*RUNS, *PLANTED])
    options = parser.parse_args()
    heads = [f"seed {seed}" for seed in options.seeds]
    print("| run | " + " | ".join(heads) + " | median | MMD^2, median |")
    print("|---|" + "---|" * (len(heads) + 2))
    for name in options.runs:
        ratios, distances = zip(*(measure(options.out, name, seed) for seed in options.seeds), strict=True)
        cells = [f"{value:.3f}" for value in (*ratios, statistics.median(ratios))]
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.median(distances):.4f} |", flush=True)


if __name__ == "__main__":
    main()
