"""sCM: consistency models in continuous time, distilled from a teacher or trained from data (2410.11081).

On the TrigFlow view x_t = cos t x0 + sin t z (z = d eps, d the deviation of the data) any network answers with a
velocity F. In units of d, y = x / d, and with c = cos t, s = sin t:

    f = c y - s F(y, t)                                       the student's clean sample; f = y at t = 0 for any F
    dy/dt = v:  F of the teacher (sCD), or c eps - s x0 / d of the drawn pair (sCT)
    D = c s dF/dt                                             along (v, 1), by forward-mode differentiation
    g = sd (-c^2 (F- - v) - r (c s y + D))                    r = min(1, step / H); at r = 1 g = sd c df/dt
    g <- g / (|g| + 0.1)
    L = w(t) e^-u(t) |F - F- - g|^2 / n + u(t)                w = 1 / (sd tan t); u a small network, F- without gradient

sd = 0.5 is the constant in the law of t, in w and in the units of g. Pixels have d = sd, as in the paper. Latents have
d = 1: SANA-Sprint (2503.09641) multiplies them by sd and divides them again before the network.

    regulariser: {...}      SANA-Sprint: heads in the teacher's features judge the student's samples as well
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastgen import jvp
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import GUIDANCE, Denoiser
from fastgen.errors import UserError
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.layout import expand, mean, sumsq
from fastgen.paths import Pair, Prediction
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.adaptive import LogVariance
from fastgen.trainers.engine.adversary import Adversary, AdversaryConfig
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of
from fastgen.trainers.engine.trig import (
    angles,
    condition_of,
    draw_angle,
    few_step_spec,
    first_states,
    trig_view,
)


class TangentConfig(Model):
    """How g is made.

    warmup    H: student steps until c y + dF/dt counts whole; 0 from the start
    norm      |g| of a sample: "l2", or "rms", which is l2 over the root of the number of coordinates (NVlabs/FastGen)
    constant  what is added to |g| before g is divided by it
    """

    warmup: int = Field(default=1000, ge=0)
    norm: Literal["l2", "rms"] = "l2"
    constant: float = Field(default=0.1, ge=0)


class WeightConfig(Model):
    """prior: w = 1 / (sd tan t), else 1. adaptive: u, else 0. per_coordinate: the squared error also over n, once more
    than its mean is (NVlabs/FastGen); matters beside u alone."""

    prior: bool = True
    adaptive: bool = True
    per_coordinate: bool = False


class Regulariser(AdversaryConfig):
    """weight: of the adversary's loss beside 1 for sCM's. max_time: share of the judged samples that start from noise
    alone; 0 judges sCM's own samples and saves a forward pass."""

    weight: float = Field(default=0.5, gt=0)
    max_time: float = Field(default=0.5, ge=0, le=1)


