"""Samples by number: sample i of a seed is the same for every batch size, machine and model that is given its noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastgen import cond as conditions
from fastgen import noise
from fastgen.cond import Cond
from fastgen.denoiser import GUIDANCE
from fastgen.errors import UserError
from fastgen.samplers import few_step, ode
from fastgen.student import Student
from fastgen.teacher import Teacher

TAG = "sample"


def draw(
    model: Student | Teacher,
    rows: Tensor,
    *,
    seed: int,
    steps: int,
    cond: Cond = None,
    solver: str | None = None,
    guidance: float | None = None,
    batch: int = 500,
) -> Tensor:
    """Samples number `rows` int64 [N] of a student, or of a teacher by an ODE solver (default heun): float32 [N, ...].

    Teacher and student see the same noise for equal seed and row. A student has no solver to choose, and guidance only
    where its network takes it as an input (`SamplerSpec.guidance`).
    """
    return torch.cat(list(_batches(model, rows, seed, steps, cond, solver, guidance, batch)))


@torch.inference_mode()
def _batches(
    model: Student | Teacher,
    rows: Tensor,
    seed: int,
    steps: int,
    cond: Cond,
    solver: str | None,
    guidance: float | None,
    batch: int,
) -> Iterator[Tensor]:
    device = model.denoiser.device
    for at in torch.arange(len(rows)).split(batch):
        part, chosen = rows[at].to(device), conditions.to(conditions.select(cond, at), device)
        z = noise.normal(seed, TAG, part, model.denoiser.shape)
        if isinstance(model, Teacher):
            x0 = ode.solve(model, z, steps=steps, solver=solver or "heun", cond=chosen, guidance=guidance)
        else:
            if solver:
                raise UserError("a student has its solver built in; leave out solver")
            chosen = _weighted(model, chosen, guidance, len(part), device)
            fresh = partial(_fresh, seed, part, model.denoiser.shape)
            x0 = few_step.sample(model.denoiser, model.sampler, z, steps, chosen, renoise=fresh)
        yield x0.float().cpu()


def _weighted(model: Student, cond: Cond, guidance: float | None, n: int, device: torch.device) -> Cond:
    """The condition with a guidance weight that the student's network takes."""
    if guidance is None:
        return cond
    if model.sampler.guidance is None:
        raise UserError("this student has its guidance built in; leave out guidance")
    return {**(cond or {}), GUIDANCE: torch.full((n,), guidance, device=device)}


def _fresh(seed: int, rows: Tensor, shape: tuple[int, ...], i: int) -> Tensor:
    """The fresh noise of call number i."""
    return noise.normal(seed, f"{TAG}/renoise", rows, shape, draw=i)
