"""The only functions that know how samples lie in a tensor: one sample per index of dimension 0, or the rows of voxels.

Paths, methods and samplers go through these, so that ragged samples (`fastgen.sparse.Voxels`) need no second copy of
them.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen import noise
from fastgen.sparse.tensor import Voxels

Samples = TypeVar("Samples", Tensor, Voxels)


def wide(v: Samples) -> Samples:
    """In float32 at least."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def expand(t: Tensor, x: Tensor | Voxels) -> Tensor:
    """Per-sample numbers [B] (or a scalar) shaped to multiply x [B, ...], in the dtype of x but float32 at least.

    So float64 times never turn float32 samples into float64 ones, and half-precision samples meet float32 levels.
    For voxels that is one number per row, [N, 1].
    """
    if t.is_floating_point():
        t = t.to(torch.promote_types(x.dtype, torch.float32))
    if not t.ndim:
        return t
    if isinstance(x, Voxels):
        return t.reshape(1, 1) if t.numel() == 1 else x.rows(t.reshape(-1, 1))
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def sumsq(x: Tensor | Voxels) -> Tensor:
    """Squared norm of each sample: [B, ...] -> [B]."""
    return _sum(x.square())


def mean(x: Tensor | Voxels) -> Tensor:
    """Mean over each sample's coordinates: [B, ...] -> [B]; 0 for a sample without voxels."""
    if isinstance(x, Voxels):
        return _sum(x) / (x.lengths * x.shape[1]).clamp_min(1)
    return x.flatten(1).mean(1)


def mean_all(x: Tensor | Voxels) -> Tensor:
    """Mean over all coordinates of the batch, so that a sample of many voxels counts more than one of few."""
    return (x.feats if isinstance(x, Voxels) else x).mean()


def dot(x: Tensor | Voxels, y: Tensor | Voxels) -> Tensor:
    """Inner product of each sample of x with that of y: [B, ...] -> [B]."""
    return _sum(x * y)


def finite(x: Tensor | Voxels) -> Tensor:
    """Which samples hold no NaN and no infinity: [B, ...] -> bool [B]."""
    if isinstance(x, Voxels):
        parts = [part.isfinite().all() for part in x.parts()]
        return torch.stack(parts) if parts else torch.ones(0, dtype=torch.bool, device=x.device)
    return x.isfinite().flatten(1).all(1)


def normal_like(x: Samples, seed: int, tag: str, rows: Tensor, draw: int = 0) -> Samples:
    """Standard normal float32 in the form of samples x [B, ...], each from its own row of `rows` int64 [B]."""
    if not isinstance(x, Voxels):
        return noise.normal(seed, tag, rows, tuple(x.shape[1:]), draw)
    channels = x.shape[1]
    parts = [noise.normal(seed, tag, rows[i : i + 1], (n, channels), draw)[0] for i, n in enumerate(x.sites.sizes)]
    return x.with_feats(torch.cat(parts) if parts else x.feats.float())


def twice(x: Any) -> Any:
    """A batch, and itself behind it: [B, ...] -> [2 B, ...]. Of voxels, the sites are joined once."""
    if not isinstance(x, Voxels):
        return torch.cat([x, x])
    sites = x.sites.once("twice", lambda: Voxels.cat([Voxels(x.feats[:, :0], x.sites)] * 2).sites)
    return Voxels(torch.cat([x.feats, x.feats]), sites)


def halves(both: Any, x: Any) -> tuple[Any, Any]:
    """What became of the two parts of `twice(x)`."""
    if not isinstance(x, Voxels):
        return both[: len(x)], both[len(x) :]
    return x.with_feats(both.feats[: len(x.sites)]), x.with_feats(both.feats[len(x.sites) :])


def _sum(x: Tensor | Voxels) -> Tensor:
    """Over each sample's coordinates; sample by sample, so that the order of the sum is the same at every run."""
    if isinstance(x, Voxels):
        parts = [part.sum() for part in x.parts()]
        return torch.stack(parts) if parts else x.feats.new_zeros(0)
    return x.flatten(1).sum(1)
