"""The closed-form teacher: a Gaussian mixture, exact on every path, in any dimension, with classes or without.

With x = alpha x0 + sigma eps and component k of x0 being N(m_k, S_k), component k of x is N(alpha m_k, C_k) with
C_k = alpha^2 S_k + sigma^2 I, and the posterior means are
    E[x0 | x, k]  = m_k + alpha S_k C_k^-1 (x - alpha m_k)
    E[eps | x, k] = sigma C_k^-1 (x - alpha m_k)
weighted by the responsibilities of the components: finite at both ends of a path.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fastgen import files, noise
from fastgen.cond import Cond
from fastgen.config import Model, validate
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand, wide
from fastgen.paths import Pair, Path, Prediction, RectifiedFlow


class MixtureConfig(Model):
    """weights [K] (normalised here), means [K, D], covs [K, D, D]; labels [K] gives each component a class."""

    family: str = "mixture"
    weights: list[float]
    means: list[list[float]]
    covs: list[list[list[float]]]
    labels: list[int] | None = None


class Mixture(Denoiser):
    """A Gaussian mixture as a denoiser without a network. Arithmetic is in float64, pairs have the dtype of x."""

    family = "mixture"
    weights: Tensor
    means: Tensor
    covs: Tensor
    values: Tensor
    vectors: Tensor
    labels: Tensor | None
    shares: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, labels: Tensor | None = None) -> None:
        weights, means, covs = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covs))
        _check(weights, means, covs, labels)
        classes = None if labels is None else int(labels.max()) + 1
        super().__init__(None, RectifiedFlow(), Prediction(kind="flow"), shape=(means.shape[1],), num_classes=classes)
        values, vectors = torch.linalg.eigh(covs)
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("covs", covs)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.register_buffer("labels", labels)
        self.register_buffer("shares", self._shares())

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, on: Path | None = None, r: Tensor | None = None
    ) -> Pair:
        """The exact pair (E[x0 | x], E[eps | x]) at x [B, D], t [B] of any path."""
        pair, _ = self._posterior(x, *(on or self.path).levels(wide(t)), cond)
        dtype = wide(x).dtype
        return Pair(pair.x0.to(dtype), pair.eps.to(dtype))

    def log_prob(self, x: Tensor, t: Tensor, cond: Cond = None, *, on: Path | None = None) -> Tensor:
        """ln p_t(x), float64 [B]."""
        return self._posterior(x, *(on or self.path).levels(wide(t)), cond)[1]

    def score(self, x: Tensor, t: Tensor, cond: Cond = None, *, on: Path | None = None) -> Tensor:
        """grad ln p_t(x) = -E[eps | x] / sigma, [B, D]; infinite where sigma is 0."""
        _, sigma = (on or self.path).levels(wide(t))
        return -self(x, t, cond, on=on).eps / expand(sigma, x)

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Pair, Tensor]:
        x, alpha, sigma = x.double(), alpha.double()[:, None, None], sigma.double()[:, None, None]
        offset = (x[:, None] - alpha * self.means)[..., None, :] @ self.vectors  # [B, K, 1, D] in eigenvectors
        offset = offset.squeeze(-2)
        variance = alpha**2 * self.values + sigma**2
        whitened = offset / variance
        log = self._log_weights(cond, len(x)) - 0.5 * (offset * whitened + (2 * torch.pi * variance).log()).sum(-1)
        share = log.softmax(-1)[..., None]
        back = self.vectors.transpose(-1, -2)
        x0 = self.means + ((alpha * self.values * whitened)[..., None, :] @ back).squeeze(-2)
        eps = ((sigma * whitened)[..., None, :] @ back).squeeze(-2)
        return Pair((share * x0).sum(1), (share * eps).sum(1)), log.logsumexp(-1)

    def _shares(self) -> Tensor:
        """ln of the components' weights given each label, [num_classes + 1, K]; the null label means all of them."""
        log = self.weights.log()
        if self.labels is None:
            return log[None]
        inside = self.labels == torch.arange(int(self.labels.max()) + 1)[:, None]
        return torch.cat([log.masked_fill(~inside, -torch.inf).log_softmax(-1), log[None]])

    def _log_weights(self, cond: Cond, n: int) -> Tensor:
        """ln of the weights given the condition, [B, K]."""
        if cond is None or self.labels is None:
            return self.shares[-1].expand(n, -1)
        # Not plain indexing: a label outside the range is an error, -1 included.
        return embedding(cond["label"], self.shares)

    def sample(self, seed: int, tag: str, rows: Tensor, cond: Cond = None) -> Tensor:
        """Exact draws of x0, float32 [B, D], one per global row number."""
        u = noise.uniform(seed, f"{tag}/component", rows).double()
        k = torch.searchsorted(self._log_weights(cond, len(rows)).exp().cumsum(-1), u[:, None]).squeeze(1)
        k = k.clamp_max(len(self.means) - 1)
        z = noise.normal(seed, f"{tag}/value", rows, self.shape).double()
        scaled = (z * self.values[k].sqrt())[:, None] @ self.vectors[k].transpose(-1, -2)
        return (self.means[k] + scaled.squeeze(1)).float()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Exact mean [D] and covariance [D, D] of the whole mixture."""
        mean = self.weights @ self.means
        centred = self.means - mean
        return mean, torch.einsum("k,kij->ij", self.weights, self.covs + centred[:, :, None] * centred[:, None, :])

    def mode_shares(self, x: Tensor) -> Tensor:
        """The share of samples x [N, D] nearest (in Mahalanobis distance) to each component, [K]."""
        offset = ((x.double()[:, None] - self.means)[..., None, :] @ self.vectors).squeeze(-2)
        nearest = (offset**2 / self.values).sum(-1).argmin(-1)
        return torch.bincount(nearest, minlength=len(self.means)) / len(x)

    def write(self, folder: FilePath) -> None:
        data: dict[str, Any] = {name: getattr(self, name).tolist() for name in ("weights", "means", "covs")}
        data["labels"] = None if self.labels is None else self.labels.tolist()
        files.write_json(folder / "mixture.json", data)


def _check(weights: Tensor, means: Tensor, covs: Tensor, labels: Tensor | None) -> None:
    """Refuse what is no mixture, each in one line."""
    if means.ndim != 2 or not means.numel():
        raise UserError("mixture: means must be K points of D numbers")
    k, d = means.shape
    if weights.shape != (k,) or covs.shape != (k, d, d) or not (weights > 0).all():
        raise UserError(f"mixture: {k} means of dimension {d} need {k} positive weights and {k} covariances {d} x {d}")
    symmetric = torch.allclose(covs, covs.transpose(-1, -2), rtol=1e-9)
    if not symmetric or (torch.linalg.eigvalsh(covs) <= 0).any():
        raise UserError("mixture: a covariance is not symmetric and positive definite")
    if labels is not None and (labels.shape != (k,) or set(labels.tolist()) != set(range(int(labels.max()) + 1))):
        raise UserError(f"mixture: labels must be {k} numbers, each class 0, 1, ... at least once")


def build(config: MixtureConfig) -> Mixture:
    """The mixture that a config describes."""
    try:
        lists = (config.weights, config.means, config.covs)
        weights, means, covs = (torch.tensor(v, dtype=torch.float64) for v in lists)
    except ValueError as error:
        raise UserError("mixture: the rows of means or covs differ in length") from error
    return Mixture(weights, means, covs, None if config.labels is None else torch.tensor(config.labels))


def recognises(folder: FilePath) -> bool:
    """A folder that holds nothing but a mixture."""
    return (folder / "mixture.json").exists()


def read(folder: FilePath, data: dict[str, Any] | None) -> Mixture:
    """Read a mixture folder; the description in `fastgen.json` adds nothing to it."""
    file = folder / "mixture.json"
    return build(validate(MixtureConfig, files.read_json(file), str(file)))
