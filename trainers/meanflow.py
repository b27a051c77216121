"""MeanFlow: learn the average velocity over a span of time, which takes noise to data in one step (2505.13447).

    u(z_t, r, t) = 1 / (t - r) int_r^t v(z_s, s) ds,   u = v - (t - r) D,   D = du/dt = (grad_z u) v + partial_t u
    target = sg[v - k (t - r) D],   L = w |u_theta - target|^2,   w = 1 / (sg|u_theta - target|^2 + c)^p
    z_r = z_t - (t - r) u_theta(z_t, r, t)                      one step: t = 1, r = 0

v is a teacher's velocity at z_t (MFD of 2511.13019, "use_cd" in NVlabs/FastGen) or the one-point velocity of the data
(the paper's; MFT). t = 1 is noise, so (t - r) D is subtracted, from the target and in the step. The student is told
t - r by a second embedding that is zero at first: u_theta(z, r, t) is then its teacher's v(z, t) for every r. All of it
happens on the rectified-flow view, so a network keeps its own path. Of a table that ends before pure noise (SD: T =
0.936) nothing beyond T is asked: times are shrunk to [0, T], and from data the line ends on the sampler's first state
s eps (`trainers/reflow.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen import cond as conditions
from fastgen import jvp
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.jvp import JvpConfig
from fastgen.layout import expand, sumsq, wide
from fastgen.samplers import few_step, ode
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of
from fastgen.trainers.engine.spans import SpansConfig
from fastgen.trainers.flow_matching import RF, last_time

TEACHER_STEPS = 8  # of Heun, in a diagnosis


class LossConfig(Model):
    """What is minimised, with x = |u - target|^2 (l2) or |g| (opt_grad), g = target - sg(u).

    kind         l2, or opt_grad: |u - sg(u + w g)|^2, whose gradient -2 w g has a bounded norm (FastGen)
    power, c     w = (x + c)^-power ("norm_method: poly_P", "norm_const"); power 0: no weight
    exponential  (a, b): w = a exp(b x + c) instead ("norm_method: exp_A_B")
    per_root     opt_grad: g over the square root of the number of coordinates ("tangent_spatial_invariance")
    warmup       steps during which k grows from 0 to 1 ("tangent_warmup_steps")
    """

    kind: Literal["l2", "opt_grad"] = "l2"
    power: float = Field(default=1.0, ge=0)
    c: float = 0.01
    exponential: tuple[float, float] | None = None
    per_root: bool = False
    warmup: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _used(self) -> LossConfig:
        if self.per_root and self.kind != "opt_grad":
            raise ValueError("per_root belongs to kind=opt_grad")
        return self

    def tangent_share(self, step: int) -> float:
        """k, how much of the tangent is used at a step."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def weight(self, x: Tensor) -> Tensor:
        if self.exponential is not None:
            a, b = self.exponential
            return a * torch.exp(b * x + self.c)
        return (x + self.c) ** -self.power


