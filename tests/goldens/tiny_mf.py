"""MeanFlow's losses of a tiny network (entries `mf_*` of `tiny_losses`), by the whole method on fixed numbers.

The settings have NVlabs/FastGen's names, which docs/meanflow.md puts beside ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.jvp import JvpConfig
from fastgen.paths import Pair, Path, Prediction, RectifiedFlow
from fastgen.teacher import Teacher
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.spans import SpansConfig
from fastgen.trainers.meanflow import GuidedConfig, LossConfig, MeanFlow, losses
from tests.goldens.case import Case

RF = RectifiedFlow()
NAMES = ("W1", "b1", "W2", "b2", "w3")


class Tiny(Denoiser):
    """The network of the case: tanh of a linear layer on [x, t, cos 3t, t - r, sin 2(t - r), cond]."""

    has_null = True
    two_time = True

    def __init__(self, case: Case, name: str) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=tuple(case["x0"].shape[1:]))
        self.negative = case["neg_cond"]
        for weight in NAMES:
            setattr(self, weight, nn.Parameter(case[f"rf.{name}.{weight}"].clone()))

    def add_gap(self) -> None:
        """It is told two times as it is."""

    def unconditional(self, cond: Cond) -> Cond:
        return {"given": self.negative}

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, on: Path | None = None, r: Tensor | None = None
    ) -> Pair:
        assert cond is not None and on == RF
        gap = torch.zeros_like(t) if r is None else t - r
        told = torch.stack([t, torch.cos(3 * t), gap, torch.sin(2 * gap)], dim=1)
        h = torch.tanh(torch.cat([x.flatten(1), told, cond["given"]], dim=1) @ self.W1.T + self.b1)
        v = (h @ self.W2.T + self.b2).view_as(x)
        time = t[:, None, None, None]
        return Pair(x - time * v, x + (1 - time) * v)


class Given(Batch):
    """The case's data, noise and times where a batch would draw its own."""

    def __init__(self, case: Case, step: int) -> None:
        data = {"x0": case["x0"], "cond.given": case["cond"]}
        super().__init__(data, torch.arange(len(case["x0"])), seed=0, step=step, steps=step + 1)
        self.case = case

    def normal(self, tag: str, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        return {"eps": self.case["noise"]}[tag]

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        half = torch.full_like(self.case["rf.t"], 0.5)
        return {"t": self.case["rf.t"], "r": self.case["rf.r"], "span": half, "drop": half}[tag]


def config(told: dict[str, Any]) -> MeanFlow.Config:
    """Our settings for FastGen's."""
    told = dict(told)
    norm, *numbers = told.pop("norm_method", "poly_1.0").split("_")
    exponents = {"poly": {"power": numbers[0]}, "exp": {"exponential": numbers}}[norm]
    loss = LossConfig(
        kind=told.pop("loss_type", "l2"),
        c=told.pop("norm_const", 0.1),
        per_root=told.pop("tangent_spatial_invariance", False),
        warmup=told.pop("tangent_warmup_steps", 0),
        **exponents,
    )
    finite, step = told.pop("use_jvp_finite_diff", False), told.pop("jvp_finite_diff_eps", 1e-4)
    scale, kappa = told.pop("guidance_scale", None), told.pop("guidance_mixture_ratio", None)
    interval = told.pop("guidance_t_start", 0.0), told.pop("guidance_t_end", 1.0)
    teacher, drop = told.pop("use_cd", False), told.pop("cond_dropout_prob", None)
    assert not told, f"settings without a counterpart: {sorted(told)}"
    guided = None
    # Without cond_dropout_prob the release leaves its own targets unguided (specification of the case).
    if not teacher and drop is not None and (scale is not None or kappa is not None):
        guided = GuidedConfig(omega=scale or 1.0, kappa=kappa or 0.0, interval=interval)
    return MeanFlow.Config(
        velocity="teacher" if teacher else "data",
        spans=SpansConfig(kind="uniform", equal=0.0),
        loss=loss,
        guidance=scale if teacher else None,
        guided=guided,
        drop_label=0.0 if teacher else drop or 0.0,
        jvp=JvpConfig(route="finite", step=step) if finite else JvpConfig(),
    )


def levels(told: dict[str, Any]) -> tuple[float, float] | None:
    """A teacher's guidance interval in sigma / alpha, of FastGen's in time, whose lower end counts as well."""
    low, high = (float(told.get(f"guidance_t_{end}", default)) for end, default in (("start", 0.0), ("end", 1.0)))
    if (low, high) == (0.0, 1.0):
        return None
    ends = torch.tensor([low, high], dtype=torch.float64)
    ratio = ends / (1 - ends)
    return float(torch.nextafter(ratio[0], torch.tensor(-1.0, dtype=torch.float64))), float(ratio[1])


def check(case: Case, name: str, entry: dict[str, Any]) -> None:
    """Loss, weight, velocity, tangent and gradients of one setting."""
    chosen, student = config(entry["settings"]), Tiny(case, "net")
    teacher = Teacher(Tiny(case, "teacher"), guidance_interval=levels(entry["settings"]))
    method = MeanFlow(chosen, student, teacher if chosen.velocity == "teacher" else None)
    rows = Given(case, entry["iteration"])
    loss, logs = method.loss(rows)
    t, r, z, own = method.noisy(rows)
    v, cond = method.velocity(rows, z, t, own)
    u, slope = method.derivative(z, t, r, v, cond)
    each, weight, g = losses(chosen.loss, u, v, slope, t - r, rows.step)
    case.close(loss, entry["mean_loss"], f"{name}: mean loss")
    case.close(logs["weight"], weight.mean(), f"{name}: weight as logged")
    case.close(each, case[f"{name}.loss"], f"{name}.loss")
    case.close(weight, case[f"{name}.weight"].flatten(), f"{name}.weight")
    case.close(v, case[f"{name}.v"], f"{name}.v")
    case.close(slope, case[f"{name}.dudt"], f"{name}.dudt")
    case.close(g if chosen.loss.kind == "opt_grad" else g + u, case[f"{name}.tangent"], f"{name}.tangent")
    own_weights = [getattr(student, weight) for weight in NAMES]
    gradients = dict(zip(NAMES, torch.autograd.grad(loss, own_weights, allow_unused=True), strict=True))
    norms = {weight: 0.0 if one is None else float(one.norm()) for weight, one in gradients.items()}
    for weight, norm in entry["grad_norm_per_param"].items():
        case.close(norms[weight], norm, f"{name}: gradient of {weight}")
    case.close(sum(norm**2 for norm in norms.values()) ** 0.5, entry["grad_norm"], f"{name}: gradient")
    for found in case.names(rf"{name.replace('.', '[.]')}\.grad\.(\w+)"):
        case.close(gradients[found[1]], case[found[0]], found[0])
