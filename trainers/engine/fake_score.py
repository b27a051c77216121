"""The fake score: a network that follows the law of the student's own samples (SIM, Diff-Instruct, SiD, DMD2, ...).

    x = g_theta(z, c) without gradient,   sigma ~ p(sigma),   n ~ N(0, I)
    L_psi = E lambda(sigma) | D_psi(x + sigma n, sigma, c) - x |^2

Everything stands on the view x_t = x + sigma n, whatever path a network lives on; there D = x_t + sigma^2 score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import cond as conditions
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, finite, mean
from fastgen.paths import EDM
from fastgen.samplers import few_step
from fastgen.student import SamplerSpec
from fastgen.teacher import Teacher
from fastgen.trainers.engine.levels import LevelsConfig
from fastgen.trainers.engine.method import Batch, Loss, Turn

VIEW = EDM()


class FakeConfig(Model):
    """The fake network's part in a run; its optimiser is `loop.networks.fake`.

    init    whose weights it starts from: a closed-form teacher has none, there "student"
    repeat  its steps for each step of the loop, every one on fresh rows
    warmup  steps of the loop before the student's first
    sigma   None: lognormal(-1.2, 1.2), and for an eps network uniform in its own time
    weight  lambda: "edm", (sigma^2 + sd^2) / (sigma sd)^2; "eps", sigma^-2, which is |eps_psi - n|^2; None: "eps" for
            an eps network, else "edm"
    """

    init: Literal["teacher", "student"] = "teacher"
    repeat: int = Field(default=1, ge=1)
    warmup: int = Field(default=0, ge=0)
    sigma: LevelsConfig | None = None
    weight: Literal["edm", "eps"] | None = None
    sd: float = Field(default=0.5, gt=0)


class FakeScore:
    """The fake network (`denoiser`, to be listed in `Method.networks`), its loss and its turn."""

    def __init__(self, config: FakeConfig, denoiser: Denoiser) -> None:
        self.config, self.denoiser = config, denoiser
        on_eps = denoiser.prediction.kind == "eps"
        self.sigma = config.sigma or LevelsConfig(kind="time" if on_eps else "lognormal")
        self.weight_kind = config.weight or ("eps" if on_eps else "edm")

    def turn(self, loss: Callable[[Batch], Loss]) -> Turn:
        return Turn(trains=("fake",), loss=loss, repeat=self.config.repeat)

    def loss(self, batch: Batch, x: Tensor, cond: Cond) -> Loss:
        """Denoising loss on samples x [B, ...] of the student, without gradient; broken ones are left out."""
        whole = finite(x)
        x = torch.where(expand(whole, x), x, 0)
        sigma = self.sigma.quantile(batch.uniform("fake/sigma"), self.denoiser.path)
        noisy = x + expand(sigma, x) * batch.normal("fake/noise", x.shape[1:])
        error = self.weight(sigma) * mean((self.denoiser(noisy, sigma, cond, on=VIEW).x0 - x).square())
        return kept_mean(error, whole), {"fake/dropped": (~whole).sum()}

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma), [B]."""
        if self.weight_kind == "eps":
            return sigma**-2
        return (sigma**2 + self.config.sd**2) / (sigma * self.config.sd) ** 2


def make_fake(config: FakeConfig, teacher: Teacher, student: Denoiser) -> Denoiser:
    """A trainable copy of the network that `config.init` names."""
    source = teacher.denoiser if config.init == "teacher" else student
    if not any(True for _ in source.parameters()):
        raise UserError("method.fake.init=teacher: a closed-form teacher has no weights; set method.fake.init=student")
    return copy.deepcopy(source).requires_grad_(True)


def one_step(student: Denoiser, spec: SamplerSpec, z: Tensor, cond: Cond) -> Tensor:
    """x = g(z, c) from unit noise z, both [B, ...]: what `few_step.sample` makes in one step, with gradients."""
    (time,) = spec.at(1)
    return student(few_step.initial(spec, z, 1), few_step.times_of(z, time), cond, on=spec.path).x0


def draw_condition(batch: Batch, denoiser: Denoiser, null_share: float) -> Cond:
    """The batch's own condition (prompts), else uniform labels for a class-conditional network, `null_share` of them
    the null label where the network knows one."""
    if batch.cond is not None or denoiser.num_classes is None:
        return batch.cond
    label: Cond = {"label": batch.integers("label", denoiser.num_classes)}
    return conditions.replace(label, denoiser.null, batch.uniform("drop") < null_share)


def distribution_matching(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """0.5 |x - sg(x - g)|^2, whose gradient on x is g = (D_f - D_r) / (mean |x - D_r| + 1e-6): [B] (2405.14867)."""
    scale = mean((x - real).detach().abs()) + 1e-6
    direction = ((fake - real) / expand(scale, x)).detach()
    return 0.5 * mean((x - (x - direction).detach()).square()) * x[0].numel()


def kept_mean(values: Tensor, kept: Tensor) -> Tensor:
    """Mean of values [B] over the marked rows; NaN where none is, so that the loop skips the update."""
    return torch.where(kept, values, 0).sum() / kept.sum()
