"""Marginal-data transport: a network learns the average velocity down to the data; both stages of TRELLIS (2509.04406).

    x_t = (1 - t) x0 + sigma(t) z,   sigma(t) = s + (1 - s) t,   v_T = (1 + w) v(x_t | c) - w v(x_t | null)
    t phi(x_t, t) = int_0^t v_T dtau,   so phi + t dphi/dt = v_T   and one step is x0 = z - phi(z, 1)

    VM   L = |phi - sg(v_T - t g)|^2,   g = dphi/dt along (v_T, 1)                           velocity matching
    VD   x' = z' - f, f = phi(z', 1);   L = |sg(phi - (v_T - t g)) + f - sg f|^2 at x'_t     velocity distillation

g is a backward difference over `distill_interval` (discrete) or exact (continuous); with d_norm it is g / (|g| + 0.1),
|g| of a whole sample. u = phi + t g stands for the velocity of the student's own samples, so VD moves x' by u - v_T,
towards the teacher's clean sample, with no critic. Both losses run from the first step. It is MeanFlow with r = 0 and
no second time: the student has its teacher's inputs, and its weights at first, and loads where the teacher loads.

    distill_type: cm     the baseline instead: |x_t - (t - T) phi - sg(x- - (t- - T) phi-)|^2, T the phase's lower end

Defaults are those of the released configs. The paper's algorithm 1 is another: t_schedule: {kind: uniform}, d_norm:
false, share_noise: false (VD noises x' anew), vd_one_minus_t: true (its gradient has the factor dx'_t / dx'). With
d_norm the exact phi is no fixed point, and at 40 / 100 a run is stopped long before one: it is the lr of 4e-8 that
regulates it. A longer interval, which a small network fits sooner, asks for what the released code can do without:
t_min, or the band below the interval is never trained; exact_difference, or the fixed point falls short of v's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen import cond as conditions
from fastgen import jvp
from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.jvp import JvpConfig
from fastgen.layout import Samples, expand, mean, mean_all, sumsq, wide
from fastgen.paths import VP, Pair, RectifiedFlow
from fastgen.samplers import few_step, ode
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of
from fastgen.trainers.engine.times import TimesConfig
from fastgen.trainers.flow_matching import RF, last_time

TEACHER_STEPS = 25  # of Euler, in a diagnosis
DECILES = 10
Weight = Annotated[float, Field(ge=0)]
Weights = Weight | Annotated[tuple[Weight, ...], Field(min_length=1)] | None


class Point(NamedTuple):
    """Where both networks are asked: x_t [B, ...], t [B], the condition, and v_T there."""

    x: Tensor
    t: Tensor
    cond: Cond
    v: Tensor


class MDT(Method):
    """Networks: the student, which starts as the teacher. Frozen: the teacher. Data: "x0", as samples or voxels."""

    class Config(Method.Config):
        name: Literal["mdt"] = "mdt"
        distill_type: Literal["discrete", "continuous", "cm"] = "discrete"
        distill_interval: float = Field(default=0.01, ge=1e-5, lt=1)  # of t, which TRELLIS's networks see times 1000
        # Where t begins; null: at the interval, as released (continuous: at s). Below it a difference ends at s: of a
        # long interval's band nothing else would be trained, and phi there is what all later times are built on.
        t_min: float | None = Field(default=None, ge=1e-4, lt=1)  # float32 tells t from s
        # v - t- g in place of v - t g: the product rule of differences, whose fixed point is the mean of an Euler path.
        exact_difference: bool = False
        multiphase: int = Field(default=1, ge=1)  # cm: how many phases of equal length
        lambda_vm: float = Field(default=1.0, ge=0)
        lambda_vd: float = Field(default=1.0, ge=0)
        # w of (1 + w) v - w null, so 1 + w is the usual guidance; of several each row draws one; 0, null: none.
        cfg_vm: Weights = 40.0
        cfg_vd: Weights = 100.0
        d_norm: bool = True
        norm_const: float = Field(default=0.1, gt=0)
        norm: Literal["l2", "rms"] = "l2"  # rms: |g| over the root of the number of coordinates
        t_schedule: TimesConfig = TimesConfig()
        share_noise: bool = True
        vd_one_minus_t: bool = False
        velocity: Literal["teacher", "data"] = "teacher"  # data: (1 - s) z - x0 in place of a teacher's
        p_uncond: float = Field(default=0.0, ge=0, lt=1)  # share of rows without condition; needs cfg_vm = cfg_vd = 0
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
        sampler: Literal["euler", "renoise"] = "euler"  # as published, or fresh noise between the steps
        rescale_t: float = Field(default=3.0, ge=1e-3, le=1e3)  # spacing of the steps: TRELLIS's own
        jvp: JvpConfig = JvpConfig()  # of continuous

        @model_validator(mode="after")
        def _means_something(self) -> MDT.Config:
            kind = self.distill_type
            if not self.lambda_vm and not self.lambda_vd:
                raise ValueError("lambda_vm and lambda_vd are both 0: nothing would be trained")
            if kind == "cm" and self.lambda_vd:
                raise ValueError("distill_type=cm compares samples, not velocities, so it has no VD: set lambda_vd=0")
            if kind != "cm" and self.multiphase != 1:
                raise ValueError(f"multiphase={self.multiphase} belongs to distill_type=cm")
            if kind != "discrete" and self.exact_difference:
                raise ValueError(f"exact_difference belongs to distill_type=discrete, not to {kind}")
            if kind != "continuous" and self.jvp != JvpConfig():
                raise ValueError(f"jvp belongs to distill_type=continuous, not to {kind}")
            if not self.lambda_vd and (not self.share_noise or self.vd_one_minus_t):
                raise ValueError("share_noise and vd_one_minus_t are VD's, and lambda_vd is 0")
            if self.p_uncond and (_guides(self.cfg_vm) or _guides(self.cfg_vd)):
                raise ValueError(
                    f"p_uncond={self.p_uncond:g} with guidance: rows without condition would be taught the guided "
                    "velocity; set cfg_vm=0 and cfg_vd=0, or p_uncond=0"
                )
            return self

    precisions = ("fp32", "fp16")  # of a difference over 0.01 bfloat16 leaves less than one digit

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refuse()
        self._refuse_other_network()
        self.needs = needs_of(self.student)

    def _refuse(self) -> None:
        config, student, teacher = self.config, self.student, self.teacher
        if config.velocity == "teacher" and teacher is None:
            raise UserError("method mdt follows a teacher's velocity: set teacher=PATH, or method.velocity=data")
        if config.velocity == "data" and teacher is not None:
            raise UserError("method.velocity=data never asks a teacher: leave the stage's `teacher` out")
        if teacher is not None and teacher.guidance is not None:
            raise UserError(
                f"guidance={teacher.guidance:g}: mdt's weights are method.cfg_vm and method.cfg_vd, 1 less than the "
                "usual ones; set those and leave guidance out"
            )
        for loss in ("vm", "vd"):
            key, w = f"cfg_{loss}", getattr(config, f"cfg_{loss}")
            if getattr(config, f"lambda_{loss}") and _guides(w) and (teacher is None or not teacher.denoiser.has_null):
                why = "no teacher is asked" if teacher is None else f"the teacher has {teacher.denoiser.no_null}"
                raise UserError(f"method.{key}={w}: {why}; set it to 0")
        if self.first_time >= self.last_time:
            raise UserError(
                f"t begins at {self.first_time:g}, and the student's path ends at {self.last_time:.3g}: lower "
                "method.t_min or method.distill_interval"
            )
        narrow = {p.dtype for p in student.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
        if narrow:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
            raise UserError(
                f"the student's weights are {names}: MDT moves a weight by 1e-4 or less, and near 0.03 numbers of "
                "bfloat16 lie 1.2e-4 apart, of float16 1.5e-5; train float32 weights (loop.precision=fp16 keeps them)"
            )

    def _refuse_other_network(self) -> None:
        """A student of the teacher's class with other arguments could not start as the teacher, nor stand in for it."""
        if self.teacher is None:
            return
        ours, theirs = (getattr(d.net, "args", None) for d in (self.student, self.teacher.denoiser))
        if ours is None or theirs is None or type(ours) is not type(theirs):
            return
        for key, value in dict(theirs).items():
            if key not in ("use_fp16", "use_checkpoint") and getattr(ours, key) != value:
                raise UserError(
                    f"teacher and student are of different configs: {key} is {value} and {getattr(ours, key)}; "
                    "init the student from the teacher"
                )

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    @cached_property
    def view(self) -> RectifiedFlow:
        """The path that x_t lies on: the network's own, with its s, or a rectified flow with s = 0."""
        return self.student.path if isinstance(self.student.path, RectifiedFlow) else RF

    @cached_property
    def last_time(self) -> float:
        """Where the student's runs begin: 1, or less where its own path ends before pure noise."""
        return last_time(self.student.path)

    @cached_property
    def first_time(self) -> float:
        """Where t begins: at s + `t_min`; null: at s, or for a difference at s + `distill_interval`."""
        released = 0.0 if self.config.distill_type == "continuous" else self.config.distill_interval
        return self.view.sigma_min + (released if self.config.t_min is None else self.config.t_min)

    def begin(self, batch: Batch) -> None:
        """Try the derivative half-way."""
        if self.config.distill_type == "continuous":
            x = batch.normal_like("begin", batch.x0)
            t = torch.full_like(batch.uniform("t"), self.last_time / 2)
            tangents = (batch.normal_like("begin/velocity", x), torch.ones_like(t))
            jvp.check(self.average_velocity(self.condition(batch)), (x, t), tangents, self.config.jvp, self.student)

    def loss(self, batch: Batch) -> Iterator[Loss]:
        """VM, then VD: two parts, so that one graph is kept at a time."""
        config, x0, t, cond = self.config, batch.x0, self.times(batch), self.condition(batch)
        z = batch.normal_like("noise", x0)
        if config.lambda_vm:
            prediction, aim = self.target(self.point(batch, "cfg_vm", x0, z, t, cond))
            error = (prediction - aim).square()
            yield config.lambda_vm * mean_all(error), {"loss_vm": mean_all(error), **by_time("vm", error, t)}
        if config.lambda_vd:
            f, made = self.generated(batch, x0, cond)
            z = z if config.share_noise else batch.normal_like("noise/vd", x0)
            with torch.no_grad():
                prediction, aim = self.target(self.point(batch, "cfg_vd", made, z, t, cond))
            factor = expand(1 - t, x0) if config.vd_one_minus_t else 1.0
            error = vd_error(prediction - aim, f, factor)
            yield config.lambda_vd * mean_all(error), {"loss_vd": mean_all(error), **by_time("vd", error, t)}

    def times(self, batch: Batch) -> Tensor:
        """t [B], from `first_time` to `last_time`."""
        return self.first_time + (self.last_time - self.first_time) * self.config.t_schedule.draw(batch)

    def condition(self, batch: Batch) -> Cond:
        """The batch's own; some rows without."""
        cond, share = batch.cond, self.config.p_uncond
        if self.student.num_classes is None:
            cond = {name: value for name, value in (cond or {}).items() if name != "label"} or None
        if cond is None or not share:
            return cond
        return conditions.replace(cond, self.student.unconditional(cond), batch.uniform("drop") < share)

    def average_velocity(self, cond: Cond) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_t, t) -> phi, [B, ...]."""
        return lambda x, t: self.velocity_of(self.student(x, t, cond, on=self.view))

    def velocity_of(self, pair: Pair) -> Tensor:
        """dx/dt along the view: (1 - s) eps - x0."""
        return (1 - self.view.sigma_min) * pair.eps - pair.x0

    @torch.no_grad()
    def point(self, batch: Batch, key: str, x0: Tensor, z: Tensor, t: Tensor, cond: Cond) -> Point:
        """Clean samples noised, and the teacher's velocity, guided as `key` (cfg_vm, cfg_vd) says."""
        x = self.view.mix(x0, z, t)
        if self.teacher is None:
            return Point(x, t, cond, self.velocity_of(Pair(x0, z)))
        guidance = self.guidance(batch, key)
        return Point(x, t, cond, self.velocity_of(self.teacher(x, t, cond, guidance=guidance, on=self.view)))

    def guidance(self, batch: Batch, key: str) -> Tensor | float | None:
        """1 + w, of a list one entry per row (the released code draws one per batch); None where none guides."""
        w = getattr(self.config, key)
        if not _guides(w):
            return None
        if not isinstance(w, tuple):
            return 1 + w
        return 1 + torch.tensor(w, device=batch.rows.device)[batch.integers(key, len(w))]

    def target(self, at: Point) -> tuple[Tensor, Tensor]:
        """(prediction with its gradient, target without), [B, ...] each: phi and v_T - t g, or cm's two samples."""
        if self.config.distill_type == "cm":
            return self.consistency(at)
        phi, slope = self.continuous(at) if self.config.distill_type == "continuous" else self.discrete(at)
        if self.config.d_norm:
            slope = normalised(slope, self.config.norm_const, self.config.norm)
        t = at.t - self.interval(at.t) if self.config.exact_difference else at.t
        return phi, (at.v - expand(t, slope) * slope).detach()

    def continuous(self, at: Point) -> tuple[Tensor, Tensor]:
        """phi and g, the derivative along the teacher's trajectory."""
        primals, tangents = (at.x, at.t), (at.v, torch.ones_like(at.t))
        return jvp.value_and_tangent(self.average_velocity(at.cond), primals, tangents, self.config.jvp)

    def discrete(self, at: Point) -> tuple[Tensor, Tensor]:
        """phi and g, a difference to a point earlier on the teacher's trajectory; both in float32 at least."""
        phi = self.average_velocity(at.cond)(at.x, at.t)
        _, _, before = self.earlier(at)
        return phi, (phi.detach() - before) / expand(self.interval(at.t), phi)

    def consistency(self, at: Point) -> tuple[Tensor, Tensor]:
        """The samples at the phase's lower end T, as phi sees them from t and from a step earlier."""
        phi = self.average_velocity(at.cond)(at.x, at.t)
        x, t, before = self.earlier(at)
        phases = self.config.multiphase
        end = (t * phases).floor() / phases
        return at.x - expand(at.t - end, phi) * phi, x - expand(t - end, x) * before

    def interval(self, t: Tensor) -> Tensor:
        """[B]: `distill_interval`, or what is left of t above s."""
        return (t - self.view.sigma_min).clamp(max=self.config.distill_interval)

    @torch.no_grad()
    def earlier(self, at: Point) -> tuple[Tensor, Tensor, Tensor]:
        """(x-, t-, phi-): one interval down the teacher's trajectory."""
        step = self.interval(at.t)
        x, t = wide(at.x) - expand(step, at.v) * at.v, at.t - step
        before = self.average_velocity(at.cond)(x, t)
        torch.clear_autocast_cache()  # it holds half-precision weights made just now, without a way back to their own
        return x, t, before

    def generated(self, batch: Batch, like: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """f = phi(z', T) with its gradient and x' = x_T - T f without one, from noise of its own."""
        x = few_step.initial(self.spec, batch.normal_like("generator", like), min(self.config.steps))
        f = self.average_velocity(cond)(x, few_step.times_of(x, self.last_time))
        return f, (x - self.last_time * f).detach()

    @cached_property
    def spec(self) -> SamplerSpec:
        return self.sampler()

    def sampler(self) -> SamplerSpec:
        """phi is the average down to 0: a partial step with it (euler) leaves the trajectory, fresh noise does not."""
        times = {n: self.grid(n) for n in self.config.steps}
        renoise, init = self.config.sampler == "renoise", self.student.path.init
        return SamplerSpec(path=self.view, times=times, renoise=renoise, follows=True, init=init)

    def grid(self, n: int) -> tuple[float, ...]:
        """Times of n steps: TRELLIS's, or of a table of levels its own even ones, which stock schedulers visit."""
        own = self.student.path
        if isinstance(own, VP):
            return tuple(self.view.time(*own.levels(torch.tensor(own.grid(n), dtype=torch.float64))).tolist())
        return tuple(self.last_time * t for t in FlowEuler(steps=n, rescale_t=self.config.rescale_t).times())

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """From fixed noises: how far one step ends from the teacher's end point (`teacher_gap`)."""
        if self.teacher is None:
            return {}
        z, cond, few = batch.normal_like("diagnose", batch.x0), self.condition(batch), min(self.config.steps)
        renoise = lambda i: batch.normal_like("diagnose/renoise", z, i)  # noqa: E731
        end = few_step.sample(student, self.spec, z, few, cond, renoise=renoise)
        guidance = self.guidance(batch, "cfg_vm" if self.config.lambda_vm else "cfg_vd")
        aim = ode.solve(self.teacher, z, steps=TEACHER_STEPS, solver="euler", cond=cond, guidance=guidance)
        return {"teacher_gap": float(mean_all((end - aim).square()).sqrt())}


def normalised(slope: Samples, constant: float, norm: str) -> Samples:
    """g / (|g| + constant), |g| over all coordinates of a sample (all voxels and channels)."""
    size = (mean(slope.square()) if norm == "rms" else sumsq(slope)).sqrt()
    return slope / expand(size + constant, slope)


def vd_error(gap: Samples, f: Samples, factor: Tensor | float = 1.0) -> Samples:
    """(sg(gap) + k (f - sg f))^2: of the value gap^2, with the gradient 2 k gap on f; gap = u - v_T."""
    return (gap.detach() + factor * (f - f.detach())).square()


def by_time(name: str, error: Samples, t: Tensor) -> dict[str, Tensor]:
    """Mean error of the rows with t in each tenth of [0, 1]; NaN where there is none."""
    each, place = mean(error.detach()), (t * DECILES).long().clamp(0, DECILES - 1)
    return {f"{name}/d{i}": each[place == i].mean() for i in range(DECILES)}


def _guides(w: float | tuple[float, ...] | None) -> bool:
    return w is not None and bool(max(w) if isinstance(w, tuple) else w)
