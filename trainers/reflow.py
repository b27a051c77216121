"""Rectified flow, round k: straighten a teacher's trajectories, then cut them to one step (2209.03003, 2309.06380).

    pairs (eps, x0) with x0 = ODE[teacher](eps | c)                         made beforehand: `fastgen.trainers.pairs`
    reflow   t ~ p(t),       x_t = (1 - t) x0 + t eps,   L = E D(v(x_t, t, c), eps - x0)
    distil   t on the student's own step times only, the first of them on the noise that its sampler feeds

t = 1 is noise here (the papers' t = 1 is data). Everything is a velocity on the rectified-flow view, so an eps or v
network keeps its own path and is exact at step 0; beyond its last level (SD 1.x: t = 0.936) it is never asked.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, mean, sumsq
from fastgen.paths import RectifiedFlow
from fastgen.samplers import few_step, ode
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn

RF = RectifiedFlow()


class Reflow(Method):
    """Networks: the student, which starts as the teacher (or as the round before). Data: pairs."""

    class Config(Model):
        name: Literal["reflow"] = "reflow"
        times: Literal["uniform", "u_shape", "steps"] = "uniform"  # "steps": the distillation stage
        steps: tuple[int, ...] = (1, 2, 4)  # what the student will be sampled with; "steps" trains the times of these
        loss: Literal["l2", "huber", "lpips", "lpips_huber"] = "l2"
        huber_c: float = 0.00054  # times the number of coordinates (2405.20320)
        u_shape_a: float = 4.0

    experimental = "the export of its students to stock pipelines is not built yet"

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
        t, x = self.states(batch)
        pair = self.student(x, t, batch.cond, on=RF)
        target = batch["eps"] - batch.x0
        error = pair.velocity - target
        kind, logs = self.config.loss, {"velocity_mse": error.square().mean()}
        if kind == "l2":
            return mean(error.square()).mean(), logs
        if kind == "huber":
            return pseudo_huber(error, self.config.huber_c).mean(), logs
        perceptual = self.distance(x - expand(t, x) * pair.velocity, batch.x0)
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

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Times on the rectified-flow view and the states there: (t [B], x_t [B, ...])."""
        x0, eps = batch.x0, batch["eps"]
        if self.config.times != "steps":
            u = batch.uniform("t")
            u = u if self.config.times == "uniform" else u_shape(u, self.config.u_shape_a)
            t = u * self.last_time.to(u)
            return t, RF.mix(x0, eps, t)
        times = self.step_times.to(x0)
        k = batch.integers("t", len(times))
        t = times[k]
        # The first state of a run is noise alone, at the scale its sampler feeds, not a mixture with data.
        first = expand(t >= self.last_time.to(t), x0)
        return t, torch.where(first, self.first_scale * eps, RF.mix(x0, eps, t))

    @cached_property
    def last_time(self) -> Tensor:
        """The rectified-flow time of the network's last level: 1, or less where its table ends before pure noise."""
        return RF.time(*self._start_levels)

    @cached_property
    def _start_levels(self) -> tuple[Tensor, Tensor]:
        return self.student.path.levels(torch.tensor(self.student.path.start))

    @cached_property
    def first_scale(self) -> float:
        """The sampler's first state over its noise, on the rectified-flow view, where alpha + sigma = 1."""
        alpha, sigma = (float(level) for level in self._start_levels)
        return (1.0 if self.sampler().init == "unit" else sigma) / (alpha + sigma)

    @cached_property
    def step_times(self) -> Tensor:
        """Every rectified-flow time at which the student will be evaluated, with repetitions: a step count is drawn
        as often as it has steps."""
        spec = self.sampler()
        times = torch.tensor([t for n in self.config.steps for t in spec.times[n]])
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
