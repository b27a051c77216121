"""The mixture of the SIM page: squared MMD to the truth and the shares of the modes, for each distance from one start.

    python benchmarks/sim_mixture.py [OUT] [--seeds 0 1 2] [--kinds pseudo_huber sid diff_instruct]

Runs `sim/mixture` (what is finished in OUT is not run again) and prints a table: biased MMD^2, kernels of width 0.3, 1
and 3, between 4,000 samples of the averaged student and as many exact ones, and below it that of two exact samples.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from fastgen.api import open_teacher
from fastgen.eval import metrics
from fastgen.files import is_complete
from fastgen.listing import find_config
from fastgen.samplers.draw import draw
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.student import Student
from fastgen.teachers.mixture import Mixture

KERNELS, N = (0.3, 1.0, 3.0), 4000
LOSSES = {
    "pseudo_huber": [],
    "l2": ["stages.sim.method.loss={kind: l2}"],
    "sid": ["stages.sim.method.loss={kind: sid, alpha: 1.0, weight: inv_mean_abs}"],
    "diff_instruct": ["stages.sim.method.loss={kind: diff_instruct}"],
}


def measure(student: Student, truth: Mixture, seed: int) -> tuple[float, float]:
    """(MMD^2 to exact samples, greatest difference of a mode's share)."""
    rows = torch.arange(N)
    made = draw(student, rows, seed=seed, steps=1)
    off = (truth.mode_shares(made) - truth.weights).abs().max()
    return metrics.mmd2_biased(made, truth.sample(seed, "benchmark", rows), KERNELS), float(off)


def floor(truth: Mixture, draws: int = 20) -> tuple[float, float]:
    """Mean and standard deviation of the same MMD^2 between two exact samples."""
    rows = torch.arange(N)
    pairs = [[truth.sample(i, f"floor/{side}", rows) for side in "ab"] for i in range(draws)]
    values = [metrics.mmd2_biased(a, b, KERNELS) for a, b in pairs]
    return statistics.mean(values), statistics.stdev(values)


def trained(out: Path, kind: str, seed: int) -> tuple[Student, Mixture]:
    """The student of one run and the mixture it was made for."""
    folder = out / f"{kind}-{seed}"
    run, stages = load_run(find_config("sim/mixture"), [f"out={folder}", f"seed={seed}", *LOSSES[kind]])
    if not is_complete(folder / "sim" / "model"):
        execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    assert isinstance(run.teacher, dict)
    truth = open_teacher(run.teacher).denoiser
    assert isinstance(truth, Mixture)
    return Student.load(folder / "sim" / "model"), truth


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/sim-mixture-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=LOSSES, default=["pseudo_huber", "sid", "diff_instruct"])
    options = parser.parse_args()
    heads = [f"MMD^2, seed {seed}" for seed in options.seeds]
    print("| loss | " + " | ".join(heads) + " | median | a mode's share off by, at most |")
    print("|---|" + "---|" * (len(heads) + 2))
    for kind in options.kinds:
        found = []
        for seed in options.seeds:
            student, truth = trained(options.out, kind, seed)
            found.append(measure(student, truth, seed))
        values, shares = zip(*found, strict=True)
        cells = [*(f"{value:.4f}" for value in values), f"{statistics.median(values):.4f}", f"{max(shares):.3f}"]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    mean, deviation = floor(truth)
    print(f"\nTwo exact samples: {mean:.4f}, standard deviation {deviation:.4f} over 20 draws.")


if __name__ == "__main__":
    main()
