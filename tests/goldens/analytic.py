"""The kind `analytic_flow`: velocities, flow maps and average velocities of a Gaussian and a mixture, on every path."""

from __future__ import annotations

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.layout import expand
from fastgen.paths import EDM, Pair, Path, Prediction, RectifiedFlow, TrigFlow, carry
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.spans import SpansConfig
from fastgen.trainers.meanflow import LossConfig, MeanFlow, target
from tests.goldens.case import Case

RF = RectifiedFlow()
H = 2e-3  # step of the sixth-order differences
SIXTH = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}


def analytic_flow(case: Case) -> None:
    """Our mixture teacher, integrated to 1e-12, against the case, and MeanFlow's identity on the case's own numbers."""
    gauss = Mixture(torch.ones(1), case["gauss.mu"][None], case["gauss.cov"][None])
    gmm = Mixture(case["gmm.weights"], case["gmm.means"], case["gmm.covs"])
    for name, model in (("gauss", gauss), ("gmm", gmm)):
        linear(case, name, model)
        exploding(case, name, model)
        perfect_student(case, name, model)
    density(case, gmm)
    guided(case, gmm)
    trigonometric(case, gauss, case.result("sigma_data"))


def linear(case: Case, name: str, model: Mixture) -> None:
    """x_t, v, the state at r, the end point, u and du/dt."""
    x, t, r = (case[f"{name}.{part}"] for part in ("x_t", "t", "r"))
    v, u = case[f"{name}.v"], case[f"{name}.u"]
    case.close(RF.mix(case[f"{name}.x0"], case[f"{name}.eps"], t), x, f"{name}.x_t")
    case.close(model(x, t).velocity, v, f"{name}.v")
    case.close(flow(model, x, t, r), case[f"{name}.x_r"], f"{name}.x_r")
    case.close(flow(model, x, t, torch.zeros_like(t)), case[f"{name}.f0"], f"{name}.f0")
    case.close(average(model, x, t, r), u, f"{name}.u")
    moving = t > r
    identity = (v - u)[moving] / (t - r)[moving, None]
    close_where(case, identity, f"{name}.dudt", moving)
    case.close(target(v, case[f"{name}.dudt"].nan_to_num(), t - r, 1.0), u, f"{name}: u = v - (t - r) D")
    if name == "gmm":
        apart = t - r >= 0.08
        close_where(case, derivative(model, x[apart], t[apart], r[apart]), "gmm.dudt_fd", apart)


def close_where(case: Case, found: Tensor, name: str, rows: Tensor) -> None:
    """The case's numbers in these rows, and NaN in the others."""
    assert case[name][~rows].isnan().all(), f"{name}: numbers where there should be none"
    case.close(found, case[name][rows], name)


def exploding(case: Case, name: str, model: Mixture) -> None:
    """The same samples on x = x0 + sigma eps: the denoiser, and where the ODE leads."""
    x, sigma, low = case[f"{name}_ve.x"], case[f"{name}_ve.sigma"], torch.tensor(EDM().end, dtype=torch.float64)
    case.close(EDM().mix(case[f"{name}.x0"], case[f"{name}.eps"], sigma), x, f"{name}_ve.x")
    case.close(model(x, sigma, on=EDM()).x0, case[f"{name}_ve.denoiser"], f"{name}_ve.denoiser")
    z, t = carry(x, sigma, EDM(), RF)
    case.close(flow(model, z, t, torch.zeros_like(t)), case[f"{name}_ve.f_to_0"], f"{name}_ve.f_to_0")
    end = RF.time(torch.ones_like(low), low)
    ended = flow(model, z, t, torch.full_like(t, float(end)))
    case.close(ended / (1 - end), case[f"{name}_ve.f_to_sigma_min"], f"{name}_ve.f_to_sigma_min")


def trigonometric(case: Case, model: Mixture, sd: float) -> None:
    """The Gaussian on TrigFlow: its ODE, and the network F of which the consistency function is made."""
    path, x, theta = TrigFlow(sd=sd), case["gauss_trig.x_hat"], case["gauss_trig.theta"]
    carried, t = carry(case["gauss_ve.x"], case["gauss_ve.sigma"], EDM(start=1e9, end=1e-9), path)
    case.close(t, theta, "gauss_trig.theta")
    case.close(carried, x, "gauss_trig.x_hat")
    alpha, sigma = path.levels(theta)
    trig = Prediction(kind="trig", sd=sd)
    velocity = sd * trig.from_pair(model(x, theta, on=path), alpha, sigma)
    case.close(velocity, case["gauss_trig.dxdt"], "gauss_trig.dxdt")
    z, t = carry(x, theta, path, RF)
    ended = flow(model, z, t, torch.zeros_like(t))
    case.close(ended, case["gauss_trig.f"], "gauss_trig.f")
    pair = Pair(ended, (x - expand(alpha, x) * ended) / expand(sigma, x))
    case.close(trig.from_pair(pair, alpha, sigma), case["gauss_trig.F_consistency"], "gauss_trig.F_consistency")


