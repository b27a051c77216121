"""The kind `gmm_tangent`: sCM's tangent, norms and losses on an exact mixture, by the method's own functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.jvp import value_and_tangent
from fastgen.paths import Pair, Path, Prediction, TrigFlow
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.scm import Scm, Start, TangentConfig, WeightConfig, normed, weighted
from tests.goldens.case import Case


class Tanh(Denoiser):
    """The case's student: F(x / sd, t) = W2 tanh(W1 [x / sd, t] + b1) + b2, as a network on TrigFlow."""

    def __init__(self, case: Case, sd: float) -> None:
        super().__init__(None, TrigFlow(sd=sd), Prediction(kind="trig", sd=sd), shape=(2,))
        self.weights = nn.ParameterList(nn.Parameter(case[f"mlp.{name}"]) for name in ("W1", "b1", "W2", "b2"))
        self.sd = sd

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        w1, b1, w2, b2 = self.weights
        return (torch.cat([x / self.sd, time[:, None]], dim=1) @ w1.T + b1).tanh() @ w2.T + b2


class Halves(Denoiser):
    """The mixture whole, and its conditional part where cond["part"] is 1."""

    has_null, null = True, {"part": torch.zeros(1, dtype=torch.long)}

    def __init__(self, whole: Mixture, part: Mixture) -> None:
        super().__init__(None, whole.path, whole.prediction, shape=whole.shape)
        self.laws = nn.ModuleList([whole, part])

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, on: Path | None = None, r: Any = None) -> Pair:
        marks = torch.zeros(len(x), 1, dtype=torch.bool) if cond is None else cond["part"][:, None] == 1
        whole, part = (law(x, t, on=on) for law in self.laws)
        return Pair(torch.where(marks, part.x0, whole.x0), torch.where(marks, part.eps, whole.eps))


def gmm_tangent(case: Case) -> None:
    """The tangent of sCM on an exact mixture: teacher, derivative, g at three r, both norms, guidance, losses."""
    sd, weights, some = case.result("sigma_data"), case["gmm.weights"], case["gmm.weights_cond"]
    inside = some > 0
    whole = Mixture(weights, case["gmm.means"], case["gmm.covs"])
    part = Mixture(some[inside], case["gmm.means"][inside], case["gmm.covs"][inside])
    x, t, path, scale = case["x"], case["t"], TrigFlow(sd=sd), case.result("guidance_scale")
    pair, score = whole(x, t, on=path), whole.score(x, t, on=path)
    case.close(pair.x0, case["teacher.x0_mean"], "x0")
    case.close(sd * pair.eps, case["teacher.z_mean"], "z")
    case.close(score, case["teacher.score"], "score")
    everywhere = {"part": torch.ones(len(x), dtype=torch.long)}
    student = Tanh(case, sd)
    for name, network, cond, guidance in (
        ("mlp", student, None, None),
        ("mlp_cfg", student, everywhere, scale),
        ("teacher_init", whole, None, None),
    ):
        scm = Scm(Scm.Config(sd=sd, guidance=guidance), network, Teacher(Halves(whole, part)))
        start = Start(pair.x0, pair.eps, t, x, cond, None, None)
        scm_tangent(case, name, scm, start)
    scm = Scm(Scm.Config(sd=sd), student, Teacher(whole))
    scm_losses(case, scm, Start(pair.x0, pair.eps, t, x, None, None, None))
    # The exact student: f = f*, whose F makes f so by definition, and x0 = f.
    c, s = t.cos()[:, None], t.sin()[:, None]
    case.close(c * x - s * sd * case["exact.F_star"], case["exact.f_star"], "f*")
    case.close(end_point(whole, path, x, t), case["exact.f_star"], "the ODE's end point")


def scm_tangent(case: Case, name: str, scm: Scm, start: Start) -> None:
    x, t, sd = start.x, start.t, scm.config.sd
    velocity = scm.velocity(start)
    case.close(sd * velocity, case[f"{name}.dxdt"], f"{name}: dxdt")
    along = scm.direction(t, velocity)
    flow, derivative = value_and_tangent(scm.flow(scm.student, None), (x, t), along, scm.config.jvp)
    case.close(flow.detach(), case[f"{name}.F"], f"{name}: F")
    case.close(derivative, case[f"{name}.jvp_cos_sin"], f"{name}: derivative")
    case.close(derivative / along[1][:, None], case[f"{name}.dF_dt_total"], f"{name}: dF/dt")
    case.close(scm.student(x, t, on=scm.view).x0.detach(), case[f"{name}.f"], f"{name}: f")
    for match in case.names(rf"{name}\.g_r(.+)"):
        g = scm.tangent(scm.student, start, float(match[1]))[1]
        case.close(g, case[match[0]], match[0])
        for norm in ("l2", "rms"):
            config = TangentConfig(norm=norm, constant=case.result("tangent_c"))
            case.close(normed(config, g), case[f"{name}.gnorm_{norm}_r{match[1]}"], f"{match[0]} normed by {norm}")
        if float(match[1]) == 1:
            case.close(g / t.cos()[:, None], case[f"{name}.df_dt"], f"{name}: df/dt")


def scm_losses(case: Case, scm: Scm, start: Start) -> None:
    flow, g, _ = scm.tangent(scm.student, start, 1.0)
    u = case["loss.logvar"].clone().requires_grad_()
    error = {n: (flow - flow.detach() - normed(TangentConfig(norm=n), g)).square().mean(1) for n in ("l2", "rms")}
    plain, divided = WeightConfig(), WeightConfig(per_coordinate=True)
    loss = weighted(plain, scm.config.sd, error["l2"], u, start).mean()
    case.close(loss[None], case["loss.sana_mean"], "loss")
    by_flow, by_u = torch.autograd.grad(loss, [flow, u], retain_graph=True)
    case.close(by_flow, case["loss.sana_grad_F"], "gradient by F")
    case.close(by_u, case["loss.sana_grad_logvar"], "gradient by the log-variance")
    other = weighted(divided, scm.config.sd, error["rms"], u, start).mean()
    case.close(other[None], case["loss.fastgen_mean"], "loss as released")


def end_point(law: Mixture, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """Where the ODE takes each x from its own t to 0, to about 1e-11: dx/dt = d F."""
    output = Prediction(kind="trig", sd=path.sd)

    def of(row: Tensor, begin: float) -> Tensor:
        def slope(now: float, state: np.ndarray) -> np.ndarray:
            time, at = torch.tensor([now], dtype=torch.float64), torch.from_numpy(state)[None]
            return path.sd * output.from_pair(law(at, time, on=path), *path.levels(time))[0].numpy()

        solution = solve_ivp(slope, (begin, 0.0), row.numpy(), method="DOP853", rtol=1e-10, atol=1e-12)
        return torch.from_numpy(solution.y[:, -1])

    return torch.stack([of(row, begin) for row, begin in zip(x, t.tolist(), strict=True)])
