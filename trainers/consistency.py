"""Consistency models: iCT (2310.14189), ECT (2406.14548), CD (2303.01469) and the second stage of TCM (2410.14895).

    x_hi = x0 + s_hi z,   x_lo = x0 + s_lo z  (from data)   or   one step of the teacher's ODE from x_hi  (distillation)
    L = E lambda d(f(x_hi, s_hi), sg f(x_lo, s_lo))         f(x, s) is x itself at the lowest level

f is where the probability-flow ODE takes x: the student's x0. All levels are those of x0 + s z, on which any network
answers by its own path: an eps or v network from its table's first level to its last, a rectified flow from s_min to
s_max. The target is the student itself, without gradient and with the same dropout masks; a slow target is CD's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from fastgen import cond as conditions
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, finite, sumsq
from fastgen.paths import EDM, VP
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.averages import slow_copy
from fastgen.trainers.engine.discretisation import GridConfig, TimesConfig, Weighting, huber_c, weights
from fastgen.trainers.engine.fake_score import VIEW, kept_mean
from fastgen.trainers.engine.levels import reach
from fastgen.trainers.engine.method import Average, Batch, Loss, Method, Turn, needs_of

DECILES = 10
AT_END = 1 + 1e-9  # the lowest level of a grid comes back from rho-th powers
BEYOND = 1e-8  # how far above t' the boundary rows of TCM lie
SIDE, SMALL = 224, 256  # LPIPS looks at images of 224 pixels a side where they have less than 256 (CM's code)


class TruncationConfig(Model):
    """TCM's second stage: below t' a frozen copy of the first stage's student answers, from t' on the new one.

    share   of the rows that lie at t' + 1e-8, where the target is the frozen copy's
    weight  of their mean loss beside the others'
    """

    t_prime: float = Field(default=1.0, gt=0)
    share: float = Field(default=0.25, ge=0, lt=1)
    weight: float = Field(default=0.1, ge=0)


# What a kind is, where its config does not say otherwise; a setting that is not here has no meaning for it.
KINDS: dict[str, dict[str, Any]] = {
    "ict": {"grid": {}, "weighting": "inv_ds", "huber_c": "auto"},
    "ect": {"times": {}, "weighting": "inv_ds", "huber_c": 0.0},
    "cd": {"grid": {"n": 18, "bins": "uniform"}, "weighting": "one", "huber_c": "auto", "solver": "heun"},
    "tcm": {
        "times": {"law": "log_student_t", "p_mean": 0.0, "p_std": 0.2, "q": 256.0},
        "truncation": {},
        "weighting": "inv_ds",
        "huber_c": 0.0,
    },
}
FOREIGN = {
    "grid": ("ict", "cd"),
    "times": ("ect", "tcm"),
    "truncation": ("tcm",),
    "solver": ("cd", "ect"),
    "guidance": ("cd", "ect"),
    "mu": ("cd",),
}


class Consistency(Method):
    """Networks: the student. Frozen: the teacher where a solver is set, TCM's first stage. Data: images or points."""

    class Config(Method.Config):
        name: Literal["consistency"] = "consistency"
        kind: Literal["ict", "ect", "cd", "tcm"]
        s_min: float = Field(default=0.002, gt=0)  # both cut at the ends of the student's own path
        s_max: float = Field(default=80.0, gt=0)
        grid: GridConfig | None = None
        times: TimesConfig | None = None
        truncation: TruncationConfig | None = None
        distance: Literal["huber", "l2", "lpips"] = "huber"
        huber_c: float | Literal["auto"] | None = None  # "auto": 0.00054 sqrt(D); 0: the norm itself
        weighting: Weighting = "inv_ds"
        solver: Literal["euler", "heun"] | None = None  # x_lo by a step of the teacher's; None: from the data
        guidance: float | None = None  # of the teacher; None: the teacher's own
        mu: float | None = Field(default=None, gt=0, lt=1)  # the target is an average with this decay
        null_share: float = Field(default=0.1, ge=0, le=1)  # of a class-conditional student's rows, without a label
        mid: float | None = Field(default=None, gt=0)  # the level of a second step; None: one step only

        @model_validator(mode="before")
        @classmethod
        def _defaults(cls, data: Any) -> Any:
            """The kind's own values in place of what is not said, one level deep."""
            if not isinstance(data, dict) or data.get("kind") not in KINDS:
                return data
            own = dict(data)
            for key, value in KINDS[data["kind"]].items():
                if key == "huber_c" and own.get("distance", "huber") != "huber":
                    continue
                if own.get(key) is None:
                    own[key] = value
                elif isinstance(value, dict) and isinstance(own[key], dict):
                    own[key] = {**value, **own[key]}
            return own

        @model_validator(mode="after")
        def _means_something(self) -> Consistency.Config:
            for key, kinds in FOREIGN.items():
                if getattr(self, key) is not None and self.kind not in kinds:
                    raise ValueError(f"{key} has no meaning for kind={self.kind} (it is for {', '.join(kinds)})")
            if self.guidance is not None and self.solver is None:
                raise ValueError(f"guidance={self.guidance:g} is the teacher's, which is not asked: set solver")
            if self.s_min >= self.s_max:
                raise ValueError(f"s_min={self.s_min:g} must lie below s_max={self.s_max:g}")
            if self.huber_c is not None and self.distance != "huber":
                raise ValueError(f"huber_c={self.huber_c} has no meaning for distance={self.distance}")
            if isinstance(self.huber_c, float) and self.huber_c < 0:
                raise ValueError(f"huber_c={self.huber_c:g} is negative")
            return self

    experimental = "TCM has no measured row"
    precisions = ("fp32",)  # between two levels 4e-5 apart the difference of bf16 outputs is rounding noise

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.needs = needs_of(self.student)
        self._check_teacher()
        self.low, self.high = self._range()
        if self.config.distance == "lpips" and self.distance is None:
            raise UserError("method.distance=lpips needs LPIPS weights: set lpips.trunk and lpips.heads to local files")
        size = math.prod(self.student.shape)
        self.c = huber_c(size) if self.config.huber_c == "auto" else self.config.huber_c or 0.0
        if self.config.mu is not None:
            self.averages["target"] = Average(of="student", decay=self.config.mu)
        if self.config.truncation is not None:
            self.frozen["first"] = slow_copy(self.student)

    def _check_teacher(self) -> None:
        config, teacher = self.config, self.teacher
        if config.solver is None:
            self.frozen.pop("teacher", None)  # it may have lent its weights and its shape; it is not asked
            return
        if teacher is None:
            raise UserError(f"method consistency, kind {config.kind}: solver={config.solver} needs teacher=PATH")
        told, own = teacher.num_classes, self.student.num_classes
        if told is not None and told != own:
            raise UserError(f"method consistency: the numbers of classes differ: student {own}, teacher {told}")
        if config.guidance is not None and not teacher.denoiser.has_null:
            raise UserError(f"method.guidance={config.guidance:g}: the teacher has no null condition; leave it off")

    def _range(self) -> tuple[float, float]:
        """The levels of this run, those that the student's path reaches."""
        config, (low, high) = self.config, reach(self.student.path)
        low, high = max(config.s_min, low), min(config.s_max, high)
        if low >= high:
            raise UserError(f"method.s_min={config.s_min:g}, s_max={config.s_max:g}: none of the student's levels")
        kind = self.student.prediction
        if kind.kind == "cm" and kind.sigma_min != low:
            raise UserError(f"method.s_min={low:g}: this cm network answers with its input at {kind.sigma_min:g}")
        least = low if config.truncation is None else config.truncation.t_prime
        if not low <= least < high:
            raise UserError(f"method.truncation.t_prime={least:g} lies outside {low:g} .. {high:g}")
        if config.mid is not None and not least <= config.mid < high:
            raise UserError(f"method.mid={config.mid:g} lies outside {least:g} .. {high:g}")
        return low, high

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        lo, hi = self.levels(batch, batch.uniform("level"))
        distance, whole = self.distances(self.student, batch, lo, hi)
        weight = weights(self.config.weighting, lo, hi, self.student.prediction.sd).to(distance.dtype)
        logs: dict[str, float | Tensor] = {"levels": self.count(batch), "ds": (hi - lo).mean()}
        logs |= {"distance": kept_mean(distance.detach(), whole), "not_finite": 1 - whole.float().mean()}
        return self.mean(weight * distance, whole, batch), logs

    def mean(self, losses: Tensor, whole: Tensor, batch: Batch) -> Tensor:
        """Over the rows with a finite target, TCM's boundary rows by themselves."""
        if self.config.truncation is None:
            return kept_mean(losses, whole)
        edge, total = self.boundary(batch), losses.new_zeros(())
        for rows, weight in ((whole & ~edge, 1.0), (whole & edge, self.config.truncation.weight)):
            total = total + weight * torch.where(rows, losses, 0).sum() / rows.sum().clamp_min(1)
        return torch.where(whole.any(), total, math.nan)

    def levels(self, batch: Batch, u: Tensor) -> tuple[Tensor, Tensor]:
        """(s_lo, s_hi) of each row, float64 [B], for u uniform in (0, 1)."""
        config = self.config
        if config.grid is not None:
            n = config.grid.count(batch.step, batch.steps)
            return config.grid.draw(u, config.grid.levels(n, self.low, self.high))
        assert config.times is not None  # see Config
        if config.truncation is None:
            t = config.times.quantile(u, self.low, self.high)
        else:
            first = config.truncation.t_prime
            t = config.times.quantile(u, first, self.high)
            t = torch.where(self.boundary(batch), first + BEYOND, t)
            if not t.is_meta and bool((t < first).all()):  # memory is planned for with shapes alone
                raise ValueError(f"every level lies below t'={first:g}, where the frozen copy answers")
        return config.times.pair(t, config.times.ratio(batch.step))

    def boundary(self, batch: Batch) -> Tensor:
        """Which rows lie at t' in TCM, by their number: exactly the share of any whole batch."""
        assert self.config.truncation is not None
        share, rows = self.config.truncation.share, batch.rows.double()
        return ((rows + 1) * share).floor() > (rows * share).floor()

    def count(self, batch: Batch) -> float:
        """N, or for continuous levels 1 / (1 - r / t)."""
        config = self.config
        if config.grid is not None:
            return config.grid.count(batch.step, batch.steps)
        assert config.times is not None
        return 1 / (1 - config.times.ratio(batch.step))

    def distances(self, student: Denoiser, batch: Batch, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """d(f(x_hi), sg f(x_lo)) of each row, unweighted, and whether its target is finite: [B] and bool [B]."""
        cond, x0 = self.condition(batch), batch.x0
        z = batch.normal("z", student.shape)
        high = x0 + expand(hi, x0) * z
        from_data = self.config.solver is None
        low = x0 + expand(lo, x0) * z if from_data else self.teacher_step(high, hi, lo, cond)
        target = self.target(student, low, lo, cond)
        found = student(high, hi, cond, on=VIEW).x0
        whole = finite(target)
        target = torch.where(expand(whole, target), target, found.detach())
        return self.compare(found, target), whole

    @torch.no_grad()
    def teacher_step(self, x: Tensor, hi: Tensor, lo: Tensor, cond: Cond) -> Tensor:
        """One step of dx / ds = (x - D) / s from s_hi to s_lo: Euler, or Heun where s_lo is above 0."""
        assert self.teacher is not None  # see _check_teacher
        ask = {"guidance": self.config.guidance, "on": VIEW}
        step, slope = expand(lo - hi, x), self.teacher(x, hi, cond, **ask).eps
        if self.config.solver == "heun":
            there = self.teacher(x + step * slope, lo, cond, **ask).eps
            slope = torch.where(expand(lo > 0, x), (slope + there) / 2, slope)
        return x + step * slope

    @torch.no_grad()
    def target(self, student: Denoiser, x: Tensor, lo: Tensor, cond: Cond) -> Tensor:
        """f(x_lo, s_lo), with the dropout masks that the student will have at x_hi."""
        network = student
        if "target" in self.slow:
            network = self.slow["target"]
            network.train(student.training)
        with same_dropout(x.device):
            answer = network(x, lo, cond, on=VIEW).x0
        if self.config.truncation is not None:
            first = self.frozen["first"](x, lo, cond, on=VIEW).x0
            answer = torch.where(expand(lo < self.config.truncation.t_prime, x), first, answer)
        # A continuous r may be 0, where x is the clean image and EDM's time -infinity.
        end = self.low * AT_END if self.config.grid is not None else 0.0
        return torch.where(expand(lo <= end, x), x, answer)

    def compare(self, found: Tensor, target: Tensor) -> Tensor:
        """The distance of two batches, [B]: summed over a sample's coordinates, or LPIPS."""
        if self.config.distance == "l2":
            return sumsq(found - target)
        if self.config.distance == "huber":
            return pseudo_huber(found - target, self.c)
        assert self.distance is not None  # see __init__
        if self.student.codec is None and max(found.shape[2:]) < SMALL:
            found, target = (functional.interpolate(v, size=(SIDE, SIDE), mode="bilinear") for v in (found, target))
        return self.distance(found, target)

    def condition(self, batch: Batch) -> Cond:
        """The rows' labels, some of them dropped, or their text; nothing for an unconditional student."""
        if self.student.num_classes is not None:
            return conditions.replace(batch.cond, self.student.null, batch.uniform("drop") < self.config.null_share)
        return {name: value for name, value in (batch.cond or {}).items() if name != "label"} or None

    def sampler(self) -> SamplerSpec:
        """From s_max on an EDM path, else from the network's own first time; fresh noise at `mid`."""
        path, mid = self.student.path, self.config.mid
        first = self.high if isinstance(path, EDM) else path.start
        times: dict[int, tuple[float, ...]] = {1: (first,)}
        if mid is not None:
            time = float(path.time(torch.ones((), dtype=torch.float64), torch.tensor(mid, dtype=torch.float64)))
            times[2] = (first, float(round(time)) if isinstance(path, VP) else time)
        follows = True if self.config.solver is not None else None
        return SamplerSpec(path=path, times=times, renoise=True, follows=follows, init=path.init)

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """The unweighted distance by decile of the levels drawn, lowest first; the low ones shrink first."""
        decile = torch.arange(len(batch), device=batch.rows.device) * DECILES // len(batch)
        lo, hi = self.levels(batch, (decile + 0.5) / DECILES)
        distance, _ = self.distances(student, batch, lo, hi)
        return {f"distance/d{i}": float(distance[decile == i].mean()) for i in decile.unique().tolist()}


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2) - c of each sample, [B], |e|^2 summed over coordinates; for c = 0 the norm, with gradient 0
    at 0."""
    if c == 0:
        return torch.linalg.vector_norm(error.flatten(1), dim=1)
    square = sumsq(error)
    return square / ((square + c * c).sqrt() + c)  # the same without the difference of two nearly equal numbers


@contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """What is computed inside leaves torch's generators as they were: the next forward pass has the same masks."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
