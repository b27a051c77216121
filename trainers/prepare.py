"""Prepare a SANA teacher for continuous-time distillation: a dense time and QK-norm, the same velocity (2503.09641).

    the network's time argument becomes r in [0, 1] instead of 1000 r, queries and keys are normalised   (section 3.1)
    x_r = (1 - r) x0 + r eps,  r ~ U(0, 1)
    L = (1 - w) E | v(x_r, r, c) - v_teacher(x_r, r, c) |^2 + w E | v(x_r, r, c) - (eps - x0) |^2        w = data_weight

Why: with 1000 r inside the sines, and attention whose denominators come near 0, the time derivative that sCM needs is
about a thousand times as large as the velocity, and bfloat16 cannot hold it. The paper trains on the data (w = 1). Here
w = 0 is the default: the same minimum if the teacher is at it, without the noise of single samples in the target, and
what is checked at the end is what was minimised.

At the end the network that would be written is held against the original, level by level, on rows and noise that were
not trained on; an error beyond `tolerance` ends the run, and nothing is written.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.cond import select
from fastgen.denoiser import Denoiser
from fastgen.errors import RunFailed, UserError
from fastgen.layout import sumsq
from fastgen.student import SamplerSpec
from fastgen.teachers.sana import SanaDenoiser
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn
from fastgen.trainers.flow_matching import RF, velocity_error

logger = logging.getLogger("fastgen")
LEVELS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PIECE = 4  # rows that are checked at once


class Prepare(Method):
    """Networks: the teacher-to-be (named "student" as every exported network). Frozen: the teacher that there was."""

    class Config(Method.Config):
        name: Literal["prepare"] = "prepare"
        qk_norm: bool = True
        data_weight: float = Field(default=0.0, ge=0, le=1)
        tolerance: float = Field(default=0.05, gt=0)  # of the worst level's relative error of the velocity

    makes = "teacher"
    preview_steps = 8
    precisions = ("fp32", "bf16")  # Gemma's conditions and DC-AE's latents leave fp16 little room

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        student, told = self.student, "method prepare"
        if self.teacher is None:
            raise UserError(f"{told} reproduces a teacher's velocity: set teacher=PATH, and init: teacher in its stage")
        if not isinstance(student, SanaDenoiser):
            raise UserError(f"{told}: a {student.family} network has neither to be changed: give a SANA checkpoint")
        if any(not p.requires_grad for p in student.parameters()):
            raise UserError(f"{told}: student.lora saves adapters alone, and other layers change too; leave it off")
        if student.takes_guidance:
            raise UserError(f"{told}: this checkpoint takes guidance as an input: it is a student already")
        if student.time_scale == 1 and (student.net.config.qk_norm or not self.config.qk_norm):
            raise UserError(f"{told}: this SANA checkpoint has a dense time and QK-norm already; use it as it is")
        self.embedding_error = student.prepare(qk_norm=self.config.qk_norm)
        self.needs = frozenset({"x0", "cond.text"})

    def begin(self, batch: Batch) -> None:
        if batch.step == 0:
            off = self.embedding_error
            logger.info("prepare: the new embedding of the time begins %.1e off the old one (relative, RMS)", off)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        x0, eps = batch.x0, batch.normal("eps", self.student.shape)
        r, w = batch.uniform("r"), self.config.data_weight
        x = RF.mix(x0, eps, r)
        found = self.student(x, r, batch.cond, on=RF).velocity
        parts: dict[str, Tensor] = {}
        if w < 1:
            parts["teacher"] = (1 - w) * velocity_error(found, self.truth(x, r, batch.cond))
        if w > 0:
            parts["data"] = w * velocity_error(found, eps - x0)
        return sum(parts.values(), torch.zeros((), device=x.device)), {f"mse/{k}": v for k, v in parts.items()}

    @torch.no_grad()
    def truth(self, x: Tensor, r: Tensor, cond: Any) -> Tensor:
        """The teacher's velocity, of the condition alone: guidance is added to the prepared one afterwards."""
        assert self.teacher is not None  # see __init__
        return self.teacher(x, r, cond, guidance=1.0, on=RF).velocity

    def sampler(self) -> SamplerSpec:
        path = self.student.path
        return SamplerSpec(path=path, times={n: path.grid(n) for n in (1, 2, 4, 8, 25)}, init=path.init)

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        errors = self.errors(student, batch)
        return {f"velocity_error/{level:g}": error for level, error in errors.items()}

    def finish(self, student: Denoiser, batch: Batch) -> dict[str, Any]:
        """The relative errors of the velocity by level; RunFailed where the worst is beyond the tolerance."""
        errors = self.errors(student, batch)
        level = max(errors, key=lambda level: errors[level])
        told = " ".join(f"{level:g}: {error:.1e}" for level, error in errors.items())
        logger.info("prepare: relative error of the velocity at r = %s", told)
        if not errors[level] <= self.config.tolerance:
            raise RunFailed(
                f"prepare: at r = {level:g} the velocity is {errors[level]:.2g} off the teacher's (relative), allowed "
                f"are {self.config.tolerance:g} (method.tolerance); no model was written: train longer (loop.steps)"
            )
        return {"velocity_error": {f"{level:g}": error for level, error in errors.items()}}

    @torch.no_grad()
    def errors(self, student: Denoiser, batch: Batch) -> dict[float, float]:
        """{r: |v - v_teacher| / |v_teacher|}, norms over all rows and coordinates of the batch."""
        x0, found = batch.x0, {}
        for i, level in enumerate(LEVELS):
            eps, off, size = batch.normal("check/eps", student.shape, draw=i), 0.0, 0.0
            for rows in torch.arange(len(batch), device=x0.device).split(PIECE):
                r = torch.full((len(rows),), level, device=x0.device)
                x, cond = RF.mix(x0[rows], eps[rows], r), select(batch.cond, rows)
                truth = self.truth(x, r, cond)
                off += float(sumsq(student(x, r, cond, on=RF).velocity - truth).sum())
                size += float(sumsq(truth).sum())
            found[level] = (off / size) ** 0.5
        return found
