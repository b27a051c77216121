"""Random voxels on small grids, and the same as dense tensors."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.sparse import Voxels
from fastgen.sparse.conv import SparseConv3d

# The same examples at every run; no clock: a busy machine is no failure.
steady = settings(derandomize=True, deadline=None, database=None, max_examples=25)


def occupancy(share: float, *size: int, seed: int = 0) -> Tensor:
    """bool [B, X, Y, Z]."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def occupancies(draw: st.DrawFn, *, samples: int = 3, side: int = 5) -> Tensor:
    """Of every density: nothing at all, empty samples, single voxels, random ones, full grids."""
    size = [draw(st.integers(1, samples)), *(draw(st.integers(1, side)) for _ in range(3))]
    seed = draw(st.integers(0, 2**16))
    made = occupancy(draw(st.sampled_from([0.3, 0.7, 1.0, 0.05, 0.0])), *size, seed=seed)
    if size[0] > 1 and draw(st.booleans()):
        made[draw(st.integers(0, size[0] - 1))] = False
    if draw(st.booleans()):
        made[draw(st.integers(0, size[0] - 1))].view(-1)[seed % made[0].numel()] = True
    return made


def voxels(mask: Tensor, channels: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Voxels:
    """Normal features on the voxels of an occupancy."""
    coords = mask.nonzero().int()
    return Voxels(normal(len(coords), channels, seed=seed, dtype=dtype), coords, len(mask))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(
    inputs: int, outputs: int, kernel: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SparseConv3d:
    """A convolution with normal parameters."""
    layer = SparseConv3d(inputs, outputs, kernel).to(dtype)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + i, dtype=dtype)
    return layer


def dense(feats: Tensor, mask: Tensor) -> Tensor:
    """[N, C] at the voxels of a mask, zeros elsewhere: [B, C, X, Y, Z]."""
    grid = feats.new_zeros(*mask.shape, feats.shape[1])
    return grid.index_put(mask.nonzero(as_tuple=True), feats).movedim(-1, 1)


def at(grid: Tensor, mask: Tensor) -> Tensor:
    """[B, C, X, Y, Z] at the voxels of a mask: [N, C]."""
    return grid.movedim(1, -1)[mask]


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    found, expected = found.detach(), expected.detach()
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


PRECISION = {torch.float64: 1e-10, torch.float32: 2e-5}