class GuidedConfig(Model):
    """Guided targets from data (2505.13447, equation 19 and appendix B), effective weight omega / (1 - kappa):

    v = omega (eps - x0) + (1 - omega - kappa) u(z, t, t | null) + kappa u(z, t, t | c)    for t in `interval`
    """

    omega: float = Field(default=1.0, ge=0)
    kappa: float = Field(default=0.0, ge=0, lt=1)
    interval: tuple[float, float] = (0.0, 1.0)

    def mix(self, own: Tensor, null: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """The guided velocity of each sample, [B, ...]: t [B], the others [B, ...]."""
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        guided = self.omega * own + (1 - self.omega - self.kappa) * null + self.kappa * cond
        return torch.where(expand(inside, own), guided, own)


class MeanFlow(Method):
    """Networks: the student, told two times. Frozen: the teacher of `velocity: teacher`. Data: "x0"."""

    class Config(Method.Config):
        name: Literal["meanflow"] = "meanflow"
        velocity: Literal["teacher", "data"] = "teacher"
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
        spans: SpansConfig = SpansConfig()
        loss: LossConfig = LossConfig()
        guidance: float | None = None  # of the teacher; None: the teacher's own
        guided: GuidedConfig | None = None  # of velocity=data
        drop_label: float = Field(default=0.1, ge=0, le=1)  # share of rows without a condition, and unguided
        jvp: JvpConfig = JvpConfig()

    precisions = ("fp32", "bf16")  # (t - r) D is a difference of near numbers, which leaves the range of fp16

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refuse()
        self.student.add_gap()
        self.needs = needs_of(self.student)

    def _refuse(self) -> None:
        config, student = self.config, self.student
        if any(not parameter.requires_grad for parameter in student.parameters()):
            raise UserError(
                "method meanflow adds an embedding of the second time, which adapters cannot carry: "
                "leave out student.lora"
            )
        if config.velocity == "teacher" and self.teacher is None:
            raise UserError("method.velocity=teacher: set teacher=PATH, or velocity=data to learn from data alone")
        if config.velocity == "data" and self.teacher is not None:
            raise UserError("method.velocity=data never asks a teacher: leave the stage's `teacher` out")
        if config.guidance is not None and config.velocity == "data":
            raise UserError(
                "method.guidance is the teacher's; targets from data are guided by method.guided={omega: W}"
            )
        if config.guided is not None and config.velocity == "teacher":
            raise UserError("method.guided belongs to velocity=data; a teacher is guided by method.guidance=W")
        if config.guided is not None and not student.has_null:
            raise UserError("method.guided: the network has no null condition to guide against; leave it off")
        if config.guidance is not None and self.teacher is not None and not self.teacher.denoiser.has_null:
            raise UserError(f"method.guidance={config.guidance}: the teacher has no null condition; leave it off")
        if config.drop_label and student.num_classes is not None and not student.has_null:
            raise UserError("the network has labels, but none that means 'no label': set method.drop_label=0")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def begin(self, batch: Batch) -> None:
        """Try the derivative along the path, half-way between the ends."""
        z, cond = batch.normal("begin", self.student.shape), self.condition(batch)[0]
        t = torch.full_like(wide(z).flatten(1)[:, 0], self.last_time / 2)
        primals = (z, t, t / 2)
        tangents = (batch.normal("begin/velocity", self.student.shape), torch.ones_like(t), torch.zeros_like(t))
        jvp.check(self.average_velocity(cond), primals, tangents, self.config.jvp, self.student)

    def loss(self, batch: Batch) -> Loss:
        t, r, z, own = self.noisy(batch)
        v, cond = self.velocity(batch, z, t, own)
        u, slope = self.derivative(z, t, r, v, cond)
        loss, weight, g = losses(self.config.loss, u, v, slope, t - r, batch.step)
        moving = (t > r).to(u.dtype)  # elsewhere D does not count
        logs = {"g_rms": _rms(g), "moving/g_rms": _rms(g, moving), "moving/D_rms": _rms(slope, moving)}
        return loss.mean(), logs | {"v_loss": (u.detach() - own).square().mean(), "weight": weight.mean()}

    def noisy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(t, r, z_t, one-point velocity at z_t): a teacher is asked where its own path leads, data are followed along
        the line that ends on the sampler's first state."""
        t, r = (self.last_time * time for time in self.config.spans.draw(batch))
        x0, eps = batch.x0, batch.normal("eps", self.student.shape)
        if self.config.velocity == "teacher":
            return t, r, RF.mix(x0, eps, t), eps - x0
        velocity = (self.first_scale * eps - x0) / self.last_time
        return t, r, x0 + expand(t, velocity) * velocity, velocity

    def condition(self, batch: Batch) -> tuple[Cond, Tensor]:
        """The conditions with some of them dropped, and which rows were, bool [B]."""
        dropped = batch.uniform("drop") < self.config.drop_label
        cond = batch.cond
        if self.student.num_classes is None:
            cond = {name: value for name, value in (cond or {}).items() if name != "label"} or None
        if cond is None or not self.student.has_null:
            return cond, torch.zeros_like(dropped)
        return conditions.replace(cond, self.student.unconditional(cond), dropped), dropped

    @torch.no_grad()
    def velocity(self, batch: Batch, z: Tensor, t: Tensor, own: Tensor) -> tuple[Tensor, Cond]:
        """(v, the conditions of which it is): v [B, ...] is both the target at r = t and the tangent's direction."""
        cond, dropped = self.condition(batch)
        if self.teacher is not None:
            return self.teacher(z, t, cond, guidance=self.config.guidance, on=RF).velocity, cond
        if self.config.guided is None:
            return own, cond
        assert cond is not None  # a network with a null condition has conditions
        with _evaluated(self.student):
            null, kept = (
                self.student(z, t, asked, on=RF).velocity for asked in (self.student.unconditional(cond), cond)
            )
        torch.clear_autocast_cache()  # it holds half-precision weights made just now, without a way back to their own
        return torch.where(expand(dropped, own), own, self.config.guided.mix(own, null, kept, t)), cond

    def average_velocity(self, cond: Cond) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(z, t, r) -> u_theta(z, r, t), [B, ...]."""
        return lambda z, t, r: self.student(z, t, cond, on=RF, r=r).velocity

    def derivative(self, z: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """u_theta with its gradient and D without one, both [B, ...]; a finite difference stays inside [r, T]."""
        fn, factor = self.average_velocity(cond), None
        if self.config.jvp.route == "finite":
            fn, factor = one_sided(fn, z, t, r, self.config.jvp.step, self.last_time)
        tangents = (v, torch.ones_like(t), torch.zeros_like(r))
        u, slope = jvp.value_and_tangent(fn, (z, t, r), tangents, self.config.jvp)
        return u, slope if factor is None else expand(factor, slope) * slope

    @cached_property
    def last_time(self) -> float:
        """The rectified-flow time T at which the student's runs begin."""
        return last_time(self.student.path)

    @cached_property
    def first_scale(self) -> float:
        """The sampler's first state over its noise, on the rectified-flow view."""
        spec, one = self.sampler(), torch.ones((), dtype=torch.float64)
        return float(few_step.initial(spec, one, self.config.steps[0]))

    def sampler(self) -> SamplerSpec:
        """n steps of equal length, T / n, whatever the network's own path: so a constant embedding serves a run."""
        times = {n: tuple(self.last_time * (n - i) / n for i in range(n)) for n in self.config.steps}
        return SamplerSpec(path=RF, times=times, two_time=True, init=self.student.path.init)

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """From fixed noises: how far one step ends from the student's own end point in more steps (`step_gap`), and
        from the teacher's (`teacher_gap`)."""
        spec, z, cond = self.sampler(), batch.normal("diagnose", student.shape), self.condition(batch)[0]
        few, most = min(self.config.steps), max(self.config.steps)
        ends = {n: few_step.sample(student, spec, z, n, cond) for n in (few, most)}
        figures = {} if few == most else {"step_gap": _rms(ends[few] - ends[most])}
        if self.teacher is not None:
            options = {"cond": cond, "guidance": self.config.guidance}
            figures["teacher_gap"] = _rms(ends[few] - ode.solve(self.teacher, z, steps=TEACHER_STEPS, **options))
        return {name: float(value) for name, value in figures.items()}


def target(v: Tensor, slope: Tensor, gap: Tensor, share: float) -> Tensor:
    """v - k (t - r) D without a gradient: v and D [B, ...], t - r [B], k in [0, 1] (2505.13447, equation 10)."""
    return (v - share * expand(gap, v) * slope).detach()


def losses(
    config: LossConfig, u: Tensor, v: Tensor, slope: Tensor, gap: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], its weight w [B], g = target - sg(u) [B, ...]): u, v and D [B, ...], t - r [B]."""
    aim = target(v, slope, gap, config.tangent_share(step))
    g = aim - u.detach()
    if config.kind == "l2":
        square = sumsq(u - aim)
        weight = config.weight(square.detach())
        return weight * square, weight, g
    if config.per_root:
        g = g / math.sqrt(g[0].numel())
    weight = config.weight(sumsq(g).sqrt())
    return sumsq(u - (u + expand(weight, g) * g).detach()), weight, g


def one_sided(
    fn: Callable[..., Tensor], z: Tensor, t: Tensor, r: Tensor, step: float, last: float
) -> tuple[Callable[..., Tensor], Tensor]:
    """`fn` for a central difference about (z, t) that may neither leave [0, last] nor reach r: a point beyond is moved
    back to the middle, and the difference of that row, taken over one step instead of two, counts twice ([B])."""
    outside = (t + step > last).to(t.dtype) + ((t - step < 0) | (t - step <= r)).to(t.dtype)

    def kept(z_at: Tensor, t_at: Tensor, r_at: Tensor) -> Tensor:
        beyond = (t_at > last) | ((t_at < t) & ((t_at < 0) | (t_at <= r)))
        return fn(torch.where(expand(beyond, z), z, z_at), torch.where(beyond, t, t_at), r_at)

    return kept, 1 + outside


@contextmanager
def _evaluated(network: Denoiser) -> Iterator[None]:
    """In eval mode while it lasts: a target holds no dropout."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Root mean square over the coordinates of all samples, or of those with weight: x [B, ...], weight [B]."""
    each = sumsq(x) / x[0].numel()
    return (each.mean() if weight is None else (each * weight).sum() / weight.sum().clamp_min(1)).sqrt()
