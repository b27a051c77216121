"""The only functions that know how samples lie in a tensor: one sample per index of dimension 0.

Paths, methods and samplers go through these, so that another layout (ragged voxels, say) needs no second copy of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(v: Tensor) -> Tensor:
    """In float32 at least."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Per-sample numbers [B] (or a scalar) shaped to multiply x [B, ...], in the dtype of x but float32 at least.

    So float64 times never turn float32 samples into float64 ones, and half-precision samples meet float32 levels.
    """
    if t.is_floating_point():
        t = t.to(torch.promote_types(x.dtype, torch.float32))
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t


def sumsq(x: Tensor) -> Tensor:
    """Squared norm of each sample: [B, ...] -> [B]."""
    return x.square().flatten(1).sum(1)


def mean(x: Tensor) -> Tensor:
    """Mean over each sample's coordinates: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample of x with that of y: [B, ...] -> [B]."""
    return (x * y).flatten(1).sum(1)


def finite(x: Tensor) -> Tensor:
    """Which samples hold no NaN and no infinity: [B, ...] -> bool [B]."""
    return x.isfinite().flatten(1).all(1)
