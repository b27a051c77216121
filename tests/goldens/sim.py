"""The kind `sim_gauss`: a student x = A z + b, a Gaussian teacher, the exact fake score, all gradients in closed form.

Losses come from `fastgen.trainers.sim` through a `Sim` on denoisers, never from formulas written here again.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.layout import sumsq
from fastgen.paths import EDM, Prediction
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.fake_score import distribution_matching, one_step
from fastgen.trainers.sim import LossConfig, Sim, losses, slope
from tests.goldens.case import Case

PATH = EDM()


class Affine(Denoiser):
    """A student whose one step from the noise z is A z + b."""

    def __init__(self, a: Tensor, b: Tensor, sigma_init: float) -> None:
        super().__init__(None, PATH, Prediction(kind="x0"), shape=tuple(b.shape))
        self.a, self.b, self.sigma_init = nn.Parameter(a.clone()), nn.Parameter(b.clone()), sigma_init

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Any) -> Tensor:
        return x / self.sigma_init @ self.a.T + self.b


def gaussian(mean: Tensor, cov: Tensor) -> Mixture:
    return Mixture(torch.ones(1), mean[None], cov[None])


def method(case: Case, index: int, **loss: Any) -> Sim:
    """SIM with the case's teacher, and student and exact fake at its parameter number `index`."""
    config = Sim.Config(loss=LossConfig(**loss))
    a, b = case["A"][index], case["b"][index]
    teacher = Teacher(gaussian(case["teacher_mean"], case["teacher_cov"]))
    return Sim(config, Affine(a, b, config.sigma_init), teacher, fake=gaussian(b, a @ a.T))


