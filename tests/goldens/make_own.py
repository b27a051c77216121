"""Make the small cases in `own/` (python -m tests.goldens.make_own) from formulas in float64 numpy.

Nothing of fastgen is imported: the conventions are written out again, posteriors use full matrix inverses, flows a
Runge-Kutta method of order 4. Directions and names are those of the kinds' own cases (reflow: t = 0 noise, t = 1 data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Made = tuple[str, dict[str, Any], dict[str, Array]]
SMIN = 1e-5


def head(group: str, kind: str, name: str, tolerance: dict[str, Any], **rest: Any) -> dict[str, Any]:
    start = {"schema": 1, "group": group, "kind_of_case": kind, "name": name, "tensors_file": f"{name}.safetensors"}
    return {**start, "dtypes": ["F64"], "tolerance": tolerance, **rest}


def vp_table(n: int, zero_snr: bool = False) -> tuple[Array, Array]:
    """alpha and sigma of the scaled-linear betas 0.00085 .. 0.012."""
    bar = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), n) ** 2)
    u = np.sqrt(bar)
    if zero_snr:
        u = (u - u[-1]) * u[0] / (u[0] - u[-1])
    return u, np.sqrt(1 - u**2)


def vp_levels(tau: Array, zero_snr: bool = False) -> tuple[Array, Array]:
    """ln(sigma / alpha) linear between indices; the floor 2^-24 of alpha^2 only inside the last interval."""
    a, q = vp_table(1000, zero_snr)
    floor = np.maximum(a, 2.0**-12)
    ratio = np.exp(np.interp(tau, np.arange(1000), np.log(np.sqrt(1 - floor**2) / floor)))
    alpha, last = 1 / np.sqrt(1 + ratio**2), tau == 999
    return np.where(last, a[-1], alpha), np.where(last, q[-1], ratio * alpha)


# --- views/convert


def views(x0: Array, eps: Array, a: Array, q: Array) -> dict[str, Array]:
    A, Q = a[:, None], q[:, None]
    x = A * x0 + Q * eps
    with np.errstate(divide="ignore"):
        found = {
            "x0": x0,
            "eps": eps,
            "score": -eps / Q,
            "rf_sigma": q / (a + q),
            "rf_x": x / (A + Q),
            "rf_v": eps - x0,
            "vp_v": (A * eps - Q * x0) / np.hypot(A, Q),
            "edm_sigma": q / a,
        }
    for label, sd in (("sd1", 1.0), ("sd025", 0.25)):
        t = np.arctan2(q, a * sd)
        found |= {
            f"trig_t_{label}": t,
            f"trig_x_{label}": x / np.sqrt(A**2 + (Q / sd) ** 2),
            f"trig_F_{label}": np.cos(t)[:, None] * eps - np.sin(t)[:, None] * x0 / sd,
        }
    return found


def convert() -> Made:
    """Conventions that strain a conversion most, at both ends and between."""
    sigma, tau, t = np.array([0.01, 1.5, 60.0]), np.array([0.0, 998.5, 999.0]), np.array([0.001, 0.6, 1.0])
    sd, angle = 0.5, np.array([0.03, 0.8, 1.55])
    norm = np.hypot(sigma, sd)
    entries = [
        (
            {"name": "ddpm_zsnr_v", "prediction_type": "v"},
            tau,
            *vp_levels(tau, True),
            lambda x0, e, a, q: a * e - q * x0,
        ),
        ({"name": "ddpm_eps", "prediction_type": "eps"}, tau, *vp_levels(tau), lambda x0, e, a, q: e),
        (
            {"name": "edm_F", "prediction_type": "edm_F", "sd": sd},
            np.log(sigma) / 4,
            np.ones(3),
            sigma,
            # D = c_skip x + c_out F solved for F
            lambda x0, e, a, q: (x0 - sd**2 / (q**2 + sd**2) * (x0 + q * e)) * norm[:, None] / (q * sd),
        ),
        (
            {"name": "trellis_flow", "prediction_type": "flow_smin", "smin": SMIN},
            1000 * t,
            1 - t,
            SMIN + (1 - SMIN) * t,
            lambda x0, e, a, q: (1 - SMIN) * e - x0,
        ),
        (
            {"name": "trig_F", "prediction_type": "trig_F", "sd": sd},
            angle,
            np.cos(angle),
            sd * np.sin(angle),
            lambda x0, e, a, q: a * e - (q / sd) * x0 / sd,
        ),
    ]
    random, tensors = np.random.default_rng(1), {}
    for entry, native, a, q, target in entries:
        x0, eps = random.standard_normal((2, len(a), 2))
        A, Q = a[:, None], q[:, None]
        values = {
            "x": A * x0 + Q * eps,
            "net_out": target(x0, eps, A, Q),
            "alpha": a,
            "sigma": q,
            "native_time": native,
        }
        values |= {f"view.{key}": value for key, value in views(x0, eps, a, q).items()}
        tensors |= {f"{entry['name']}.{key}": value for key, value in values.items()}
    tolerance = {"atol": 0.0, "rtol": 1e-8, "note": {"rtol_of_max_float64": 1e-8}}
    return "views", head("views", "convert", "convert_own", tolerance, cases=[e[0] for e in entries]), tensors


def schedules() -> Made:
    """Fractional indices inside the first, a middle and the last interval, and shifts that no other case has."""
    tensors: dict[str, Array] = {}

    def add(group: str, a: Array, q: Array, **values: Array) -> None:
        rest = {"rf_sigma": q / (a + q), "trig_t_sd1": np.arctan2(q, a), "trig_t_sd025": np.arctan2(q, 0.25 * a)}
        tensors.update({f"{group}.{key}": value for key, value in {**values, **rest}.items()})

    tau = np.array([0.0, 0.75, 333.3, 998.4, 999.0])
    for group, zero in (("ddpm", False), ("ddpm_zsnr", True)):
        a, q = vp_levels(tau, zero)
        with np.errstate(divide="ignore"):
            add(group, a, q, tau=tau, alpha=a, sigma=q, sigma_ve=q / a)
    sigma = np.array([0.002, 0.3, 7.0, 80.0])
    add("edm", np.ones(4), sigma, sigma=sigma, c_noise=np.log(sigma) / 4)
    u = np.array([0.0, 0.01, 0.5, 0.9, 1.0])
    for k in (1.0, 2.5):
        r = k * u / (1 + (k - 1) * u)
        add(f"rf_shift_{k}", 1 - r, r, u=u, sigma=r)
    q = SMIN + (1 - SMIN) * u
    add("trellis", 1 - u, q, t=u, sigma=q, net_time=1000 * u)
    groups = ["ddpm", "ddpm_zsnr", "edm", "rf_shift_1.0", "rf_shift_2.5", "trellis"]
    tolerance = {"atol": 1e-10, "rtol": 0.0, "note": {"atol": 1e-10}}
    return "views", head("views", "schedules", "schedules_own", tolerance, groups=groups), tensors


# --- methods/reflow_gmm


class Law:
    """A Gaussian mixture on X_t = t X1 + (1 - t) X0: E[X1 | x], E[X0 | x] and ln p, by matrix inverses."""

    def __init__(self, weights: Array, means: Array, covs: Array) -> None:
        self.weights, self.means, self.covs = weights, means, covs

    def posterior(self, x: Array, alpha: Array, sigma: Array) -> tuple[Array, Array, Array]:
        logs, data, noises = [], [], []
        a, q, eye = alpha[:, None, None], sigma[:, None, None], np.eye(x.shape[1])
        for w, m, s in zip(self.weights, self.means, self.covs, strict=True):
            total = a**2 * s + q**2 * eye
            inverse, offset = np.linalg.inv(total), (x - alpha[:, None] * m)[:, :, None]
            square = (offset.transpose(0, 2, 1) @ inverse @ offset)[:, 0, 0]
            logs.append(math.log(w) - 0.5 * (square + np.linalg.slogdet(2 * math.pi * total)[1]))
            data.append(m + (a * s @ inverse @ offset)[:, :, 0])
            noises.append((q * inverse @ offset)[:, :, 0])
        log = np.logaddexp.reduce(logs, axis=0)
        share = np.exp(np.array(logs) - log)[:, :, None]
        return (share * np.array(data)).sum(0), (share * np.array(noises)).sum(0), log

    def velocity(self, x: Array, t: float) -> Array:
        data, noise, _ = self.posterior(x, np.full(len(x), t), np.full(len(x), 1 - t))
        return data - noise


Velocity = Callable[[Array, float], Array]


def flow(velocity: Velocity, z: Array, stops: tuple[float, ...], steps: int = 400) -> tuple[Array, Array]:
    """States at the stops [S, B, D], and int |v|^2 dt [B] by Simpson's rule, with classical Runge-Kutta steps."""
    states, energy, x = [z], np.zeros(len(z)), z
    for begin, end in pairwise(stops):
        h = (end - begin) / steps
        for i in range(steps):
            t = begin + i * h
            k1 = velocity(x, t)
            k2 = velocity(x + h / 2 * k1, t + h / 2)
            k3 = velocity(x + h / 2 * k2, t + h / 2)
            k4 = velocity(x + h * k3, t + h)
            middle = x + h * (5 * k1 + 4 * k2 + 4 * k3 - k4) / 24  # third order in between, for the integral
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            squares = [(v**2).sum(1) for v in (k1, velocity(middle, t + h / 2), velocity(x, t + h))]
            energy = energy + h / 6 * (squares[0] + 4 * squares[1] + squares[2])
        states.append(x)
    return np.array(states), energy


