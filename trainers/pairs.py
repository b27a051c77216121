"""Pairs (noise, end point) of a teacher's ODE, in shards that can be made by many workers and survive any kill.

The noise of row i is `normal(seed, tag, i)`, so a shard stores end points and row numbers only, and any shard can be
made again by anyone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from fastgen import cond as conditions
from fastgen import noise
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.data import shards
from fastgen.errors import Stopped, UserError
from fastgen.paths import path_to_dict
from fastgen.samplers import ode
from fastgen.teacher import Teacher


class PairsConfig(Model):
    """num pairs of `steps` solver steps; labels are uniform, and dropped for `null_share` of the rows."""

    num: int = Field(default=20_000, ge=1)
    solver: Literal["euler", "heun", "dpm++", "unipc"] = "heun"
    steps: int = Field(default=25, ge=1)
    guidance: float | None = None
    null_share: float = Field(default=0.1, ge=0, le=1)
    per_shard: int = Field(default=2000, ge=1)
    batch: int = Field(default=500, ge=1)
    limit: float = Field(default=20.0, gt=0)  # end points with |x0| beyond it, or not finite, are left out and recorded


def make_pairs(
    teacher: Teacher,
    config: PairsConfig,
    folder: Path,
    *,
    seed: int,
    tag: str = "pairs",
    worker: int = 0,
    workers: int = 1,
    advance: Callable[[int, int], None] = lambda done, total: None,
    interrupt: Callable[[], bool] = lambda: False,
) -> None:
    """Make every shard of this worker that is not whole yet; `advance(done, total)` is told of each finished one."""
    if config.guidance is not None and not teacher.denoiser.has_null:
        raise UserError(f"pairs.guidance={config.guidance} has no effect: the teacher has no conditions to guide by")
    shards.plan(folder, manifest(teacher, config, seed=seed, tag=tag))
    missing = shards.missing(folder, worker, workers)
    for done, index in enumerate(missing):
        advance(done, len(missing))
        if interrupt():
            raise Stopped(f"{done} of {len(missing)} missing shards made in {folder}")
        rows = torch.arange(index * config.per_shard, min((index + 1) * config.per_shard, config.num))
        parts = [_pairs(teacher, config, part, seed, tag) for part in rows.split(config.batch)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shards.write_shard(folder, index, tensors, worker=worker)
    advance(len(missing), len(missing))


def manifest(teacher: Teacher, config: PairsConfig, *, seed: int, tag: str) -> dict[str, Any]:
    """What identifies a pair set: two sets with equal manifests hold the same pairs."""
    return {
        "teacher": teacher.sha256,
        "path": path_to_dict(teacher.path),
        "solver": config.solver,
        "steps": config.steps,
        "guidance": config.guidance if config.guidance is not None else teacher.guidance,
        "null_share": config.null_share if teacher.denoiser.has_null else None,
        "shape": list(teacher.shape),
        "num_classes": teacher.num_classes,
        "total": config.num,
        "per_shard": config.per_shard,
        "limit": config.limit,
        "seed": seed,
        "tag": tag,
    }


def _pairs(teacher: Teacher, config: PairsConfig, rows: torch.Tensor, seed: int, tag: str) -> dict[str, torch.Tensor]:
    rows = rows.to(teacher.denoiser.device)
    eps = noise.normal(seed, tag, rows, teacher.shape)
    cond = draw_labels(teacher, rows, seed, tag, config.null_share)
    x0 = ode.solve(teacher, eps, steps=config.steps, solver=config.solver, cond=cond, guidance=config.guidance)
    tensors = {"x0": x0.cpu(), "row": rows.cpu()}
    return tensors | {f"cond.{name}": value.cpu() for name, value in (cond or {}).items()}


def draw_labels(teacher: Teacher, rows: torch.Tensor, seed: int, tag: str, null_share: float) -> Cond:
    """Uniform labels with `null_share` of them dropped, or None for an unconditional teacher."""
    if teacher.num_classes is None:
        return None
    label = noise.integers(seed, f"{tag}/label", rows, teacher.num_classes)
    dropped = noise.uniform(seed, f"{tag}/drop", rows) < null_share
    return conditions.replace({"label": label}, teacher.denoiser.null, dropped)
