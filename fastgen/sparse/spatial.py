"""Half and double resolution, and group norm, over sparse voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.layout import wide
from fastgen.sparse.sites import Sites, keys
from fastgen.sparse.tensor import Voxels


@dataclass(frozen=True, eq=False)
class Halving:
    """How fine rows lie in coarse ones.

    coarse  the sites of half the resolution, sorted by (sample, x, y, z)
    parent  the coarse row of each fine row, long [N]
    octants for each place within a coarse voxel: (fine rows, their coarse rows); each row at most once
    counts  fine rows in each coarse one, long [M]
    """

    coarse: Sites
    parent: Tensor
    octants: tuple[tuple[Tensor, Tensor], ...]
    counts: Tensor


def halving(sites: Sites) -> Halving:
    """Kept with the sites."""
    return sites.once("halving", lambda: _halve(sites))


def _halve(sites: Sites) -> Halving:
    coords = sites.coords.clone()
    coords[:, 1:] = coords[:, 1:].div(2, rounding_mode="floor")
    octant = ((sites.coords[:, 1:] - 2 * coords[:, 1:]) * torch.tensor([4, 2, 1], device=coords.device)).sum(1)
    if len(sites) == 0:
        none = torch.zeros(0, dtype=torch.long, device=coords.device)
        return Halving(Sites(coords, sites.batch), none, ((none, none),) * 8, none)
    _, parent, counts = torch.unique(keys(coords, sites.batch, 0)[0], return_inverse=True, return_counts=True)
    first = coords.new_zeros(len(counts), 4)
    first[parent] = coords  # rows with one parent have the same halves
    rows = [(octant == i).nonzero().squeeze(1) for i in range(8)]
    return Halving(Sites(first, sites.batch), parent, tuple((r, parent[r]) for r in rows), counts)


class _Sum(torch.autograd.Function):
    """The sum of the fine rows of each coarse one: [N, C] -> [M, C], in the same order at every run."""

    @staticmethod
    def forward(x: Tensor, how: Halving) -> Tensor:
        out = wide(x.new_zeros(len(how.coarse), x.shape[1]))
        for fine, coarse in how.octants:
            out.index_add_(0, coarse, wide(x.index_select(0, fine)))
        return out.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.how = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Copy.apply(grad, ctx.how), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _how: None) -> Tensor:
        return _Sum.apply(dx, ctx.how)


class _Copy(torch.autograd.Function):
    """Each coarse row to its fine ones, [M, C] -> [N, C]: the transpose of `_Sum`."""

    @staticmethod
    def forward(x: Tensor, how: Halving) -> Tensor:
        return x.index_select(0, how.parent)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.how = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, ctx.how), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _how: None) -> Tensor:
        return _Copy.apply(dx, ctx.how)


def downsample(v: Voxels) -> Voxels:
    """Half the resolution: sum of the children / (their number + 1), not their mean, as the checkpoints were trained
    (a scatter mean onto zeros that counts the zero). Rows are sorted; `upsample` undoes it."""
    how = halving(v.sites)
    return Voxels(_Sum.apply(v.feats, how) / (how.counts[:, None] + 1).to(v.dtype), how.coarse.under(v.sites))


def upsample(v: Voxels) -> Voxels:
    """The resolution that `downsample` halved: each row copied to its children, on the rows there were before."""
    if v.sites.finer is None:
        raise ValueError("upsample puts back the voxels that downsample halved; these come from no downsample")
    return Voxels(_Copy.apply(v.feats, halving(v.sites.finer)), v.sites.finer)


def subdivide(v: Voxels) -> Voxels:
    """Double resolution: 8 children of each voxel with its features, z fastest, beside one another in the rows."""
    children = v.sites.once("children", lambda: _subdivide(v.sites))
    return Voxels(v.feats[:, None].expand(-1, 8, -1).reshape(-1, v.feats.shape[1]), children)


def _subdivide(sites: Sites) -> Sites:
    digits = torch.arange(8, dtype=torch.int32, device=sites.coords.device)
    inside = torch.stack([torch.zeros_like(digits), digits // 4, digits // 2 % 2, digits % 2], 1)
    scale = torch.tensor([1, 2, 2, 2], dtype=torch.int32, device=sites.coords.device)
    return Sites((sites.coords[:, None] * scale + inside).reshape(-1, 4), sites.batch)


class SparseGroupNorm32(nn.GroupNorm):
    """Group norm over each sample's voxels and each group's channels, in float32 at least; eps 1e-5, affine."""

    def forward(self, v: Voxels) -> Voxels:  # type: ignore[override]
        weight, bias = wide(self.weight), wide(self.bias)
        parts = [
            functional.group_norm(wide(part).T[None], self.num_groups, weight, bias, self.eps)[0].T
            for part in v.parts()
            if len(part)
        ]
        return v.with_feats(torch.cat(parts).to(v.dtype)) if parts else v
