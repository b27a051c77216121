"""Latent consistency: a text teacher's guided ODE in 1 to 8 steps (2310.04378), whole or as a LoRA (2311.05556).

    z_t = alpha x0 + sigma eps,  t one of n = 50 DDIM points,  t' = t - k,  k = T / n       k-step skipping
    z'  = guided DDIM step of the teacher, t -> t'      both x0 and eps guided, w ~ U[w_min, w_max] for each sample
    f(z, t) = c_skip z + c_out x0(z, t, c, w)           s = 10 t, c_skip = sd^2 / (s^2 + sd^2), c_out = s / hypot(s, sd)
    L = E d(f(z_t, t), sg f-(z', t'))                   d = sqrt(e^2 + c^2) - c for each coordinate, or e^2

w is LCM's: the usual weight of guidance is 1 + w. A student trained whole is told it, and f- is its slow copy. Under a
LoRA, which no new input can be part of, the student is not told: guidance is averaged into its weights, and f- is the
student itself. At t' = 0, the table's first level, f-(z', 0) = z' whatever the network says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.cond import Cond
from fastgen.denoiser import GUIDANCE, Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, wide
from fastgen.paths import VP
from fastgen.samplers import few_step, ode
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Average, Batch, Loss, Method, Turn

SOLVED = 10  # DDIM steps of the teacher's own end point, which previews compare the student's single step with


class Lcm(Method):
    """Networks: the student, which starts as the teacher. Frozen: the teacher. Slow: the target of a student trained
    whole. Data: captioned images."""

    class Config(Method.Config):
        """w_min, w_max and w are LCM's weights, the usual ones less 1; w is what the student is sampled with."""

        name: Literal["lcm"] = "lcm"
        w_min: float = Field(default=5.0, ge=0)
        w_max: float = Field(default=15.0, ge=0)
        w: float = Field(default=7.5, ge=0)
        num_ddim_timesteps: int = Field(default=50, ge=2)
        loss: Literal["huber", "l2"] = "huber"
        huber_c: float = Field(default=0.001, gt=0)
        target_decay: float = Field(default=0.95, ge=0, lt=1)
        timestep_scaling: float = Field(default=10.0, gt=0)
        sigma_data: float = Field(default=0.5, gt=0)
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4, 8), min_length=1)

        @model_validator(mode="after")
        def _ordered(self) -> Lcm.Config:
            if self.w_max < self.w_min:
                raise ValueError(f"w_max={self.w_max:g} lies below w_min={self.w_min:g}")
            if max(self.steps) > self.num_ddim_timesteps:
                raise ValueError(f"steps={max(self.steps)} of num_ddim_timesteps={self.num_ddim_timesteps} points")
            return self

    experimental = "learning is seen on a tiny U-Net alone; never run on a published checkpoint"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.needs = frozenset({"x0", "cond.text"})
        self._refuse()
        # Adapters hold no new input, and their frozen base needs no slow copy.
        self.told = all(p.requires_grad for p in self.student.parameters())
        if self.told:
            self.student.add_guidance()
            self.averages = {"target": Average(of="student", decay=self.config.target_decay)}
        self.spec = self.sampler()

    def _refuse(self) -> None:
        path, points = self.student.path, self.config.num_ddim_timesteps
        if self.teacher is None:
            raise UserError("method lcm follows a guided teacher: set teacher=PATH")
        if not isinstance(path, VP):
            raise UserError(
                f"method lcm: its DDIM points are indices of a VP table; this student is on {type(path).__name__}"
            )
        truth = self.teacher.denoiser
        if truth.num_classes is not None or self.student.num_classes is not None or not truth.has_null:
            raise UserError("method lcm: teacher and student must read text, and the teacher the empty prompt too")
        if truth.takes_guidance:
            raise UserError(
                "method lcm: this teacher takes guidance as an input: somebody's student already, no teacher"
            )
        if self.teacher.guidance is not None:
            raise UserError(
                f"guidance={self.teacher.guidance:g}: method lcm draws the teacher's from method.w_min .. w_max; "
                "leave it off"
            )
        if path.n % points:
            raise UserError(f"method.num_ddim_timesteps={points} does not divide the table's {path.n} levels")

    @property
    def table(self) -> VP:
        path = self.student.path
        assert isinstance(path, VP)  # see _refuse
        return path

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        config = self.config
        t, earlier = self.times(batch)
        w = self.weights(batch)
        cond = self.conditions(batch.cond, w)
        x0 = batch.x0
        z = self.table.mix(x0, batch.normal("noise", x0.shape[1:]), t)
        target = self.target(z, t, earlier, batch.cond, w)
        error = self.consistent(self.student, z, t, cond) - target
        logs = {"consistency_rmse": error.detach().square().mean().sqrt()}
        if config.loss == "l2":
            return error.square().mean(), logs
        c = config.huber_c
        return (torch.sqrt(error.square() + c * c) - c).mean(), logs

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, earlier: Tensor, cond: Cond, w: Tensor) -> Tensor:
        """f- at the end of the teacher's step, from z [B, ...] at t [B] to the time `earlier` [B], guided by w [B]."""
        network = self.slow["target"] if self.told else self.student
        return self.consistent(network, self.skip(z, t, earlier, cond, w), earlier, self.conditions(cond, w))

    def skip(self, z: Tensor, t: Tensor, earlier: Tensor, cond: Cond, w: Tensor) -> Tensor:
        """One guided DDIM step of the teacher, k levels at once: [B, ...]."""
        assert self.teacher is not None  # see _refuse
        path = self.table
        return self.teacher(z, t, cond, guidance=1 + w, on=path).at(*path.levels(earlier))

    def consistent(self, network: Denoiser, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(z, t), [B, ...]."""
        skip, out = boundary(t, self.config.timestep_scaling, self.config.sigma_data)
        return expand(skip, z) * z + expand(out, z) * network(z, t, cond, on=self.table).x0

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, t'), [B] each: a DDIM point, and k levels earlier or the first level."""
        points, earlier = ddim_points(self.table, self.config.num_ddim_timesteps)
        index, like = batch.integers("index", len(points)), wide(batch["x0"])
        return points.to(like)[index], earlier.to(like)[index]

    def weights(self, batch: Batch) -> Tensor:
        """LCM's w of each sample, [B]."""
        return self.config.w_min + (self.config.w_max - self.config.w_min) * batch.uniform("w")

    def conditions(self, cond: Cond, w: Tensor) -> Cond:
        """What student and target are given: the text and, where they take it, the usual weight 1 + w."""
        return {**(cond or {}), GUIDANCE: 1 + w} if self.told else cond

    def sampler(self) -> SamplerSpec:
        path = self.table
        points = ddim_points(path, self.config.num_ddim_timesteps)[0].tolist()
        times = {n: chosen(points, n) for n in self.config.steps}
        guidance = 1 + self.config.w if self.told else None
        return SamplerSpec(path=path, times=times, renoise=True, guidance=guidance, init=path.init)

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """teacher_gap: RMSE of one step to the teacher's guided end point from the same noise. guidance_effect: by how
        much (RMS) that step differs between w_min and w_max; 0 if the student has not learnt to listen."""
        assert self.teacher is not None
        z, cond = batch.normal("diagnose", student.shape), batch.cond
        one = min(self.config.steps)
        w = torch.full((len(z),), self.config.w, device=z.device)
        end = ode.solve(self.teacher, z, steps=SOLVED, solver="euler", cond=cond, guidance=1 + w)

        def drawn(weight: float) -> Tensor:
            given = self.conditions(cond, torch.full_like(w, weight))
            return few_step.sample(
                student, self.spec, z, one, given, renoise=lambda i: batch.normal("fresh", z.shape[1:], i)
            )

        gap = drawn(self.config.w) - end
        figures = {"teacher_gap": float(gap.square().mean().sqrt())}
        if self.told:
            effect = drawn(self.config.w_max) - drawn(self.config.w_min)
            figures["guidance_effect"] = float(effect.square().mean().sqrt())
        return figures


def ddim_points(path: VP, n: int) -> tuple[Tensor, Tensor]:
    """(t, t'), float32 [n] each, rising: k (j + 1) - 1 with k = T / n, and k levels earlier, none below the first."""
    k = path.n // n
    points = torch.arange(1, n + 1, dtype=torch.float32) * k - 1
    return points, (points - k).clamp_min(0)


def boundary(t: Tensor, scaling: float, sd: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out [B] at times t [B]: 1 and 0 at the first level (2310.04378, appendix C; LCMScheduler's)."""
    scaled = scaling * t
    return sd**2 / (scaled**2 + sd**2), scaled / (scaled**2 + sd**2).sqrt()


def chosen(points: list[float], n: int) -> tuple[float, ...]:
    """The n times of a run, falling: evenly spaced places in the list, rounded down, as LCMScheduler counts them."""
    down = points[::-1]
    return tuple(down[i * len(down) // n] for i in range(n))
