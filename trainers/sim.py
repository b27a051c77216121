"""Score implicit matching: a one-step generator from a teacher's score, without data (2410.16794).

    x = g_theta(z, c),   x_t = x + sigma n,   D_r teacher, D_f fake (an online denoiser of the student's samples)
    y = u (D_f - D_r),   e = u (D_f - x)                      u = 1 (x0), 1 / sigma (eps), 1 / sigma^2 (score units)
    L(theta) = E - w d'(y)^T e                                d = |y|^2 or sqrt(|y|^2 + c^2) - c

For any fixed field u the gradient of E_p[u^T s_p] by theta is that of -E[u^T (s_p - s_c)]: so this is the gradient of
E d(s_p - s_q) with the law of x_t held fixed. It needs theta's way through x AND through x_t into both networks: their
weights are frozen, their inputs are not. Under no_grad the same lines are another method, and still train.

Named settings of the same file:
    SiD (2404.04057)            loss={kind: sid, alpha: 1.2, weight: inv_mean_abs}    alpha = 1 is l2 with other weights
    Diff-Instruct (2305.18455)  loss={kind: diff_instruct, space: score}              w y^T dx / dtheta, scores detached
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.cond import Cond, select
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import dot, expand, finite, mean, sumsq
from fastgen.paths import VP, Path
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.fake_score import (
    VIEW,
    FakeConfig,
    FakeScore,
    draw_condition,
    kept_mean,
    make_fake,
    one_step,
)
from fastgen.trainers.engine.levels import LevelsConfig, reach
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of

DECILES = 10
PIECE = 2  # rows diagnosed at once: no more memory than a step takes
OVERALL = ("error_to_gap", "cos_to_kl")


class LossConfig(Model):
    """What is minimised.

    huber_c  c of the pseudo-Huber distance over the square root of the number of coordinates
    alpha    of SiD: 1 is the fixed law of x_t, 0.5 the moving one, 1.2 the published best
    weight   w: inv_mean_abs is 1 / mean |x - D_r|, sigma^k is sigma to the power k
    """

    kind: Literal["pseudo_huber", "l2", "sid", "diff_instruct"] = "pseudo_huber"
    space: Literal["x0", "eps", "score"] = "x0"
    huber_c: float = Field(default=0.03, gt=0)
    alpha: float = 1.2
    weight: Literal["none", "inv_mean_abs", "sigma^k"] = "none"
    k: float = 0.0


class Sim(Method):
    """Networks: the student, which starts as the teacher, and the fake. Frozen: the teacher. No data but prompts."""

    class Config(Method.Config):
        name: Literal["sim"] = "sim"
        loss: LossConfig = LossConfig()
        sigma_init: float = Field(default=2.5, gt=0)  # the level at which the student is asked once
        sigma: LevelsConfig = LevelsConfig(kind="rho_uniform", tmax=800)  # the levels of its loss
        fake: FakeConfig = FakeConfig()
        guidance: float | None = None  # of the teacher; None: the teacher's own
        null_share: float = Field(default=0.1, ge=0, le=1)  # of a class-conditional student's rows, without a label

    copies = ("fake",)
    precisions = ("fp32", "bf16")  # gradients on the networks' inputs leave the range of fp16

    def __init__(self, *args: Any, fake: Denoiser | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.teacher is None:
            raise UserError("method sim follows a teacher's score: set teacher=PATH")
        truth, config = self.teacher.denoiser, self.config
        if truth.num_classes != self.student.num_classes:
            told = f"student {self.student.num_classes}, teacher {truth.num_classes}"
            raise UserError(f"method sim: the numbers of classes differ: {told}")
        if config.guidance is not None and not truth.has_null:
            raise UserError(f"method.guidance={config.guidance}: the teacher has no null condition; leave it off")
        if fake is not None and config.fake.init == "student":
            raise UserError(
                "method.fake.init=student: under student.lora the fake score adapts the teacher; leave it off"
            )
        self.fake = FakeScore(config.fake, fake or make_fake(config.fake, self.teacher, self.student))
        self.networks["fake"] = self.fake.denoiser
        self.needs = needs_of(truth) - {"x0"}
        self.spec = self.sampler()

    @property
    def turns(self) -> tuple[Turn, ...]:
        student = Turn(trains=("student",), loss=self.loss, start=self.config.fake.warmup)
        return self.fake.turn(self.fake_loss), student

    def fake_loss(self, batch: Batch) -> Loss:
        """The fake's step: denoise fresh samples of the student, made as its own turn makes them, dropout included."""
        cond = self.condition(batch)
        self.student.train()
        with torch.no_grad():
            x = self.generate(self.student, batch, cond)
        self.student.eval()
        return self.fake.loss(batch, x, cond)

    def loss(self, batch: Batch) -> Loss:
        """The student's step."""
        cond = self.condition(batch)
        x = self.generate(self.student, batch, cond)
        if x.requires_grad:  # a network that answers NaN hands NaN back too, even to a sample that is left out
            x.register_hook(only_whole)
        sigma = self.config.sigma.quantile(batch.uniform("sigma"), self.fake.denoiser.path)
        real, fake = self.scores(x, sigma, batch.normal("noise", x.shape[1:]), cond)
        kept = finite(x) & finite(real) & finite(fake)
        gap = (sumsq(fake - real) / x[0].numel()).sqrt()
        logs = {"gap": kept_mean(gap, kept), "dropped": (~kept).sum()}
        return kept_mean(losses(self.config.loss, x, real, fake, sigma), kept), logs

    def scores(self, x: Tensor, sigma: Tensor, noise: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """D_r and D_f at x + sigma n, differentiable in x: neither may be computed without gradients."""
        assert self.teacher is not None  # see __init__
        noisy = x + expand(sigma, x) * noise
        real = self.teacher(noisy, sigma, cond, guidance=self.config.guidance, on=VIEW).x0
        return real, self.fake.denoiser(noisy, sigma, cond, on=VIEW).x0

    def generate(self, student: Denoiser, batch: Batch, cond: Cond) -> Tensor:
        """x = g(z, c), [B, ...]."""
        return one_step(student, self.spec, batch.normal("z", student.shape), cond)

    def condition(self, batch: Batch) -> Cond:
        return draw_condition(batch, self.student, self.config.null_share)

    def sampler(self) -> SamplerSpec:
        path = self.student.path
        # Not bound to its noise: the law is matched, not the teacher's way from a noise to its sample.
        return SamplerSpec(
            path=path, times={1: (init_time(path, self.config.sigma_init),)}, renoise=True, init=path.init
        )

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """By decile of the student's noise levels: gap |D_f - D_r| / sqrt n and error |D_f - x| / sqrt n, which fall,
        and the share of samples beyond the Huber's c. Over all: |e| / |y|, and the cosine of the angle between this
        gradient on x and Diff-Instruct's, which is 1 (or 0) where the routing is broken."""
        cond, z = self.condition(batch), batch.normal("diagnose/z", student.shape)
        noise = batch.normal("diagnose/noise", student.shape)
        told: dict[str, list[float]] = {}
        pieces = torch.arange(len(batch), device=z.device).split(PIECE)
        for i, rows in enumerate(pieces):
            decile = i * DECILES // len(pieces)
            x = one_step(student, self.spec, z[rows], select(cond, rows))
            share = torch.full_like(x.flatten(1)[:, 0], (decile + 0.5) / DECILES)
            sigma = self.config.sigma.quantile(share, self.fake.denoiser.path)
            for key, value in self._figures(x.detach(), sigma, noise[rows], select(cond, rows)).items():
                told.setdefault(key if key in OVERALL else f"{key}/d{decile}", []).append(value)
        return {key: sum(values) / len(values) for key, values in told.items()}

    @torch.enable_grad()
    def _figures(self, x: Tensor, sigma: Tensor, noise: Tensor, cond: Cond) -> dict[str, float]:
        x, n = x.requires_grad_(), x[0].numel()
        real, fake = self.scores(x, sigma, noise, cond)
        (own,) = torch.autograd.grad(losses(self.config.loss, x, real, fake, sigma).sum(), x)
        gap, error = (sumsq((fake - other).detach()).sqrt() for other in (real, x))
        towards = (fake - real).detach()
        cosine = dot(own, towards) / (sumsq(own) * sumsq(towards)).sqrt().clamp_min(1e-30)
        c = self.config.loss.huber_c * math.sqrt(n)
        beyond = gap * _unit(self.config.loss.space, sigma) > c
        figures = {
            "gap": gap / math.sqrt(n),
            "error": error / math.sqrt(n),
            "saturated": beyond.float(),
            "error_to_gap": error / gap.clamp_min(1e-30),
            "cos_to_kl": cosine,
        }
        return {key: float(value.mean()) for key, value in figures.items()}


def losses(config: LossConfig, x: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """The loss of each sample, [B], summed over its coordinates: x, D_r and D_f [B, ...], sigma [B]."""
    unit = expand(_unit(config.space, sigma), x)
    y, e = unit * (fake - real), unit * (fake - x)
    if config.kind == "diff_instruct":
        value = dot(y.detach(), x)
    elif config.kind == "sid":  # (D_r - D_f)^T ((D_r - x) - alpha (D_r - D_f))
        value = (1 - config.alpha) * sumsq(y) - dot(y, e)
    else:
        value = -dot(slope(config, y), e)
    if config.weight == "inv_mean_abs":
        value = value / mean((x - real).detach().abs()).clamp_min(1e-5)
    return value * sigma**config.k if config.weight == "sigma^k" else value


def slope(config: LossConfig, y: Tensor) -> Tensor:
    """d'(y), the gradient of the distance: [B, ...] to [B, ...]."""
    if config.kind == "l2":
        return 2 * y
    c = config.huber_c * math.sqrt(y[0].numel())
    return y / expand((sumsq(y) + c * c).sqrt(), y)


def only_whole(gradient: Tensor) -> Tensor:
    """A gradient [B, ...] without the samples that are not finite in it.

    A hook on x may not hold x: such a ring lies half outside Python and would never be freed.
    """
    return torch.where(expand(finite(gradient), gradient), gradient, 0)


def _unit(space: str, sigma: Tensor) -> Tensor:
    """What a difference of denoisers is multiplied by to stand in x0, eps or score units, [B]."""
    return sigma ** {"x0": 0, "eps": -1, "score": -2}[space]


def init_time(path: Path, sigma: float) -> float:
    """The time of a noise level; on a VP table the nearest whole index, which a stock scheduler can name (SD: 625)."""
    low, high = reach(path)
    if not low <= sigma <= high:
        raise UserError(f"method.sigma_init={sigma:g}: the student's levels are {low:.3g} .. {high:.3g}")
    if isinstance(path, VP):
        alpha, own = path.table()
        return float((own / alpha - sigma).abs().argmin())
    level = torch.tensor(sigma, dtype=torch.float64)
    return float(path.time(torch.ones_like(level), level))