def density(case: Case, model: Mixture) -> None:
    """Score, density and one-point velocities, and which component each sample is of."""
    x, t = case["gmm.x_t"], case["gmm.t"]
    case.close(model.score(x, t), case["gmm.score"], "gmm.score")
    case.close(model.log_prob(x, t), case["gmm.log_density"], "gmm.log_density")
    case.close(case["gmm.eps"] - case["gmm.x0"], case["gmm.cond_v"], "gmm.cond_v")
    assert set(case["gmm.component"].tolist()) <= set(range(len(model.weights)))


def guided(case: Case, model: Mixture) -> None:
    """Guidance towards some components, by a teacher with labels."""
    told = case.data["meta"]["gmm_cfg"]
    labels = torch.tensor([int(k not in told["class_components"]) for k in range(len(model.weights))])
    teacher = Teacher(Mixture(model.weights, model.means, model.covs, labels), guidance=told["guidance_w"])
    n = len(case["gmm_cfg.u"])
    x, t, r = (case[f"gmm.{part}"][:n] for part in ("x_t", "t", "r"))
    label = {"label": torch.zeros(n, dtype=torch.long)}
    case.close(teacher(x, t, label, guidance=1.0).velocity, case["gmm_cfg.v_cond"], "gmm_cfg.v_cond")
    case.close(teacher(x, t, label).velocity, case["gmm_cfg.v_guided"], "gmm_cfg.v_guided")
    case.close(flow(teacher, x, t, r, label), case["gmm_cfg.x_r"], "gmm_cfg.x_r")
    case.close(average(teacher, x, t, r, label), case["gmm_cfg.u"], "gmm_cfg.u")


def flow(model: Denoiser | Teacher, x: Tensor, t: Tensor, r: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
    """The states [B, D] at times r [B] of the ODE through x [B, D] at times t [B], each row at a speed of its own."""

    def derivative(share: float, state: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(state).view_as(x)
        return (expand(r - t, x) * model(at, t + share * (r - t), cond, on=RF).velocity).flatten().numpy()

    solution = solve_ivp(derivative, (0, 1), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    assert solution.success, solution.message
    return torch.from_numpy(solution.y[:, -1]).view_as(x)


def average(model: Denoiser | Teacher, x: Tensor, t: Tensor, r: Tensor, cond: dict | None = None) -> Tensor:
    """u(x_t, r, t): (x_t - x_r) / (t - r), and v where t = r."""
    gap = torch.where(t > r, t - r, 1.0)[:, None]
    u = (x - flow(model, x, t, r, cond)) / gap
    return torch.where((t > r)[:, None], u, model(x, t, cond, on=RF).velocity)


def derivative(model: Mixture, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """du/dt along (v, 1, 0) by sixth-order central differences of the integrated u."""
    v, total = model(x, t).velocity, torch.zeros_like(x)
    for k, weight in SIXTH.items():
        ahead, behind = (average(model, x + s * k * H * v, t + s * k * H, r) for s in (1, -1))
        total += weight / H * (ahead - behind)
    return total


class Perfect(Denoiser):
    """A student that answers with given average velocities u whose derivative along the path is `slope`."""

    def __init__(self, t: Tensor, u: Tensor, slope: Tensor) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=tuple(u.shape[1:]))
        self.t, self.u, self.slope = t, u, slope

    def add_gap(self) -> None:
        """It is told what it knows."""

    def forward(
        self, x: Tensor, t: Tensor, cond: None = None, *, on: Path | None = None, r: Tensor | None = None
    ) -> Pair:
        velocity, time = self.u + expand(t - self.t, x) * self.slope, expand(t, x)
        return Pair(x - time * velocity, x + (1 - time) * velocity)


class Drawn(Batch):
    """The case's data, noise and times where a batch would draw its own."""

    def __init__(self, case: Case, name: str) -> None:
        super().__init__({"x0": case[f"{name}.x0"]}, torch.arange(len(case[f"{name}.x0"])), seed=0, step=0, steps=1)
        self.told = {part: case[f"{name}.{part}"] for part in ("eps", "t", "r")}

    def normal(self, tag: str, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        return self.told[tag]

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        return self.told.get(tag, torch.full_like(self.told["t"], 0.5))


def perfect_student(case: Case, name: str, model: Mixture) -> None:
    """The whole loss of a student with the case's u and du/dt is 0, and is not with the sign of (t - r) D swapped."""
    rows, plain = Drawn(case, name), LossConfig(power=0)
    config = MeanFlow.Config(spans=SpansConfig(kind="uniform", equal=0), loss=plain, drop_label=0)
    slope = case[f"{name}.dudt"].nan_to_num()
    found = []
    for sign in (1, -1):
        student = Perfect(rows.told["t"], case[f"{name}.u"], sign * slope)
        loss = MeanFlow(config, student, Teacher(model)).loss(rows)
        found.append(float(loss[0] if isinstance(loss, tuple) else loss))  # type: ignore[arg-type]
    assert found[0] < 1e-16 and found[1] > 1e-2, f"{name}: losses {found} of a perfect student, as is and swapped"