def euler(velocity: Velocity, z: Array, n: int) -> Array:
    """All states, [n + 1, B, D]."""
    states = [z]
    for i in range(n):
        states.append(states[-1] + velocity(states[-1], i / n) / n)
    return np.array(states)


def discrete_straightness(states: Array) -> Array:
    """|delta / dt - (z1 - z0)|^2 for every step, noise and coordinate."""
    return ((states[1:] - states[:-1]) * (len(states) - 1) - (states[-1] - states[0])) ** 2


def rms(difference: Array) -> float:
    return float(np.sqrt((difference**2).sum(1).mean()))


def kernel(z0: Array, z1: Array, h: float) -> Velocity:
    def velocity(x: Array, t: float) -> Array:
        square = ((x[:, None] - (t * z1 + (1 - t) * z0)) ** 2).sum(-1) / (2 * h * h)
        weight = np.exp(square.min(1, keepdims=True) - square)
        return weight / weight.sum(1, keepdims=True) @ (z1 - z0)

    return velocity


def root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def reflow_gmm() -> Made:
    """Two components, six noises, twelve pairs, a table of 100 betas: other sizes than the cases we were given."""
    random = np.random.default_rng(2)
    covs = np.array([[[0.4, 0.1], [0.1, 0.3]], [[0.25, -0.1], [-0.1, 0.5]]])
    law = Law(np.array([0.6, 0.4]), np.array([[1.0, 0.4], [-0.9, -0.6]]), covs)
    z0 = random.standard_normal((6, 2))
    tensors = {"gmm_weights": law.weights, "gmm_means": law.means, "gmm_covs": law.covs, "z0": z0}
    results: dict[str, Any] = {}
    for part in (points(law, random), flows(law, z0, results), vp_part(law, z0, random, results)):
        tensors |= part
    tensors |= reflow(law, random, results)
    mean, cov = np.array([0.3, -0.7]), np.array([[0.5, 0.2], [0.2, 0.9]])
    tensors |= {"gauss_mean": mean, "gauss_cov": cov, "gauss_z1_for_z0": mean + z0 @ root(cov)}
    results["gauss_straightness_population"] = float((2 - math.pi / 2) * np.trace(root(cov)))
    note = "endpoints/velocity abs 1e-9; straightness rel 1e-8"
    tolerance = {"atol": 1e-9, "rtol": 1e-8, "note": note}
    return "methods", head("methods", "reflow_gmm", "reflow_gmm_own", tolerance, **results), tensors


