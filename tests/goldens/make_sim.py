"""The small case of `sim_gauss`: closed forms and gradients by hand for a student A z + b and a Gaussian teacher.

Two parameters (the second the optimum), two levels, five samples; see `make_own` for the rules these files follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.goldens.make_own import Array, Law, Made, head

MU, S, EYE = np.array([0.7, -0.3]), np.array([[0.8, 0.3], [0.3, 0.5]]), np.eye(2)
A = np.stack([np.array([[0.9, -0.2], [0.4, 0.6]]), np.linalg.cholesky(S)])
B = np.stack([np.array([-0.2, 0.5]), MU])
SIGMA, HUBER = np.array([0.8, 2.0]), np.array([1.0])


def sim_gauss() -> Made:
    random = np.random.default_rng(7)
    tensors = {"teacher_mean": MU, "teacher_cov": S, "A": A, "b": B, "sigma": SIGMA, "huber_c": HUBER}
    tensors |= population() | batch(random) | divergences()
    note = "rel 1e-9 in float64 for batch_* and pop_l2/fisher/kl; 1e-7 for pop_ph; 1e-8 gmm_div"
    tolerance = {"atol": 1e-10, "rtol": 1e-7, "note": note}
    return "methods", head("methods", "sim_gauss", "sim_gauss_own", tolerance), tensors


def population() -> dict[str, Array]:
    """Expectations over all noises: [parameter, level, ...], pseudo-Huber with c in front."""
    table = [[_population(a, b, sigma) for sigma in SIGMA] for a, b in zip(A, B, strict=True)]
    found = {f"pop_{key}": np.array([[cell[key] for cell in row] for row in table]) for key in table[0][0]}
    return {key: value[None] if key.startswith("pop_ph") else value for key, value in found.items()}


def _population(a: Array, b: Array, sigma: float) -> dict[str, Any]:
    c, q = a @ a.T + sigma**2 * EYE, S + sigma**2 * EYE
    ci, qi = np.linalg.inv(c), np.linalg.inv(q)
    m, shift = qi - ci, qi @ (b - MU)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weight = np.outer(weights, weights).ravel() / weights.sum() ** 2
    off = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2) @ np.linalg.cholesky(c).T
    y = off @ m.T + shift
    norm = np.sqrt((y**2).sum(1) + HUBER[0] ** 2)
    u = y / norm[:, None]
    half = ci @ (weight[:, None] * off).T @ u @ ci
    kl = np.trace(qi @ c) - 2 + (b - MU) @ qi @ (b - MU) + np.log(np.linalg.det(q) / np.linalg.det(c))
    return {
        "l2_A": 2 * (ci @ m + m @ ci) @ a,
        "l2_b": 2 * ci @ shift,
        "fisherfull_A": 2 * (qi @ qi - ci @ ci) @ a,
        "fisherfull_b": 2 * qi @ shift,
        "kl_A": m @ a,
        "kl_b": shift,
        "fisher": shift @ shift + np.trace(m @ c @ m),
        "kl": 0.5 * kl,
        "ph_A": (half + half.T) @ a,
        "ph_b": ci @ (weight @ u),
        "ph": weight @ (norm - HUBER[0]),
    }


def batch(random: np.random.Generator) -> dict[str, Array]:
    """Per-sample losses at parameter 0, and their mean's gradients by the chain rule: x moves x_t and x alike."""
    z, n, sigma = random.standard_normal((5, 2)), random.standard_normal((5, 2)), random.uniform(0.2, 3, 5)
    a, b = A[0], B[0]
    x = z @ a.T + b
    noisy = x + sigma[:, None] * n
    k_r, k_f = ([c @ np.linalg.inv(c + s**2 * EYE) for s in sigma] for c in (S, a @ a.T))
    real = MU + np.einsum("bij,bj->bi", k_r, noisy - MU)
    fake = b + np.einsum("bij,bj->bi", k_f, noisy - b)
    apart, own = np.array(k_f) - np.array(k_r), np.array(k_f) - EYE  # d (D_f - D_r) / dx and d (D_f - x) / dx

    def back(jacobian: Array, v: Array) -> Array:
        return np.einsum("bij,bi->bj", jacobian, v)

    def cross(u: Array) -> tuple[Array, Array, Array]:
        """y, y.e and its gradient by x, in the units u [B, 1]."""
        y, e = u * (fake - real), u * (fake - x)
        return y, (y * e).sum(1), u * (back(apart, e) + back(own, y))

    found: dict[str, tuple[Array, Array]] = {}
    y, ye, by_ye = cross(sigma[:, None] ** -2)
    found["sim_l2_0"] = -2 * ye, -2 * by_ye
    for name, c, u in (("sim_ph_1.0", 1.0, sigma[:, None] ** -2), ("sim_ph_x0_0.5", 0.5, np.ones((5, 1)))):
        y, ye, by_ye = cross(u)
        r = np.sqrt((y**2).sum(1) + c * c)
        found[name] = -ye / r, -by_ye / r[:, None] + (ye / r**3)[:, None] * u * back(apart, y)
    y, ye, by_ye = cross(np.ones((5, 1)))
    omega = np.abs(x - real).mean(1)
    for alpha in (1.0, 1.2):
        value = (1 - alpha) * (y**2).sum(1) - ye
        found[f"sid_{alpha}"] = value / omega, (2 * (1 - alpha) * back(apart, y) - by_ye) / omega[:, None]
    found["vsd_nograd_0"] = (y * x).sum(1), y
    g = y / (omega + 1e-6)[:, None]
    found["vsd_norm_0"] = 0.5 * (g**2).sum(1), g
    tensors = {"batch_z": z, "batch_n": n, "batch_sigma": sigma}
    for name, (loss, by_x) in found.items():
        tensors[f"batch_{name}_loss_per_sample"] = loss
        tensors[f"batch_{name}_grad_A"], tensors[f"batch_{name}_grad_b"] = by_x.T @ z / 5, by_x.mean(0)
    return tensors


def divergences() -> dict[str, Array]:
    """Between two mixtures at one level, by the trapezoidal rule."""
    sigma = 0.9
    covs = np.array([[[0.4, 0.1], [0.1, 0.3]], [[0.25, -0.1], [-0.1, 0.5]]])
    teacher = Law(np.array([0.6, 0.4]), np.array([[1.0, 0.4], [-0.9, -0.6]]), covs)
    student = Law(np.array([0.5, 0.5]), np.array([[0.6, 0.1], [-0.8, 0.2]]), covs[::-1].copy())
    axis = np.linspace(-9, 9, 241)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    seen = [law.posterior(x, np.ones(len(x)), np.full(len(x), sigma)) for law in (teacher, student)]
    mass = np.exp(seen[1][2]) * (axis[1] - axis[0]) ** 2
    gap = ((seen[0][1] - seen[1][1]) ** 2).sum(1) / sigma**2
    tensors = {f"gmm_teacher_{name}": getattr(teacher, name) for name in ("weights", "means", "covs")}
    tensors |= {f"gmm_student_{name}": getattr(student, name) for name in ("weights", "means", "covs")}
    return tensors | {
        "gmm_div_sigma": np.array([sigma]),
        "gmm_div_fisher": np.array([mass @ gap]),
        "gmm_div_pseudohuber_c0p5": np.array([mass @ (np.sqrt(gap + 0.25) - 0.5)]),
        "gmm_div_kl_student_to_teacher": np.array([mass @ (seen[1][2] - seen[0][2])]),
    }
