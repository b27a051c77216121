"""How near a perfect student of the discrete loss would come to its teacher, by `distill_interval`, on the toy world.

    fastgen distill mdt/toy3d out=RUN
    python benchmarks/mdt_interval.py RUN [--n 24] [--first 2000000]

Along the teacher's Euler path the fixed point of phi = v - t (phi - phi-) / interval is known: upwards from phi = v at
t = 0, (t + interval) phi = interval v + t phi-. With `exact_difference` it is the mean of that path, whose end one step
then reaches. Printed is which share of the teacher's gap between 1 and 25 steps (RMSE of a stage's latents, same noise)
each closes in one step. What a trained student misses beyond that is its fit's. The solids are others than those that
`evaluate_solids` judges.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgen import layout
from fastgen.cond import Cond
from fastgen.data.solids import solids
from fastgen.errors import UserError
from fastgen.eval.solid_models import FAR, UNDISTILLED, Models
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.teachers.trellis.flows import SIGMA_MIN, FlowDenoiser
from fastgen.teachers.trellis.folder import TrellisFolder

STEPS = (4, 5, 10, 20, 50)  # the intervals are one over these


def fixed_point(flow: FlowDenoiser, z: Any, cond: Cond, rows: int, steps: int) -> tuple[Any, Any]:
    """(z - phi(z, 1), the Euler path's end) of the exact student at an interval of 1 / steps."""

    def velocity(x: Any, i: int) -> Any:
        pair: Any = flow(x, torch.full((rows,), 1 - i / steps), cond)
        return (1 - SIGMA_MIN) * pair.eps - pair.x0

    x, found = z, []
    for i in range(steps):
        found.append(velocity(x, i))
        x = x - found[-1] / steps
    phi = velocity(x, steps)
    for i in reversed(range(steps)):
        t = 1 - i / steps
        phi = (found[i] / steps + t * phi) / (t + 1 / steps)
    return z - phi, x


def parts(models: Models, n: int, first: int) -> Iterator[tuple[str, Any, Cond, Any, Any]]:
    """(part, noise, condition, the teacher's end at 25 steps, at 1) of both stages."""
    rows = torch.arange(first, first + n)
    cond = models.conditions([solid.text for solid in solids(rows, seed=0)])
    structures = [models.structures(row, cond, rows, 0) for row in (FAR, UNDISTILLED)]
    yield "structure", models.structure_noise(rows, 0), cond, *structures
    filled = models.filled(structures[0])
    latents = [models.latents(row, filled, cond, rows, 0) for row in (FAR, UNDISTILLED)]
    yield "latent", models.latent_noise(filled, rows, 0), cond, *latents


def rmse(x: Any, y: Any) -> float:
    return float(layout.mean((x - y).square()).mean().sqrt())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--first", type=int, default=2_000_000)
    options = parser.parse_args()
    run, stages = load_run(options.teacher / "config.yaml", [])
    made = Context(run, options.teacher, "cpu", names=tuple(stage.name for stage in stages))
    folder = TrellisFolder.read(made.artefact("teacher"))
    models = Models(folder, folder)
    print("| part | " + " | ".join(f"interval {1 / steps:g}: released, exact" for steps in STEPS) + " |")
    print("|---" * (1 + len(STEPS)) + "|")
    for part, z, cond, far, one in parts(models, options.n, options.first):
        cells = []
        for steps in STEPS:
            ends = fixed_point(models.flows["teacher", part], z, cond, options.n, steps)
            cells.append(", ".join(f"{1 - rmse(end, far) / rmse(one, far):.0%}" for end in ends))
        print(f"| {part} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"mdt_interval.py: {error}") from None
