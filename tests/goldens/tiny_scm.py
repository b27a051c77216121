"""sCM's losses of the kind `tiny_losses`: a small preconditioned network, its teacher, NVlabs/FastGen's settings.

The network, its view, the tangent and the loss are those of `fastgen.trainers.scm`; only the finite difference of the
released code, which moves along the drawn pair even under a teacher, is written here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.layout import expand, mean
from fastgen.paths import EDM, Prediction
from fastgen.teacher import Teacher
from fastgen.trainers.scm import Scm, Start, TangentConfig, WeightConfig, normed, ramp, step_back, weighted
from tests.goldens.case import Case

SD, WARMUP, FD_STEP = 0.5, 10_000, 1e-3
NAMES = ("W1", "b1", "W2", "b2", "w3")


class Tiny(Denoiser):
    """The case's network; it remembers the log-variance of its last call."""

    has_null = True

    def __init__(self, case: Case, name: str) -> None:
        super().__init__(None, EDM(), Prediction(kind="edm", sd=SD), shape=tuple(case["x0"].shape[1:]), log_time=True)
        self.weights = nn.ParameterDict({key: nn.Parameter(case[f"edm.{name}.{key}"].clone()) for key in NAMES})
        self.register_buffer("null_row", case["neg_cond"][:1])

    @property
    def null(self) -> dict[str, Tensor]:
        return {"cond": self.null_row}

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        c, w = time[:, None], self.weights
        features = torch.cat([x.flatten(1), c, c.sin(), c.cos(), torch.zeros_like(c), cond["cond"]], dim=1)
        hidden = (features @ w["W1"].T + w["b1"]).tanh()
        self.log_variance = hidden @ w["w3"]
        return (hidden @ w["W2"].T + w["b2"]).view_as(x)


def method(case: Case, settings: dict[str, Any]) -> Scm:
    known = {
        "use_cd",
        "guidance_scale",
        "iteration",
        "use_jvp_finite_diff",
        "prior_weighting_enabled",
        "divide_x_0_spatial_dim",
        "g_norm_spatial_invariance",
    }
    assert settings.keys() <= known, f"unknown settings: {settings.keys() - known}"
    config = Scm.Config(
        velocity="teacher" if settings.get("use_cd") else "data",
        sd=SD,
        guidance=settings.get("guidance_scale"),
        tangent=TangentConfig(warmup=WARMUP, norm="rms" if settings.get("g_norm_spatial_invariance", True) else "l2"),
        weight=WeightConfig(
            prior=settings.get("prior_weighting_enabled", True),
            per_coordinate=settings.get("divide_x_0_spatial_dim", True),
        ),
    )
    return Scm(config, Tiny(case, "net"), Teacher(Tiny(case, "teacher")) if settings.get("use_cd") else None)


def along_the_pair(scm: Scm, start: Start) -> Tensor:
    """c s dF/dt by NVlabs/FastGen's central difference, whose states are those of the drawn pair."""
    flow, h = scm.flow(scm.student, start.told), FD_STEP * start.t.abs()
    with torch.no_grad():
        ahead, behind = (flow(scm.view.mix(start.x0, start.eps, t), t) for t in (start.t + h, start.t - h))
    return expand(start.t.sin() * start.t.cos() / (2 * h), ahead) * (ahead - behind)


def check(case: Case, name: str, entry: dict[str, Any]) -> None:
    settings = entry["settings"]
    scm = method(case, settings)
    student, x0, eps = scm.student, case["x0"], case["noise"]
    sigma, cond = case["edm.t"], {"cond": case["cond"]}
    t = torch.atan2(sigma, torch.full_like(sigma, SD))
    start = Start(x0, eps, t, scm.view.mix(x0, eps, t), cond, cond, None)
    r = ramp(scm.config.tangent, entry["iteration"])
    assert settings.get("iteration", entry["iteration"]) == entry["iteration"]
    if settings.get("use_jvp_finite_diff"):
        derivative = along_the_pair(scm, start)
        flow = scm.flow(student, cond)(start.x, t)
        g = SD * step_back(flow.detach(), scm.velocity(start), derivative, start.x / SD, t, r)
    else:
        flow, g, _ = scm.tangent(student, start, r)
        # Our finite difference goes along the same direction as the derivative, unlike the released one.
        along = (start.x, t), scm.direction(t, scm.velocity(start))
        ours, exact = (
            value_and_tangent(scm.flow(student, cond), *along, JvpConfig(route=route, step=1e-5))[1]
            for route in ("finite", "two_pass")
        )
        case.close(ours, exact, f"{name}: finite difference", rtol=1e-6)
    u = student.log_variance
    error = mean((flow - flow.detach() - normed(scm.config.tangent, g)).square())
    loss = weighted(scm.config.weight, SD, error, u, start)
    case.close(u[:, None], case[f"{name}.logvar"], f"{name}: log-variance")
    case.close(error, case[f"{name}.loss_unweighted"], f"{name}: unweighted")
    case.close(loss, case[f"{name}.loss"], f"{name}: loss")
    case.close(loss.mean(), entry["mean_loss"], f"{name}: mean")
    gradients = dict(zip(NAMES, torch.autograd.grad(loss.mean(), [student.weights[key] for key in NAMES]), strict=True))
    case.close(gradients["W1"], case[f"{name}.grad.W1"], f"{name}: gradient by W1")
    case.close(gradients["b2"], case[f"{name}.grad.b2"], f"{name}: gradient by b2")
    for key, expected in entry["grad_norm_per_param"].items():
        case.close(gradients[key].norm(), expected, f"{name}: gradient norm by {key}")
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    case.close(whole, entry["grad_norm"], f"{name}: gradient norm")
