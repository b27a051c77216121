"""Kinds of the group `methods`. Cases of reflow have t = 0 noise and t = 1 data, fastgen has t = 1 noise."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.paths import VP, Pair, Path, Prediction, RectifiedFlow
from fastgen.samplers.ode import solve, straightness, trajectory
from fastgen.teachers.mixture import Mixture
from tests.goldens.case import Case
from tests.goldens.sim import sim_gauss as sim_gauss

RF = RectifiedFlow()


def full(x: Tensor, t: float | Tensor) -> Tensor:
    return torch.full((len(x),), float(t), dtype=torch.float64)


def rms(difference: Tensor) -> Tensor:
    return difference.square().sum(1).mean().sqrt()


class Kernel(Denoiser):
    """Reflow by a kernel estimator: v(x, t) is the mean of x1_i - x0_i, weighted exp(-|x - x_t,i|^2 / (2 h^2))."""

    def __init__(self, noise: Tensor, data: Tensor, bandwidth: float) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=tuple(noise.shape[1:]))
        self.noise, self.data, self.bandwidth = noise, data, bandwidth

    def forward(self, x: Tensor, t: Tensor, cond: None = None, *, on: Path | None = None, r: None = None) -> Pair:
        t = t[:, None, None]
        middle = (1 - t) * self.data + t * self.noise
        weights = (-(x[:, None] - middle).square().sum(-1) / (2 * self.bandwidth**2)).softmax(-1)
        velocity = weights @ (self.noise - self.data)
        return Pair(x - t[:, :, 0] * velocity, x + (1 - t[:, :, 0]) * velocity)


def exact_flow(model: Denoiser, noise: Tensor, times: Sequence[float] = (1.0, 0.0)) -> tuple[Tensor, Tensor]:
    """(states [len(times), B, D], int |v|^2 dt [B]) of the ODE from `noise` at t = 1, to about 1e-12 (DOP853)."""
    n = noise.numel()

    def derivative(t: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[:n]).reshape(noise.shape)
        v = model(x, full(x, t), on=RF).velocity
        return np.concatenate([v.flatten().numpy(), -v.square().sum(1).numpy()])

    states = [np.concatenate([noise.flatten().numpy(), np.zeros(len(noise))])]
    for begin, end in pairwise(times):
        solution = solve_ivp(derivative, (begin, end), states[-1], method="DOP853", rtol=1e-12, atol=1e-13)
        assert solution.success, solution.message
        states.append(solution.y[:, -1])
    points = torch.stack([torch.from_numpy(state[:n]).reshape(noise.shape) for state in states])
    return points, torch.from_numpy(states[-1][n:])


def straightness_of(points: Tensor, energy: Tensor) -> Tensor:
    """int |v - (z1 - z0)|^2 dt = int |v|^2 dt - |z1 - z0|^2 for each noise, [B]."""
    return energy - (points[-1] - points[0]).square().sum(1)


def reflow_gmm(case: Case) -> None:
    """A Gaussian mixture: velocities, exact and discretised flows, straightness, and reflow by a kernel."""
    mixture = Mixture(case["gmm_weights"], case["gmm_means"], case["gmm_covs"])
    path = VP(n=len(case["vp_alphas_cumprod"]))
    posterior(case, mixture)
    noise_levels(case, mixture, path)
    # One integration for all: its cost lies in the number of calls, not in their size.
    starts = [neighbours(case["z0"]), case["rf2_pairs_z0"], case["rf2_test_z0"]]
    around, pairs, test = exact_flow(mixture, torch.cat(starts))[0][-1].split([len(z) for z in starts])
    exact(case, mixture)
    straight_map(case, around)
    discretised(case, mixture)
    ddim(case, mixture, path)
    reflowed(case, mixture, pairs, test)
    one_gaussian(case)


def posterior(case: Case, mixture: Mixture) -> None:
    limit = {"atol": case.noted("velocity abs"), "rtol": 0.0}
    x, t = case["pt_x"], 1 - case["pt_t"]
    pair = mixture(x, t)
    case.close(-pair.velocity, case["pt_velocity"], "pt_velocity", **limit)
    case.close(pair.x0, case["pt_E_x1"], "pt_E_x1")
    case.close(pair.eps, case["pt_E_noise"], "pt_E_noise")
    case.close(mixture.score(x, t), case["pt_score"], "pt_score")
    case.close(mixture.log_prob(x, t), case["pt_logp"], "pt_logp")


def noise_levels(case: Case, mixture: Mixture, path: VP) -> None:
    """A velocity from a noise prediction: the same numbers natively, through Prediction, and on the rectified flow."""
    x, t = case["vp_x"], case["vp_idx"].double()
    case.close(path.table()[0] ** 2, case["vp_alphas_cumprod"], "vp_alphas_cumprod")
    levels = path.levels(t)
    pair = mixture(x, t, on=path)
    from_eps = Prediction(kind="eps").to_pair(case["vp_eps"], x, *levels)
    scale = sum(levels)
    on_flow = mixture(case["vp_x_rf"], 1 - case["vp_t_rf"])
    case.close(1 - RF.time(*levels), case["vp_t_rf"], "vp_t_rf")
    case.close(x / scale[:, None], case["vp_x_rf"], "vp_x_rf")
    for found, way in ((pair, "native"), (from_eps, "from eps"), (on_flow, "rectified flow")):
        case.close(found.eps, case["vp_eps"], f"vp_eps {way}")
        case.close(found.x0, case["vp_x1"], f"vp_x1 {way}")
        case.close(-found.velocity, case["vp_velocity"], f"vp_velocity {way}")


def exact(case: Case, mixture: Mixture) -> None:
    """End points, the states between, and straightness."""
    points_limit, straight_limit = case.noted("endpoints/velocity abs"), case.noted("straightness rel")
    z0, given = case["z0"], case["traj_t"].tolist()
    points, energy = exact_flow(mixture, z0, [1 - t for t in given])
    case.close(points, case["traj"], "traj", atol=points_limit, rtol=0)
    case.close(points[-1], case["z1"], "z1", atol=points_limit, rtol=0)
    each = straightness_of(points, energy)
    relative = (each / case["straightness_per_noise"] - 1).abs().max()
    assert relative <= straight_limit, f"straightness_per_noise: off by {relative:.3g} of itself"
    mean = case.result(r"straightness_1rf_mean_over_\d+_noises")
    case.close(each.mean(), mean, "mean straightness", atol=0, rtol=straight_limit)


STEP = 2e-3


def neighbours(z0: Tensor) -> Tensor:
    """Each noise moved by 1, 2, 3, -1, -2, -3 steps along each axis, [B 6 D, D]."""
    steps = STEP * torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    moved = z0[:, None, None] + steps[:, None, None] * torch.eye(z0.shape[1], dtype=torch.float64)
    return moved.flatten(0, 2)


def straight_map(case: Case, around: Tensor) -> None:
    """det of d/dz0 of z_t = (1 - t) z0 + t z1(z0), by sixth-order differences of the exact flow of the neighbours."""
    d = around.shape[1]
    ends = around.reshape(-1, 6, d, d)
    weights = (0.75 / STEP, -0.15 / STEP, 1 / 60 / STEP)
    jacobian = sum(w * (ends[:, i] - ends[:, i + 3]) for i, w in enumerate(weights)).transpose(1, 2)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None, None, None]
    det = ((1 - t) * torch.eye(d, dtype=torch.float64) + t * jacobian).det()
    case.close((det.amin(0) > 0).double().mean(), case.result("fraction_noises_with_positive_det"), "positive det")
    # A case does not say which times it looked at: only a minimum at an end of [0, 1] is the same for all.
    at = det.amin(1).argmin()
    rtol = None if at in (0, len(t) - 1) else 1e-3
    case.close(det.min(), case.result("min_det_of_straight_map.*"), "smallest det", rtol=rtol)


def discretised(case: Case, mixture: Mixture) -> None:
    """Euler with the step counts that the tensors are named after."""
    limit, z0 = case.noted("endpoints/velocity abs"), case["z0"]
    errors = case.result("euler_end_rms_error_vs_exact")
    for match in case.names(r"euler_(\d+)"):
        end = solve(mixture, z0, steps=int(match[1]), solver="euler")
        case.close(end, case[match[0]], match[0], atol=limit, rtol=0)
        case.close(rms(end - case["z1"]), errors[match[1]], f"rms error of {match[0]}")
    for key in [key for key in case.data if key.startswith("discrete_straightness")]:
        steps, reduction = re.fullmatch(r"discrete_straightness_euler(\d+)_(mean|sum)_over_dims", key).groups()
        found = straightness(mixture, z0, steps=int(steps)) / (z0.shape[1] if reduction == "mean" else 1)
        case.close(found, case.result(key), key)
        states = torch.stack(list(trajectory(mixture, z0, steps=int(steps), solver="euler")))
        off = (states[1:] - states[:-1]) * int(steps) - (states[-1] - states[0])
        case.close(off.square().mean() if reduction == "mean" else off.square().sum(-1).mean(), case.result(key), key)


def ddim(case: Case, mixture: Mixture, path: VP) -> None:
    """DDIM on the case's own indices, from unit noise, ending on index 0 or on clean data."""
    for match in case.names(r"ddim(\d+)_final_(ab0|one)"):
        times = case.result(f"ddim{match[1]}_timesteps")
        assert len(times) == int(match[1])
        final = (1.0, 0.0) if match[2] == "one" else tuple(v[0].item() for v in path.table())
        end = solve(mixture, case["z0"], path=path, times=times, solver="euler", init="unit", final=final)
        case.close(end, case[match[0]], match[0], atol=case.noted("endpoints/velocity abs"), rtol=0)