class Start(NamedTuple):
    """Where rows are looked at: x = cos t x0 + sin t z, the condition, and what the student is told (with its weight w
    of guidance, [B], where it takes one)."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    x: Tensor
    cond: Cond
    told: Cond
    w: Tensor | None


class Scm(Method):
    """Networks: the student, which starts as the teacher, `weight` (u), `heads` (of a regulariser). Data: x0."""

    class Config(Method.Config):
        name: Literal["scm"] = "scm"
        velocity: Literal["teacher", "data"] = "teacher"  # sCD or sCT
        sd: float = Field(default=0.5, gt=0)
        data_sd: float | None = Field(default=None, gt=0)  # d; None: 1 for latents, else sd
        p_mean: float = -1.0  # the law of ln(sd tan t); of latents 0.2 and 1.6 (SANA-Sprint)
        p_std: float = Field(default=1.4, gt=0)
        tangent: TangentConfig = TangentConfig()
        weight: WeightConfig = WeightConfig()
        # Of the teacher: its own, a number baked in, or numbers of which each row draws one and the student is told it.
        guidance: float | Annotated[tuple[float, ...], Field(min_length=2)] | None = None
        null_share: float = Field(default=0.1, ge=0, le=1)  # of a class-conditional student's rows, without a label
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
        middle: float | None = None  # second angle of two steps; None: 1.1
        jvp: JvpConfig = JvpConfig()
        regulariser: Regulariser | None = None

    precisions = ("fp32", "bf16")  # the tangent's small differences leave the range of fp16

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        config, student, teacher = self.config, self.student, self.teacher
        if config.velocity == "teacher" and teacher is None:
            raise UserError("method scm follows a teacher's velocity: set teacher=PATH, or method.velocity=data")
        self._refuse_guidance()
        self.view = trig_view(student, config.data_sd, config.sd)
        self.output = Prediction(kind="trig", sd=self.view.sd)
        known = [student.path] if teacher is None else [student.path, teacher.path]
        self.within = angles(self.view, *known)
        self.needs = needs_of(student)
        self.adversary: Adversary | None = None
        if config.regulariser is not None:
            self.adversary = Adversary(config.regulariser, teacher, student, self.view, config.sd)
            self.networks["heads"] = self.adversary.heads
            self.frozen |= self.adversary.frozen
        if self.told_guidance:
            student.add_guidance()
        self.log_variance = LogVariance() if config.weight.adaptive else None
        if self.log_variance is not None:
            self.networks["weight"] = self.log_variance
        self.spec = self.sampler()

    @property
    def turns(self) -> tuple[Turn, ...]:
        student = Turn(trains=("student", "weight") if self.log_variance else ("student",), loss=self.loss)
        return (student,) if self.adversary is None else (student, Turn(trains=("heads",), loss=self.heads_loss))

    def begin(self, batch: Batch) -> None:
        start = self.start(batch)
        along = self.direction(start.t, self.velocity(start))
        jvp.check(self.flow(self.student, start.told), (start.x, start.t), along, self.config.jvp, self.student)
        if self.adversary is not None:
            self.adversary.look(batch, start.x0, start.cond)

    def loss(self, batch: Batch) -> Loss | Iterator[Loss]:
        """The student's step, and u's."""
        start = self.start(batch)
        flow, g, logs = self.tangent(self.student, start, ramp(self.config.tangent, batch.step))
        error = mean((flow - flow.detach() - normed(self.config.tangent, g)).square())
        u = torch.zeros_like(start.t) if self.log_variance is None else self.log_variance(start.t)
        loss = weighted(self.config.weight, self.config.sd, error, u, start).mean()
        if self.adversary is None:
            return loss, logs
        if self.config.regulariser.max_time:
            return self._apart(batch, start, (loss, logs))
        alpha, sigma = self.view.levels(start.t)
        x0 = expand(alpha, flow) * start.x - expand(sigma, flow) * flow
        adversarial, more = self.adversary.student_loss(batch, x0, start.cond)
        return loss + self.config.regulariser.weight * adversarial, {**logs, **more}

    def heads_loss(self, batch: Batch) -> Loss:
        """The heads' step, on fresh samples made as those the student is judged by."""
        assert self.adversary is not None
        start = self.start(batch)
        with torch.no_grad():
            fake = self.judged(batch, start)
        return self.adversary.heads_loss(batch, start.x0, fake, start.cond)

    def start(self, batch: Batch) -> Start:
        x0, config, cond = batch.x0, self.config, condition_of(batch, self.student, self.config.null_share)
        eps, t = batch.normal("eps", x0.shape[1:]), self.angle(batch, "tau")
        told, w = cond, None
        if self.told_guidance:
            values = torch.tensor(config.guidance, dtype=t.dtype, device=t.device)
            w = values[batch.integers("guidance", len(values))]
            told = {**(cond or {}), GUIDANCE: w}
        return Start(x0, eps, t, self.view.mix(x0, eps, t), cond, told, w)

    def angle(self, batch: Batch, tag: str) -> Tensor:
        """t of the proposal, moved into what the networks know, [B]."""
        return draw_angle(batch, tag, (self.config.p_mean, self.config.p_std, self.config.sd), self.within)

    @torch.no_grad()
    def velocity(self, start: Start) -> Tensor:
        """v = dy/dt, [B, ...]: the teacher's, guided, or that of the drawn pair."""
        pair = Pair(start.x0, start.eps)
        if self.config.velocity == "teacher":
            assert self.teacher is not None  # see __init__
            w = self.config.guidance if start.w is None else start.w
            pair = self.teacher(start.x, start.t, start.cond, guidance=w, on=self.view)
        return self.output.from_pair(pair, *self.view.levels(start.t))

    def flow(self, student: Denoiser, told: Cond) -> Callable[[Tensor, Tensor], Tensor]:
        """F as a function of x [B, ...] and t [B], the condition held fast."""

        def flow(x: Tensor, t: Tensor) -> Tensor:
            return self.output.from_pair(student(x, t, told, on=self.view), *self.view.levels(t))

        return flow

    def direction(self, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """What x and t are moved along, c s (d v, 1): its factor c s goes into D, which stays finite at both ends."""
        slow = t.cos() * t.sin()
        return expand(slow * self.view.sd, velocity) * velocity, slow

    def tangent(self, student: Denoiser, start: Start, r: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(F with gradient, g without, figures), g before it is normed."""
        velocity = self.velocity(start)
        along = self.direction(start.t, velocity)
        flow, derivative = value_and_tangent(self.flow(student, start.told), (start.x, start.t), along, self.config.jvp)
        g = self.config.sd * step_back(flow.detach(), velocity, derivative, start.x / self.view.sd, start.t, r)
        size = (sumsq(g) / g[0].numel()).sqrt().mean()
        return flow, g, {"tangent": size, "derivative": (sumsq(derivative) / g[0].numel()).sqrt().mean()}

    def judged(self, batch: Batch, start: Start) -> Tensor:
        """Samples for the heads, [B, ...]: the student's answer at drawn angles, and from noise alone."""
        x, t = start.x, start.t
        if share := self.config.regulariser.max_time:
            noise, t = batch.normal("judged/eps", x.shape[1:]), self.angle(batch, "judged/tau")
            last, alone = first_states(self.view, self.spec, noise)
            first = batch.uniform("judged/first") < share
            x = torch.where(expand(first, x), alone, self.view.mix(start.x0, noise, t))
            t = torch.where(first, last, t)
        return self.student(x, t, start.told, on=self.view).x0

    def _apart(self, batch: Batch, start: Start, first: Loss) -> Iterator[Loss]:
        """sCM's loss, then the adversary's: each is back-propagated before the next is computed."""
        assert self.adversary is not None
        yield first
        loss, logs = self.adversary.student_loss(batch, self.judged(batch, start), start.cond)
        yield self.config.regulariser.weight * loss, logs

    def sampler(self) -> SamplerSpec:
        config = self.config
        usual = sorted(config.guidance)[len(config.guidance) // 2] if self.told_guidance else None
        follows = config.velocity == "teacher" or None
        return few_step_spec(self.student, self.view, config.steps, config.middle, follows=follows, guidance=usual)

    @torch.no_grad()
    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """Root mean square of the whole tangent g, which is 0 for an exact student: the loss itself does not fall."""
        return {"tangent": float(self.tangent(student, self.start(batch), 1.0)[2]["tangent"])}

    @property
    def told_guidance(self) -> bool:
        """Whether the student takes the guidance weight as an input."""
        return isinstance(self.config.guidance, tuple)

    def _refuse_guidance(self) -> None:
        """Guidance that nothing would follow, or nothing could learn."""
        config, teacher = self.config, self.teacher
        asked = config.guidance if teacher is None or config.guidance is not None else teacher.guidance
        if asked is None:
            return
        if config.velocity == "data" or teacher is None:
            raise UserError(f"guidance={asked}: with method.velocity=data no teacher is followed; leave it off")
        if not teacher.denoiser.has_null:
            raise UserError(f"method.guidance={asked}: the teacher has no null condition; leave it off")
        if self.told_guidance and any(not p.requires_grad for p in self.student.parameters()):
            raise UserError(
                "method.guidance: a new input for it cannot be trained under student.lora, which saves adapters alone; "
                "give one number, which is baked in"
            )


def step_back(flow: Tensor, velocity: Tensor, derivative: Tensor, y: Tensor, t: Tensor, r: float) -> Tensor:
    """-c^2 (F - v) - r (c s y + D), all [B, ...] in units of the data's deviation, t [B]: c df/dt at r = 1."""
    c, s = expand(t.cos(), y), expand(t.sin(), y)
    return -c.square() * (flow - velocity) - r * (c * s * y + derivative)


def ramp(config: TangentConfig, step: int) -> float:
    """r, from 0 to 1 in the first H steps."""
    return min(1.0, step / config.warmup) if config.warmup else 1.0


def normed(config: TangentConfig, g: Tensor) -> Tensor:
    """g / (|g| + constant), sample by sample."""
    norm = sumsq(g).sqrt()
    if config.norm == "rms":
        norm = norm / g[0].numel() ** 0.5
    return g / expand(norm + config.constant, g)


def weighted(config: WeightConfig, sd: float, error: Tensor, u: Tensor, start: Start) -> Tensor:
    """w e^-u error + u, [B], of the mean squared error of each sample, [B]."""
    if config.prior:
        error = error / (sd * start.t.tan())
    if config.per_coordinate:
        error = error / start.x[0].numel()
    return error * (-u).exp() + u
