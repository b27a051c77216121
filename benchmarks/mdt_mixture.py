"""The mixture of the MDT page: how far one step ends from where the teacher's ODE leads.

    python benchmarks/mdt_mixture.py [OUT] [--seeds 0 1 2] [--kinds vm+vd vm paper continuous cm slope velocity]

Runs `mdt/mixture` (what is finished in OUT is not run again) and prints a table: RMSE of 4,096 one-step samples of the
averaged student to the exact end points of the same noises, over the RMSE of the teacher's own single step. `paper` is
algorithm 1 of 2509.04406. `slope` and `velocity` are planted errors: t g added to the target instead of subtracted, and
the teacher's velocity turned round where the difference is taken.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.files import is_complete, read_json
from fastgen.listing import find_config
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.trainers.mdt import MDT, Point

METHOD = "stages.mdt.method"
KINDS: dict[str, list[str]] = {
    "vm+vd": [],
    "vm": [f"{METHOD}.lambda_vd=0"],
    "paper": [f"{METHOD}.share_noise=false", f"{METHOD}.vd_one_minus_t=true"],
    "continuous": [f"{METHOD}.distill_type=continuous"],
    "cm": [f"{METHOD}.distill_type=cm", f"{METHOD}.lambda_vd=0"],
    "slope": [],
    "velocity": [],
}


@contextmanager
def planted(kind: str) -> Iterator[None]:
    """The error that a kind stands for, while it is trained."""
    discrete, earlier = MDT.discrete, MDT.earlier

    def added(self: MDT, at: Point) -> tuple[Any, Any]:
        phi, slope = discrete(self, at)
        return phi, -slope

    if kind == "slope":
        MDT.discrete = added  # type: ignore[method-assign]
    elif kind == "velocity":
        MDT.earlier = lambda self, at: earlier(self, at._replace(v=-at.v))  # type: ignore[method-assign]
    try:
        yield
    finally:
        MDT.discrete, MDT.earlier = discrete, earlier  # type: ignore[method-assign]


def trained(out: Path, kind: str, seed: int, more: Sequence[str] = ()) -> float:
    """The ratio of one run's student."""
    folder, report = out / f"{kind}-{seed}", out / f"{kind}-{seed}" / "evaluate" / "evaluate.json"
    if not is_complete(folder / "mdt" / "model") or not report.exists():
        run, stages = load_run(find_config("mdt/mixture"), [f"out={folder}", f"seed={seed}", *KINDS[kind], *more])
        with planted(kind):
            execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    return read_json(report)["rmse_ratio"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/mdt-mixture-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    print("| kind | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | median |")
    print("|---|" + "---|" * (len(options.seeds) + 1))
    for kind in options.kinds:
        found = [trained(options.out, kind, seed) for seed in options.seeds]
        cells = [f"{value:.3f}" for value in (*found, statistics.median(found))]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