def points(law: Law, random: np.random.Generator) -> dict[str, Array]:
    x, t = 1.5 * random.standard_normal((7, 2)), random.uniform(0.02, 0.98, 7)
    data, noise, log = law.posterior(x, t, 1 - t)
    score = -noise / (1 - t)[:, None]
    found = {"x": x, "t": t, "velocity": data - noise, "E_x1": data, "E_noise": noise, "score": score, "logp": log}
    return {f"pt_{key}": value for key, value in found.items()}


def flows(law: Law, z0: Array, results: dict[str, Any]) -> dict[str, Array]:
    stops = (0.0, 0.3, 1.0)
    states, energy = flow(law.velocity, z0, stops)
    z1 = states[-1]
    straight = energy - ((z1 - z0) ** 2).sum(1)
    h, weights = 2e-3, (0.75, -0.15, 1 / 60)
    moved = np.array([[z0 + k * h * axis for axis in np.eye(2)] for k in (1, 2, 3, -1, -2, -3)])
    ends = flow(law.velocity, moved.reshape(-1, 2), (0.0, 1.0))[0][-1].reshape(moved.shape)
    jacobian = sum(w / h * (ends[i] - ends[i + 3]) for i, w in enumerate(weights)).transpose(1, 2, 0)
    t = np.linspace(0, 1, 101)[:, None, None, None]
    det = np.linalg.det((1 - t) * np.eye(2) + t * jacobian)
    ends = {n: euler(law.velocity, z0, n) for n in (1, 3, 20)}
    off = discrete_straightness(ends[20])
    results |= {
        "straightness_1rf_mean_over_6_noises": float(straight.mean()),
        "min_det_of_straight_map_over_t_and_noises": float(det.min()),
        "fraction_noises_with_positive_det": float((det.min(0) > 0).mean()),
        "euler_end_rms_error_vs_exact": {str(n): rms(states[-1] - z1) for n, states in ends.items()},
        "discrete_straightness_euler20_mean_over_dims": float(off.mean()),
        "discrete_straightness_euler20_sum_over_dims": float(off.sum(-1).mean()),
    }
    found = {"z1": z1, "traj_t": np.array(stops), "traj": states, "straightness_per_noise": straight}
    return found | {f"euler_{n}": states[-1] for n, states in ends.items()}


