"""Losses of discrete consistency models of a tiny network (entries `cm_*` of `tiny_losses`), by the whole method.

The settings have NVlabs/FastGen's names; its `ratio` is r / t at high levels, its guidance the usual scale.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.paths import EDM, Prediction
from fastgen.teacher import Teacher
from fastgen.trainers.consistency import Consistency
from fastgen.trainers.engine.discretisation import weights
from fastgen.trainers.engine.method import Batch
from tests.goldens.case import Case

NAMES = ("W1", "b1", "W2", "b2", "w3")
WEIGHTINGS = {"default": "inv_ds"}


class Tiny(Denoiser):
    """The network of the case, c = ln(s) / 4: tanh of a linear layer on [c_in x, c, sin c, cos c, 0, cond]."""

    has_null = True

    def __init__(self, case: Case, name: str, prediction: Prediction) -> None:
        shape = tuple(case["x0"].shape[1:])
        super().__init__(None, EDM(), prediction, shape=shape, log_time=True)
        self.negative = case["neg_cond"]
        for weight in NAMES:
            setattr(self, weight, nn.Parameter(case[f"edm.{name}.{weight}"].clone()))

    def unconditional(self, cond: Cond) -> Cond:
        return {"given": self.negative}

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        assert cond is not None
        told = torch.stack([time, time.sin(), time.cos(), torch.zeros_like(time)], dim=1)
        h = torch.tanh(torch.cat([x.flatten(1), told, cond["given"]], dim=1) @ self.W1.T + self.b1)
        return (h @ self.W2.T + self.b2).view_as(x)


class Given(Batch):
    """The case's data and noise where a batch would draw its own."""

    def __init__(self, case: Case, shares: Tensor) -> None:
        data = {"x0": case["x0"], "cond.given": case["cond"]}
        super().__init__(data, torch.arange(len(case["x0"])), seed=0, step=0, steps=1)
        self.numbers = {"z": case["noise"], "level": shares}

    def normal(self, tag: str, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        return self.numbers[tag]

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        return self.numbers[tag]


def config(told: dict[str, Any], r_min: float) -> Consistency.Config:
    """Our settings for FastGen's, where c of the Huber distance is 1e-8 unless told."""
    told = dict(told)
    weighting = told.pop("weighting_ct_loss", "default")
    mapping = {"q": 1e15, "cap": told.pop("ratio"), "r_min": r_min}
    guidance, constant = told.pop("guidance_scale", None), told.pop("huber_const", 1e-8)
    teacher = {"solver": "euler", "guidance": guidance} if told.pop("use_cd", False) else {}
    distance = {"distance": "l2"} if told.pop("use_squared_l2", False) else {"huber_c": float(constant)}
    made = Consistency.Config(
        kind="ect",
        times=mapping,
        weighting=WEIGHTINGS.get(weighting, weighting),
        **distance,
        **teacher,
    )
    assert not told, f"settings without a meaning here: {sorted(told)}"
    return made


class AtLevels(Consistency):
    """At the levels t of the case, whatever the law of t."""

    t: Tensor

    def levels(self, batch: Batch, u: Tensor) -> tuple[Tensor, Tensor]:
        assert self.config.times is not None
        return self.config.times.pair(self.t, self.config.times.ratio(batch.step))


def check(case: Case, name: str, entry: dict[str, Any]) -> None:
    """Levels, answers, distances, losses and gradients of one entry."""
    student = Tiny(case, "net", Prediction(kind="edm"))
    method = AtLevels(
        config(entry["settings"], entry["min_r"]), student, Teacher(Tiny(case, "teacher", student.prediction))
    )
    method.t = case["edm.t"]
    batch = Given(case, torch.full_like(method.t, 0.5))
    lo, hi = method.levels(batch, batch.uniform("level"))
    case.close(lo, case[f"{name}.r"], f"{name}.r")
    distance, whole = method.distances(student, batch, lo, hi)
    assert whole.all()
    case.close(distance, case[f"{name}.loss_unweighted"], f"{name}.loss_unweighted")
    found = student(case["x0"] + hi[:, None, None, None] * case["noise"], hi, batch.cond).x0
    case.close(found, case[f"{name}.D_t"], f"{name}.D_t")
    losses = weighted(method, distance.detach(), lo, hi)
    rows = [float(method.mean(losses, only(whole, i), batch)) for i in range(len(lo))]
    case.close(torch.tensor(rows, dtype=torch.float64), case[f"{name}.loss"], f"{name}.loss")
    gradients(case, name, entry, method, batch)


def weighted(method: Consistency, distance: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return weights(method.config.weighting, lo, hi, method.student.prediction.sd) * distance


def only(whole: Tensor, i: int) -> Tensor:
    """The marks of one row."""
    return whole & (torch.arange(len(whole)) == i)


def gradients(case: Case, name: str, entry: dict[str, Any], method: Consistency, batch: Batch) -> None:
    """The mean loss, and its gradient by every parameter, in norm and where the case has it whole."""
    loss = method.loss(batch)
    assert isinstance(loss, tuple)
    case.close(loss[0].item(), entry["mean_loss"], f"{name}: mean loss")
    parameters = [getattr(method.student, weight) for weight in NAMES]
    found = torch.autograd.grad(loss[0], parameters, allow_unused=True)
    grads = {w: torch.zeros_like(p) if g is None else g for w, p, g in zip(NAMES, parameters, found, strict=True)}
    case.close(math.sqrt(sum(float(g.square().sum()) for g in grads.values())), entry["grad_norm"], f"{name}: norm")
    for weight, norm in entry.get("grad_norm_per_param", {}).items():
        case.close(float(grads[weight].norm()), norm, f"{name}: norm of {weight}")
    for match in case.names(re.escape(name) + r"\.grad\.(\w+)"):
        case.close(grads[match[1]], case[match[0]], match[0])
