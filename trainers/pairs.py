"""Pairs (noise, end point) of a teacher's ODE, in shards that can be made by many workers and survive any kill.

The noise of row i is `normal(seed, tag, i)`, so a shard stores end points and row numbers only, and any shard can be
made again by anyone. Prompts are stored by their number too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import cond as conditions
from fastgen import noise
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.data import shards
from fastgen.data.encoded import NULL, Texts
from fastgen.data.source import shuffled
from fastgen.errors import Stopped, UserError
from fastgen.paths import path_to_dict
from fastgen.samplers import ode
from fastgen.teacher import Teacher


class PairsConfig(Model):
    """num pairs of `steps` solver steps. Labels are uniform, prompts come in a shuffled order; both are dropped for
    `null_share` of the rows."""

    num: int = Field(default=20_000, ge=1)
    solver: Literal["euler", "heun", "dpm++", "unipc"] = "heun"
    steps: int = Field(default=25, ge=1)
    guidance: float | None = None
    null_share: float = Field(default=0.1, ge=0, le=1)
    per_shard: int = Field(default=2000, ge=1)
    batch: int = Field(default=500, ge=1)
    dtype: Literal["float32", "float16"] = "float32"  # of the end points on disk
    limit: float = Field(default=20.0, gt=0)  # end points with |x0| beyond it, or not finite, are left out and recorded


def make_pairs(
    teacher: Teacher,
    config: PairsConfig,
    folder: Path,
    *,
    seed: int,
    tag: str = "pairs",
    texts: Texts | None = None,
    worker: int = 0,
    workers: int = 1,
    advance: Callable[[int, int], None] = lambda done, total: None,
    interrupt: Callable[[], bool] = lambda: False,
) -> None:
    """Make every shard of this worker that is not whole yet; `advance(done, total)` is told of each finished one.

    texts: the prompts of a teacher that reads text.
    """
    if config.guidance is not None and not teacher.denoiser.has_null:
        raise UserError(f"pairs.guidance={config.guidance} has no effect: the teacher has no conditions to guide by")
    shards.plan(folder, manifest(teacher, config, seed=seed, tag=tag, texts=texts))
    missing = shards.missing(folder, worker, workers)
    for done, index in enumerate(missing):
        advance(done, len(missing))
        if interrupt():
            raise Stopped(f"{done} of {len(missing)} missing shards made in {folder}")
        rows = torch.arange(index * config.per_shard, min((index + 1) * config.per_shard, config.num))
        parts = [_pairs(teacher, config, part, seed, tag, texts) for part in rows.split(config.batch)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shards.write_shard(folder, index, tensors, worker=worker)
    advance(len(missing), len(missing))


def manifest(
    teacher: Teacher, config: PairsConfig, *, seed: int, tag: str, texts: Texts | None = None
) -> dict[str, Any]:
    """What identifies a pair set: two sets with equal manifests hold the same pairs."""
    return {
        "teacher": teacher.sha256,
        "path": path_to_dict(teacher.path),
        "solver": config.solver,
        "steps": config.steps,
        "guidance": config.guidance if config.guidance is not None else teacher.guidance,
        "guidance_interval": teacher.guidance_interval,
        "texts": None if texts is None else texts.sha256,
        "dtype": config.dtype,
        "null_share": config.null_share if teacher.denoiser.has_null else None,
        "shape": list(teacher.shape),
        "num_classes": teacher.num_classes,
        "total": config.num,
        "per_shard": config.per_shard,
        "limit": config.limit,
        "seed": seed,
        "tag": tag,
    }


def _pairs(
    teacher: Teacher, config: PairsConfig, rows: Tensor, seed: int, tag: str, texts: Texts | None
) -> dict[str, Tensor]:
    rows = rows.to(teacher.denoiser.device)
    eps = noise.normal(seed, tag, rows, teacher.shape)
    if texts is None:
        cond = stored = draw_labels(teacher, rows, seed, tag, config.null_share)
    else:
        stored = {"prompt": draw_prompts(texts, rows.cpu(), seed, tag, config.null_share)}
        cond = {name.removeprefix(shards.COND): value for name, value in texts.rows(stored["prompt"]).items()}
        cond = conditions.to(cond, eps.device)
    x0 = ode.solve(teacher, eps, steps=config.steps, solver=config.solver, cond=cond, guidance=config.guidance)
    tensors = {"x0": x0.cpu(), "row": rows.cpu()}
    return tensors | {f"{shards.COND}{name}": value.cpu() for name, value in (stored or {}).items()}


def draw_labels(teacher: Teacher, rows: Tensor, seed: int, tag: str, null_share: float) -> Cond:
    """Uniform labels with `null_share` of them dropped, or None for an unconditional teacher."""
    if teacher.num_classes is None:
        return None
    label = noise.integers(seed, f"{tag}/label", rows, teacher.num_classes)
    dropped = noise.uniform(seed, f"{tag}/drop", rows) < null_share
    return conditions.replace({"label": label}, teacher.denoiser.null, dropped)


def draw_prompts(texts: Texts, rows: Tensor, seed: int, tag: str, null_share: float) -> Tensor:
    """Numbers of prompts, int64 [B]: each as often as any other, `null_share` of the rows without one."""
    numbers = torch.from_numpy(shuffled(seed, rows.numpy(), len(texts)))
    return torch.where(noise.uniform(seed, f"{tag}/drop", rows) < null_share, NULL, numbers)
