"""The mixture of the MeanFlow page: how far one step ends from where the teacher's ODE leads.

    python benchmarks/meanflow_mixture.py [OUT] [--seeds 0 1 2] [--kinds jvp finite data sign]

Runs `meanflow/mixture` and `meanflow/mixture-data` (what is finished in OUT is not run again) and prints a table: RMSE
of 4,096 one-step samples of the averaged student to the exact end points of the same noises, over the RMSE of the
teacher's own single step. `sign` is a planted error: (t - r) D added to the target instead of subtracted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastgen.files import is_complete, read_json
from fastgen.listing import find_config
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.trainers import meanflow

FINITE = "stages.meanflow.method.jvp={route: finite, step: 0.005}"
KINDS: dict[str, tuple[str, list[str]]] = {
    "jvp": ("meanflow/mixture", []),
    "finite": ("meanflow/mixture", [FINITE]),
    "data": ("meanflow/mixture-data", []),
    "sign": ("meanflow/mixture", []),
}


@contextmanager
def planted(kind: str) -> Iterator[None]:
    """The error that a kind stands for, while it is trained."""
    target = meanflow.target
    if kind == "sign":
        meanflow.target = lambda v, slope, gap, share: target(v, slope, gap, -share)
    try:
        yield
    finally:
        meanflow.target = target


def trained(out: Path, kind: str, seed: int, more: Sequence[str] = ()) -> float:
    """The ratio of one run's student."""
    folder, report = out / f"{kind}-{seed}", out / f"{kind}-{seed}" / "evaluate" / "evaluate.json"
    name, settings = KINDS[kind]
    if not is_complete(folder / "meanflow" / "model") or not report.exists():
        config = find_config(name)
        run, stages = load_run(config, [f"out={folder}", f"seed={seed}", *settings, *more])
        with planted(kind):
            execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    return read_json(report)["rmse_ratio"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/meanflow-mixture-table"))
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
