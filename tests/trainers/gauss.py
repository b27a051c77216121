"""A Gaussian whose average velocity is known in closed form, as MDT's teacher and as its exact student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import mdt
from fastgen.trainers.mdt import MDT
from tests.trainers.truth import batch, gaussian

RF = RectifiedFlow()
SD = 0.5
PLAIN = {"d_norm": False, "cfg_vm": 0, "cfg_vd": 0}


class Gauss(Denoiser):
    """phi(x, t) = x (1 - S / A(t)) / t, A^2 = (1 - t)^2 S^2 + t^2: exact for data of N(0, S^2); S is its weight."""

    family = "gauss"

    def __init__(self, sd: float = SD) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(2,))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        t = time[:, None]
        return x * (1 - self.sd / ((1 - t).square() * self.sd**2 + t**2).sqrt()) / t


def truth() -> Teacher:
    return Teacher(Mixture(torch.ones(1), torch.zeros(1, 2), SD**2 * torch.eye(2)[None]))


def made(student: Denoiser | None = None, teacher: Teacher | None = None, **options) -> MDT:
    return MDT(MDT.Config(**{**PLAIN, **options}), student or Gauss(), teacher or truth())


def rows(n: int = 64):
    return batch({"x0": SD * gaussian(n, (2,), 9)}, n)


def at(method: MDT, t: float, x: float = 1.0) -> mdt.Point:
    x_t, t_b = torch.full((1, 2), x).double(), torch.tensor([t], dtype=torch.float64)
    return mdt.Point(x_t, t_b, None, method.velocity_of(method.teacher(x_t, t_b, on=RF)))