def reflowed(case: Case, mixture: Mixture, pairs: Tensor, test: Tensor) -> None:
    """One reflow with the kernel estimator, and the same on an independent coupling; exact ends of pairs and tests."""
    noise, data, bandwidth = case["rf2_pairs_z0"], case["rf2_pairs_z1"], case.result("rf2_bandwidth")
    limit = case.noted("endpoints/velocity abs")
    case.close(pairs, data, "rf2_pairs_z1", atol=limit, rtol=0)
    coupled = Kernel(noise, data, bandwidth)
    independent = Kernel(noise, data[case["rf1k_perm"]], bandwidth)
    query = coupled(case["rf2_query_x"], 1 - case["rf2_query_t"])
    case.close(-query.velocity, case["rf2_query_v"], "rf2_query_v", atol=limit, rtol=0)
    z, ends = case["rf2_test_z0"], {}
    for match in case.names(r"(rf2|rf1k)_euler(\d+)_end"):
        model = coupled if match[1] == "rf2" else independent
        ends[match[1], int(match[2])] = solve(model, z, steps=int(match[2]), solver="euler")
        case.close(ends[match[1], int(match[2])], case[match[0]], match[0], atol=limit, rtol=0)
    steps = max(n for name, n in ends if name == "rf2")  # the fine grid, on which straightness is measured too
    relative = {"atol": 0.0, "rtol": case.noted("straightness rel")}
    for model, key in (
        (coupled, r"straightness_2rf_kernel_\d+_noises"),
        (independent, "straightness_1rf_kernel_independent_coupling"),
        (mixture, r"straightness_1rf_closed_form_same_\d+_noises"),
    ):
        case.close(straightness(model, z, steps=steps), case.result(key), key, **relative)
    gap = rms(ends["rf2", 1] - ends["rf2", steps])
    case.close(gap, case.result("one_step_gap_2rf"), "one_step_gap_2rf")
    gap = rms(solve(mixture, z, steps=1, solver="euler") - test)
    case.close(gap, case.result("one_step_gap_1rf"), "one_step_gap_1rf")