def evaluated(sim: Sim, z: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, D_r and D_f of given noises."""
    x = one_step(sim.student, sim.spec, z, None)
    return (x, *sim.scores(x, sigma, noise, None))


def gradients(sim: Sim, loss: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, [sim.student.a, sim.student.b])


def sim_gauss(case: Case) -> None:
    batch(case)
    for index, level in itertools.product(range(len(case["A"])), range(len(case["sigma"]))):
        population(case, index, level)
        for c in range(len(case["huber_c"])):
            robust(case, index, level, c)
    mixtures(case)


def noted(case: Case, what: str) -> float:
    """A tolerance of the case's note, which here stands before what it is for."""
    match = re.search(rf"([0-9.e+-]+) {what}", case.data["tolerance"]["note"])
    assert match, f"the note names no tolerance for {what}"
    return float(match[1])


def settings(name: str) -> dict[str, Any]:
    """The loss that the name of a batch tensor means; c is absolute there and over sqrt(n = 2) here."""
    kind, number = name.rsplit("_", 1)
    huber = {"kind": "pseudo_huber", "huber_c": float(number) / math.sqrt(2) if "ph" in kind else 1.0}
    return {
        "sim_l2": {"kind": "l2", "space": "score"},
        "sim_ph": {**huber, "space": "score"},
        "sim_ph_x0": {**huber, "space": "x0"},
        "sid": {"kind": "sid", "alpha": float(number), "weight": "inv_mean_abs"},
        "vsd_nograd": {"kind": "diff_instruct"},
        "vsd_norm": {},
    }[kind]


def batch(case: Case) -> None:
    """Fixed noises at parameter 0: the loss of each sample, and its mean's gradient through x and x_t."""
    exact, sigma = {"atol": 0.0, "rtol": case.noted("rel")}, case["batch_sigma"]
    for match in case.names(r"batch_(\w+_[\d.]+)_loss_per_sample"):
        sim = method(case, 0, **settings(match[1]))
        found = evaluated(sim, case["batch_z"], case["batch_n"], sigma)
        if match[1].startswith("vsd_norm"):
            each = distribution_matching(*found)
        else:
            each = losses(sim.config.loss, *found, sigma)
        case.close(each.detach(), case[match[0]], match[0], **exact)
        for found_gradient, name in zip(gradients(sim, each.mean()), "Ab", strict=True):
            key = f"batch_{match[1]}_grad_{name}"
            case.close(found_gradient, case[key], key, **exact)


@lru_cache
def nodes(orders: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Points [N, len(orders)] and weights [N] of Gauss-Hermite quadrature for standard normal numbers."""
    axes = [np.polynomial.hermite_e.hermegauss(order) for order in orders]
    points = np.stack([p.ravel() for p in np.meshgrid(*(x for x, _ in axes), indexing="ij")], axis=1)
    weights = np.prod([w.ravel() for w in np.meshgrid(*(w for _, w in axes), indexing="ij")], axis=0)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())


def expected_loss(sim: Sim, points: Tensor, weights: Tensor, sigma: Tensor) -> Tensor:
    z, noise = points.split(2, dim=1)
    level = sigma.expand(len(points))
    return weights @ losses(sim.config.loss, *evaluated(sim, z, noise, level), level)


def population(case: Case, index: int, level: int) -> None:
    """Losses that are quadratic in the noises, so that three nodes an axis give their expectation exactly."""
    sigma, (points, weights) = case["sigma"][level], nodes((3, 3, 3, 3))
    limit = {"rtol": case.noted("rel")}
    for name, factor, loss in (
        ("l2", 1, {"kind": "l2"}),
        ("fisherfull", 2, {"kind": "sid", "alpha": 0.5}),  # half of |y|^2 with the law of x_t moving too
        ("kl", 1, {"kind": "diff_instruct"}),
    ):
        sim = method(case, index, space="score", **loss)
        found = gradients(sim, factor * expected_loss(sim, points, weights, sigma))
        for gradient, parameter in zip(found, "Ab", strict=True):
            key = f"pop_{name}_{parameter}"
            case.close(gradient, case[key][index, level], f"{key}[{index}, {level}]", **limit)
    x, real, fake = evaluated(sim, *points.split(2, dim=1), sigma.expand(len(points)))
    gap = (fake - real) / sigma**2
    case.close(weights @ sumsq(gap), case["pop_fisher"][index, level], "pop_fisher", **limit)
    noisy, levels = x + sigma * points[:, 2:], sigma.expand(len(points))
    ours, theirs = (model.log_prob(noisy, levels, on=PATH) for model in (sim.fake.denoiser, sim.teacher.denoiser))
    case.close(weights @ (ours - theirs), case["pop_kl"][index, level], "pop_kl", **limit)


def robust(case: Case, index: int, level: int, c: int) -> None:
    """Pseudo-Huber: not polynomial in x_t, but quadratic in what is left of the noises once x_t is known.

    The case's gradients are grad_A = (G + G^T) A, G^T = C^-1 K C^-1, K = E (x_t - b) d'(y)^T and grad_b = C^-1 E d'(y)
    on 120 x 120 nodes about the Cholesky factor of C. Below sigma = 1 these are too few for the integral to settle, and
    the loss's own gradient, equal to it by an integration by parts, is then only near it.
    """
    sigma, huber, rtol = case["sigma"][level], case["huber_c"][c], noted(case, "for pop_ph")
    sim = method(case, index, kind="pseudo_huber", space="score", huber_c=float(huber) / math.sqrt(2))
    a, b = case["A"][index], case["b"][index]
    to_noisy = torch.cat([a, sigma * torch.eye(2, dtype=torch.float64)], dim=1)
    cov = to_noisy @ to_noisy.T
    seen = torch.linalg.solve(torch.linalg.cholesky(cov), to_noisy)  # orthonormal rows: all that moves x_t
    unseen = torch.linalg.qr(seen.T, mode="complete")[0][:, 2:].T
    points, weights = nodes((120, 120, 2, 2))
    points = points @ torch.cat([seen, unseen])
    levels = sigma.expand(len(points))
    x, real, fake = evaluated(sim, *points.split(2, dim=1), levels)
    own = gradients(sim, weights @ losses(sim.config.loss, x, real, fake, levels))
    x, y = x.detach(), ((fake - real) / sigma**2).detach()
    u = slope(sim.config.loss, y)
    noisy, inverse = x + sigma * points[:, 2:], torch.linalg.inv(cov)
    half = inverse @ ((noisy - b) * weights[:, None]).T @ u @ inverse
    formula = (half + half.T) @ a, inverse @ (weights @ u)
    for parameter, exact, found in zip("Ab", formula, own, strict=True):
        key = f"pop_ph_{parameter}"
        where, expected = f"{key}[{c}, {index}, {level}]", case[key][c, index, level]
        case.close(exact, expected, where, rtol=rtol)
        case.close(found, expected, f"{where} of the loss", rtol=rtol if sigma >= 1 else 5e-3, atol=1e-7)
    distance = (sumsq(y) + huber**2).sqrt() - huber
    case.close(weights @ distance, case["pop_ph"][c, index, level], "pop_ph", rtol=rtol)


def mixtures(case: Case) -> None:
    """Divergences between two mixtures on a grid that both leave nothing outside of."""
    limit = {"rtol": noted(case, "gmm_div")}
    names = ("weights", "means", "covs")
    ours, theirs = (Mixture(*(case[f"gmm_{who}_{name}"] for name in names)) for who in ("student", "teacher"))
    for i, sigma in enumerate(case["gmm_div_sigma"]):
        reach = 5 + 7 * float(sigma)
        axis = torch.linspace(-reach, reach, 501, dtype=torch.float64)
        x = torch.cartesian_prod(axis, axis)
        log = ours.log_prob(x, sigma.expand(len(x)), on=PATH)
        x, log = x[log > log.max() - 45], log[log > log.max() - 45]
        level = sigma.expand(len(x))
        log_other, mass = theirs.log_prob(x, level, on=PATH), log.exp() * (axis[1] - axis[0]) ** 2
        assert abs(float(mass.sum()) - 1) < 1e-9
        gap = sumsq(theirs.score(x, level, on=PATH) - ours.score(x, level, on=PATH))
        case.close(mass @ gap, case["gmm_div_fisher"][i], "gmm_div_fisher", **limit)
        case.close(mass @ (log - log_other), case["gmm_div_kl_student_to_teacher"][i], "gmm_div_kl", **limit)
        for match in case.names(r"gmm_div_pseudohuber_c(\d+)p(\d+)"):
            c = float(f"{match[1]}.{match[2]}")
            case.close(mass @ ((gap + c * c).sqrt() - c), case[match[0]][i], match[0], **limit)
