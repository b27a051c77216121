"""Rectified flow, round k: straighten a teacher's trajectories, then cut them to one step (2209.03003, 2309.06380).

    pairs    z -> x0 = ODE[teacher](z | c)                                   made beforehand: `fastgen.trainers.pairs`
    line     x_t = x0 + t v,   v = (s z - x0) / T                            from the sampler's first state s z at t = T
    reflow   t ~ p(t),                              L = E D(v_student(x_t, t, c), v)
    distil   t on the student's own step times only

t = 1 is noise here (the papers' t = 1 is data). Everything is a velocity on the rectified-flow view, so an eps or v
network keeps its own path and is exact at step 0. On a rectified flow T = s = 1 and v = z - x0. A network whose table
ends before pure noise is never asked beyond its last level: SD 1.x starts at T = 0.936 on noise of unit variance,
s = 0.938. With v = z - x0 there too, one step would end 6 % short of x0.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, mean, sumsq, wide
from fastgen.samplers import few_step, ode
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn
from fastgen.trainers.flow_matching import RF, last_time


class Reflow(Method):
    """Networks: the student, which starts as the teacher (or as the round before). Data: pairs."""

    class Config(Method.Config):
        name: Literal["reflow"] = "reflow"
        times: Literal["uniform", "u_shape", "steps"] = "uniform"  # "steps": the distillation stage
        # What the student will be sampled with; "steps" trains the times of these.
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
        loss: Literal["l2", "huber", "lpips", "lpips_huber"] = "l2"
        huber_c: float = Field(default=0.00054, gt=0)  # times the number of coordinates (2405.20320)
        u_shape_a: float = Field(default=4.0, gt=0)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.needs = frozenset({"x0", "eps"})
        if "lpips" in self.config.loss and self.distance is None:
            raise UserError(
                f"method.loss={self.config.loss} needs LPIPS weights: set lpips.trunk and lpips.heads to local files"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        t, x, target = self.line(batch)
        velocity = self.student(x, t, batch.cond, on=RF).velocity
        error = velocity - target
        kind, logs = self.config.loss, {"velocity_mse": error.square().mean()}
        if kind == "l2":
            return mean(error.square()).mean(), logs
        if kind == "huber":
            return pseudo_huber(error, self.config.huber_c).mean(), logs
        assert self.distance is not None  # see __init__
        perceptual = self.distance(x - expand(t, x) * velocity, batch.x0)
        if kind == "lpips":
            return perceptual.mean(), logs
        return ((1 - t) * pseudo_huber(error, self.config.huber_c) + perceptual).mean(), logs

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """The gap to the teacher's end points from their own noise, and how straight the student's paths are."""
        steps = min(self.config.steps)
        own = few_step.sample(student, self.sampler(), batch["eps"], steps, batch.cond)
        return {
            "teacher_gap": float((own - batch.x0).square().mean().sqrt()),
            "straightness": ode.straightness(student, batch["eps"], steps=20, cond=batch.cond),
        }

    def line(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A place on each pair's line and the line's velocity: (t [B], x_t [B, ...], d x / d t [B, ...])."""
        t = self.times(batch)
        velocity = (self.first_scale * batch["eps"] - batch.x0) / self.last_time
        return t, batch.x0 + expand(t, velocity) * velocity, velocity

    def times(self, batch: Batch) -> Tensor:
        """Times on the rectified-flow view, [B], none beyond `last_time`."""
        if self.config.times == "steps":
            times = self.step_times.to(wide(batch.x0))
            return times[batch.integers("t", len(times))]
        u = batch.uniform("t")
        return self.last_time * (u if self.config.times == "uniform" else u_shape(u, self.config.u_shape_a))

    @cached_property
    def last_time(self) -> float:
        """The rectified-flow time T at which the student's runs begin."""
        return last_time(self.student.path)

    @cached_property
    def first_scale(self) -> float:
        """The sampler's first state over its noise, on the rectified-flow view, where alpha + sigma = 1."""
        spec, one = self.sampler(), torch.ones((), dtype=torch.float64)
        alpha, sigma = spec.path.levels(spec.path.start * one)
        return float(few_step.initial(spec, one, self.config.steps[0]) / (alpha + sigma))

    @cached_property
    def step_times(self) -> Tensor:
        """The rectified-flow times at which the student will be evaluated, repeated so that drawing one of them evenly
        draws every step count as often as any other, and then one of its times."""
        spec, every = self.sampler(), math.lcm(*self.config.steps)
        repeated = [t for n in self.config.steps for t in spec.times[n] for _ in range(every // n)]
        times = torch.tensor(repeated, dtype=torch.float64)
        return RF.time(*spec.path.levels(times))

    def sampler(self) -> SamplerSpec:
        path = self.student.path
        return SamplerSpec(path=path, times={n: path.grid(n) for n in self.config.steps}, init=path.init)


def u_shape(u: Tensor, a: float) -> Tensor:
    """Uniform (0, 1) to the density a e^{a s} / (e^a - 1), half of it mirrored, kept 1e-5 inside (2405.20320)."""
    side, u = u < 0.5, (2 * u) % 1
    s = torch.log1p(u * math.expm1(a)) / a
    return 1e-5 + (1 - 2e-5) * torch.where(side, s, 1 - s)


def pseudo_huber(error: Tensor, relative: float) -> Tensor:
    """(sqrt(|e|^2 + c^2) - c) / n per sample with c = relative * n for n coordinates: [B, ...] -> [B]."""
    n = error[0].numel()
    c = relative * n
    return (torch.sqrt(sumsq(error) + c * c) - c) / n