def one_gaussian(case: Case) -> None:
    """The flow of N(m, S) is z0 -> m + S^(1/2) z0, its straightness (2 - pi / 2) trace S^(1/2)."""
    mean, cov = case["gauss_mean"], case["gauss_cov"]
    gaussian = Mixture(torch.ones(1), mean[None], cov[None])
    points, _ = exact_flow(gaussian, case["z0"])
    case.close(points[-1], case["gauss_z1_for_z0"], "gauss_z1_for_z0", atol=case.noted("velocity abs"), rtol=0)
    # Velocities are affine in z0, so their values at 0 and at the unit vectors give the mean over all noises exactly.
    eye = torch.eye(len(mean), dtype=torch.float64)
    corners = torch.cat([torch.zeros_like(mean)[None], eye])
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))
    population = 0.0
    for t, weight in zip(0.5 * nodes + 0.5, 0.5 * weights, strict=True):
        x = t * mean + corners @ root(t**2 * cov + (1 - t) ** 2 * eye)
        off = -gaussian(x, 1 - t.expand(len(x))).velocity - (mean + corners @ (root(cov) - eye))
        population += weight * (off[0].square().sum() + (off[1:] - off[0]).square().sum())
    expected = case.result("gauss_straightness_population")
    case.close(population, expected, "gauss_straightness_population", atol=0, rtol=case.noted("straightness rel"))
    case.close((2 - math.pi / 2) * root(cov).trace(), expected, "closed form")


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T