def vp_part(law: Law, z0: Array, random: np.random.Generator, results: dict[str, Any]) -> dict[str, Array]:
    alpha, sigma = vp_table(100)
    index = np.array([0, 41, 99])
    a, q, x = alpha[index], sigma[index], random.standard_normal((3, 2))
    data, eps, _ = law.posterior(x, a, q)
    found = {"idx": index, "x": x, "eps": eps, "x1": data, "velocity": data - eps, "alphas_cumprod": alpha**2}
    found |= {"t_rf": a / (a + q), "x_rf": x / (a + q)[:, None]}
    times, x = [81, 61, 41, 21, 1], z0
    results["ddim5_timesteps"] = times
    for now, after in zip(times, [*times[1:], 0], strict=True):
        data, eps, _ = law.posterior(x, np.full(len(x), alpha[now]), np.full(len(x), sigma[now]))
        x = alpha[after] * data + sigma[after] * eps
    return {f"vp_{key}": value for key, value in found.items()} | {"ddim5_final_ab0": x, "ddim5_final_one": data}


def reflow(law: Law, random: np.random.Generator, results: dict[str, Any]) -> dict[str, Array]:
    noise, h, z = random.standard_normal((12, 2)), 0.4, random.standard_normal((3, 2))
    data, permutation = flow(law.velocity, noise, (0.0, 1.0))[0][-1], random.permutation(12)
    coupled, independent = kernel(noise, data, h), kernel(noise, data[permutation], h)
    fine, once, mixed = euler(coupled, z, 20), euler(coupled, z, 1), euler(independent, z, 20)
    query, times = random.standard_normal((4, 2)), random.uniform(0.1, 0.9, 4)
    results |= {
        "rf2_bandwidth": h,
        "straightness_2rf_kernel_3_noises": float(discrete_straightness(fine).sum(-1).mean()),
        "straightness_1rf_kernel_independent_coupling": float(discrete_straightness(mixed).sum(-1).mean()),
        "straightness_1rf_closed_form_same_3_noises": float(
            discrete_straightness(euler(law.velocity, z, 20)).sum(-1).mean()
        ),
        "one_step_gap_2rf": rms(once[-1] - fine[-1]),
        "one_step_gap_1rf": rms(euler(law.velocity, z, 1)[-1] - flow(law.velocity, z, (0.0, 1.0))[0][-1]),
    }
    return {
        "rf2_pairs_z0": noise,
        "rf2_pairs_z1": data,
        "rf2_test_z0": z,
        "rf2_euler20_end": fine[-1],
        "rf2_euler1_end": once[-1],
        "rf2_query_x": query,
        "rf2_query_t": times,
        "rf2_query_v": np.concatenate([coupled(query[i : i + 1], times[i]) for i in range(4)]),
        "rf1k_perm": permutation,
        "rf1k_euler20_end": mixed[-1],
    }


def make() -> Iterator[Made]:
    from tests.goldens.make_sim import sim_gauss

    yield from (convert(), schedules(), reflow_gmm(), sim_gauss())


def main() -> None:
    from safetensors.numpy import save_file

    for group, data, tensors in make():
        folder = Path(__file__).parent / "own" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{data['name']}.json").write_text(json.dumps(data, indent=1) + "\n")
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / data["tensors_file"])


if __name__ == "__main__":
    main()
