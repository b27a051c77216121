"""What the methods are held to: batches in float64, small networks that can be exactly right, a mixture in numpy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from fastgen import noise
from fastgen.denoiser import Denoiser
from fastgen.layout import Samples, expand
from fastgen.paths import Pair, Path, Prediction, RectifiedFlow
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.method import Batch, Method, parts_of
from fastgen.trainers.reflow import Reflow

RF = RectifiedFlow()
WEIGHTS = [0.3, 0.45, 0.25]
MEANS = [[2.0, 0.5], [-1.5, 1.2], [0.2, -2.1]]
COVS = [[[0.3, 0.1], [0.1, 0.12]], [[0.14, -0.07], [-0.07, 0.11]], [[0.2, 0.15], [0.15, 0.42]]]


# Errors in a line (t, x_t, v) between x0 and eps.
PLANTED = {
    "time runs backwards": lambda rows, t, x, v: (1 - t, x, v),
    "velocity towards the noise": lambda rows, t, x, v: (t, x, -v),
    "noise and data in the wrong order": lambda rows, t, x, v: (t, rows.x0 + rows["eps"] - x, -v),
}


def plant(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one of `PLANTED` into reflow."""
    line = Reflow.line
    monkeypatch.setattr(Reflow, "line", lambda self, rows: PLANTED[error](rows, *line(self, rows)))


class WideBatch(Batch):
    """The numbers of a `Batch` as float64, so that a loss can be compared with a formula to 1e-10."""

    def normal(self, tag: str, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        return super().normal(tag, shape, draw).double()

    def normal_like(self, tag: str, x: Samples, draw: int = 0) -> Samples:
        return super().normal_like(tag, x, draw).double()

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        return super().uniform(tag, shape, draw).double()


def batch(data: dict[str, Tensor], rows: Tensor | int, *, seed: int = 5) -> WideBatch:
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    return WideBatch(data, rows, seed=seed, step=0, steps=1)


def gaussian(n: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(method: Method, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a method on a batch, its parts added up, and its gradient by parameter."""
    loss = sum(part[0] if isinstance(part, tuple) else part for part in parts_of(method.loss(rows)))
    assert isinstance(loss, Tensor)
    names, parameters = zip(*method.student.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def gradient_norm(method: Method, rows: Batch) -> float:
    return float(torch.cat([g.flatten() for g in gradients(method, rows)[1].values()]).norm())


class Linear(Denoiser):
    """A velocity network v = A x + b + c t on a rectified flow, float64, whose gradients can be written down."""

    family = "linear"

    def __init__(self, shape: tuple[int, ...], seed: int = 3) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=shape)
        n = int(np.prod(shape))
        self.a, self.b, self.c = (
            nn.Parameter(0.3 * gaussian(k, (n,), seed + i).squeeze(0)) for i, k in enumerate((n, 1, 1))
        )

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        return (x.flatten(1) @ self.a.T + self.b + time[:, None] * self.c).view_as(x)


class PointMass(Denoiser):
    """The exact network of data that are all the point `m`, on any path and with any prediction; m is its weight."""

    family = "point"

    def __init__(self, path: Path, kind: Any, m: Tensor) -> None:
        super().__init__(None, path, Prediction(kind=kind, sd=getattr(path, "sd", 0.5)), shape=tuple(m.shape))
        self.m = nn.Parameter(m.clone())
        self.seen: list[float] = []

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        self.seen += time.tolist()
        alpha, sigma = self.path.levels(time)
        m = self.m.to(x.dtype).expand_as(x)
        return self.prediction.from_pair(Pair(m, (x - expand(alpha, x) * m) / expand(sigma, x)), alpha, sigma)


class Straight(Denoiser):
    """The exact velocity of the straight pairs x0 = m + R z of a rectified flow; m and R [D, D] are its weights.

    x_t = (1 - t) m + B_t z with B_t = (1 - t) R + t I, so v(x, t) = (I - R) B_t^-1 (x - (1 - t) m) - m.
    """

    family = "straight"

    def __init__(self, mean: Tensor, root: Tensor) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=tuple(mean.shape))
        self.mean, self.root = nn.Parameter(mean.clone()), nn.Parameter(root.clone())

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        eye, t = torch.eye(len(self.mean), dtype=x.dtype), time[:, None, None]
        z = torch.linalg.solve((1 - t) * self.root + t * eye, x - (1 - time[:, None]) * self.mean)
        return z @ (eye - self.root).T - self.mean


def small(num_classes: int | None = None, **options: Any) -> mlp.MLPDenoiser:
    """An untrained network of a few weights for points in the plane, float64."""
    return mlp.build(mlp.MLPConfig(width=8, depth=1, **options), (2,), num_classes).double()


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def mixture(labels: list[int] | None = None, components: list[int] | None = None) -> Mixture:
    """Three modes in the plane, or some of them; `labels` gives each a class."""
    kept = [0, 1, 2] if components is None else components
    tensors = [torch.tensor(v, dtype=torch.float64)[kept] for v in (WEIGHTS, MEANS, COVS)]
    return Mixture(*tensors, labels=None if labels is None else torch.tensor(labels))


def velocity(x: np.ndarray, t: float, components: list[int]) -> np.ndarray:
    """E[eps - x0 | x_t = x] of these components of the mixture, x [B, 2]: Bayes' rule, with nothing of ours in it."""
    logs, parts = [], []
    for k in components:
        mean, cov = np.array(MEANS[k]), np.array(COVS[k])
        total = (1 - t) ** 2 * cov + t**2 * np.eye(2)
        off = np.linalg.solve(total, (x - (1 - t) * mean).T).T
        logs.append(np.log(WEIGHTS[k]) - 0.5 * np.einsum("bi,bi->b", x - (1 - t) * mean, off))
        logs[-1] -= 0.5 * np.log(np.linalg.det(total))
        parts.append(t * off - (mean + (1 - t) * off @ cov))
    share = np.exp(np.array(logs) - np.max(logs, axis=0))
    return np.einsum("kb,kbi->bi", share / share.sum(0), np.array(parts))


def end_points(z: Tensor, components: list[int], guidance: float | None = None) -> Tensor:
    """Where the ODE takes the noise z [B, 2], to about 1e-10; guided against the whole mixture if asked."""

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        x = state.reshape(-1, 2)
        v = velocity(x, t, components)
        if guidance is not None:
            whole = velocity(x, t, [0, 1, 2])
            v = whole + guidance * (v - whole)
        return v.flatten()

    solution = solve_ivp(slope, (1.0, 0.0), z.double().numpy().flatten(), method="DOP853", rtol=1e-10, atol=1e-12)
    assert solution.success, solution.message
    return torch.from_numpy(solution.y[:, -1].reshape(-1, 2))


@lru_cache
def mixture_pairs(n: int, seed: int = 1) -> dict[str, Tensor]:
    """n pairs of the unconditional mixture, float32."""
    z = noise.normal(seed, "pairs", torch.arange(n), (2,))
    return {"x0": end_points(z, [0, 1, 2]).float(), "eps": z}


class Pairs:
    """A finished pair set in memory."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data["x0"])

    def get(self, index: Tensor) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.data.items()}
