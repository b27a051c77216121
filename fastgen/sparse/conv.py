"""Submanifold convolution: the output has the sites of the input, and empty voxels count as zeros.

Kernel 3 is a plain cross-correlation, out[p] = b + sum W[o] x[p + o] over the offsets o in {-1, 0, 1}^3 whose voxel is
active; kernel axes D, H, W belong to x, y, z. Rows are gathered, multiplied and added offset by offset; narrow ones,
for which the calls would take longer than the arithmetic, at all offsets at once. Which rows meet at an offset is
looked up once per set of sites, for 13 of the 26: each opposite one has the same pairs, swapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.layout import wide
from fastgen.sparse import backends
from fastgen.sparse.sites import Sites, keys
from fastgen.sparse.tensor import Voxels, as_they_are, autocast

CENTRE, OFFSETS = 13, 27
CHUNK = 2**22  # entries of gathered rows that are held at once
NARROW = 32  # channels; from there on arithmetic with the zeros of empty voxels costs more than calls do


@dataclass(frozen=True)
class Neighbours:
    """For offsets 0 .. 12: (here [P], there [P]), row `there` lies at that offset from row `here`; long, each row at
    most once in either."""

    pairs: tuple[tuple[Tensor, Tensor], ...]


def neighbours(sites: Sites) -> Neighbours:
    """Kept with the sites; a ValueError for a voxel that occurs twice, or a grid too large for 64-bit keys."""
    return sites.once("neighbours", lambda: _find(sites))


def _find(sites: Sites) -> Neighbours:
    if len(sites) == 0:
        none = torch.zeros(0, dtype=torch.long, device=sites.coords.device)
        return Neighbours(((none, none),) * CENTRE)
    numbers, steps = keys(sites.coords, sites.batch, 1)
    numbers, order = numbers.sort()
    if (numbers[1:] == numbers[:-1]).any():
        raise ValueError("a voxel occurs twice among the coordinates")
    pairs = []
    for offset in range(CENTRE):
        move = sum((digit - 1) * step for digit, step in zip(_digits(offset), steps, strict=True))
        asked = numbers + move
        place = torch.searchsorted(numbers, asked).clamp_(max=len(numbers) - 1)
        here = (numbers[place] == asked).nonzero().squeeze(1)
        pairs.append((order[here], order[place[here]]))
    return Neighbours(tuple(pairs))


def _digits(offset: int) -> tuple[int, int, int]:
    return offset // 9, offset // 3 % 3, offset % 3


def _table(sites: Sites) -> Tensor:
    """The row at each offset of each row, long [N, 27], N where the voxel is empty; kept with the sites."""

    def make() -> Tensor:
        n, near = len(sites), neighbours(sites)
        found = torch.full((n, OFFSETS), n, dtype=torch.long, device=sites.coords.device)
        found[:, CENTRE] = torch.arange(n, device=found.device)
        for offset, (here, there) in enumerate(near.pairs):
            found[here, offset], found[there, OFFSETS - 1 - offset] = there, here
        return found

    return sites.once("table", make)


def _gathered(x: Tensor, table: Tensor) -> Any:
    """(rows, [rows, 27, C] of what `table` [N, 27] says of x [M, C]) in pieces of at most CHUNK entries."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    size = max(1, CHUNK // (OFFSETS * max(x.shape[1], 1)))
    for first in range(0, len(table), size):
        rows = slice(first, first + size)
        yield rows, padded.index_select(0, table[rows].flatten()).view(-1, OFFSETS, x.shape[1])


class _Conv(torch.autograd.Function):
    """out[p] = sum_o x[p + o] W[o]: x [N, in], W [27, in, out] -> [N, out].

    Bilinear: its derivatives are itself, with the kernel mirrored, and `_Correlate`, and so are theirs. Gathered rows
    are never kept for the backward pass.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, sites: Sites) -> Tensor:
        return _convolve(x, weight, sites)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.sites = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = _Conv.apply(grad, weight.flip(0).mT, ctx.sites) if ctx.needs_input_grad[0] else None
        dw = _Correlate.apply(x, grad, ctx.sites) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, _sites: None) -> Tensor:
        x, weight = ctx.saved_tensors
        return _added(
            None if dx is None else _Conv.apply(dx, weight, ctx.sites),
            None if dw is None else _Conv.apply(x, dw, ctx.sites),
        )


class _Correlate(torch.autograd.Function):
    """out[o] = sum_p x[p + o]^T y[p]: x [N, in], y [N, out] -> [27, in, out]."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, sites: Sites) -> Tensor:
        return _correlate(x, y, sites)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.sites = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        dx = _Conv.apply(y, grad.flip(0).mT, ctx.sites) if ctx.needs_input_grad[0] else None
        dy = _Conv.apply(x, grad, ctx.sites) if ctx.needs_input_grad[1] else None
        return dx, dy, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None, _sites: None) -> Tensor:
        x, y = ctx.saved_tensors
        return _added(
            None if dx is None else _Correlate.apply(dx, y, ctx.sites),
            None if dy is None else _Correlate.apply(x, dy, ctx.sites),
        )


def _added(*terms: Tensor | None) -> Tensor:
    there = [term for term in terms if term is not None]
    return there[0] if len(there) == 1 else there[0] + there[1]


def _steps(near: Neighbours, width: int) -> Any:
    """(offset, rows out, rows in) of all but the centre, in pieces whose rows of `width` entries are at most CHUNK."""
    size = max(1, CHUNK // max(width, 1))
    for offset, (here, there) in enumerate(near.pairs):
        for a, b in zip(here.split(size), there.split(size), strict=True):
            if len(a):
                yield offset, a, b
                yield OFFSETS - 1 - offset, b, a


def _convolve(x: Tensor, weight: Tensor, sites: Sites) -> Tensor:
    """Sums over offsets are in float32 at least."""
    with as_they_are(x):
        if x.shape[1] <= NARROW and len(x):
            return torch.cat([around.flatten(1) @ weight.flatten(0, 1) for _, around in _gathered(x, _table(sites))])
        out = wide(x @ weight[CENTRE])
        for offset, rows, seen in _steps(neighbours(sites), max(weight.shape[1:])):
            out.index_add_(0, rows, wide(x.index_select(0, seen) @ weight[offset]))
    return out.to(x.dtype)


def _correlate(x: Tensor, y: Tensor, sites: Sites) -> Tensor:
    with as_they_are(x):
        out = wide(x.new_zeros(OFFSETS, x.shape[1], y.shape[1]))
        if x.shape[1] <= NARROW and len(x):
            for rows, around in _gathered(x, _table(sites)):
                out += (around.flatten(1).T @ y[rows]).view_as(out)
            return out.to(x.dtype)
        if y.shape[1] <= NARROW and len(x):  # seen from x[q], y lies at the opposite offset
            for rows, around in _gathered(y, _table(sites).flip(1)):
                out += (x[rows].T @ around.flatten(1)).view(x.shape[1], OFFSETS, -1).transpose(0, 1)
            return out.to(x.dtype)
        out[CENTRE] = x.T @ y
        for offset, rows, seen in _steps(neighbours(sites), max(x.shape[1], y.shape[1])):
            out[offset] += x.index_select(0, seen).T @ y.index_select(0, rows)
    return out.to(x.dtype)


class Kernel(nn.Module):
    """The parameters of a convolution in spconv's layout: weight [out, kD, kH, kW, in], bias [out]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, *(kernel_size,) * 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's own convolutions."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class SparseConv3d(nn.Module):
    """Submanifold convolution of stride 1, kernel 3 or 1; `conv.weight`, `conv.bias` as in spconv's state dicts.

    Kernel 1 is what spconv computes and checkpoints were trained with: the memory of the weight [out, 1, 1, 1, in] read
    as (in, out), which is not the linear layer of the same shape (spconv issues 450 and 772).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size={kernel_size}: sparse convolutions here have 1 or 3")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.conv = Kernel(in_channels, out_channels, kernel_size, bias)

    def forward(self, x: Voxels) -> Voxels:
        feats, weight = autocast(x.feats, self.conv.weight)
        if self.kernel_size == 1:
            out = feats @ weight.reshape(self.in_channels, self.out_channels)
        elif backends.chosen().conv == "spconv":
            out = _spconv(feats, weight, x.sites)
        else:
            taps = weight.reshape(self.out_channels, OFFSETS, self.in_channels).permute(1, 2, 0)
            out = _Conv.apply(feats, taps, x.sites)
        return x.with_feats(out if self.conv.bias is None else out + self.conv.bias.to(out.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


def _spconv(feats: Tensor, weight: Tensor, sites: Sites) -> Tensor:
    """The same by spconv's kernels, without the bias; its index pairs are kept with the sites."""
    import spconv.pytorch as spconv

    if len(sites) == 0:
        return feats @ weight[:, 1, 1, 1].T
    indices, size = sites.once("spconv", lambda: _from_zero(sites))
    tensor = spconv.SparseConvTensor(feats, indices, size, sites.batch)
    pairs = sites.once("spconv pairs", dict[str, Any])
    tensor.indice_dict = pairs
    algo = spconv.ConvAlgo.Native if feats.device.type == "cpu" else None
    layer = spconv.SubMConv3d(weight.shape[-1], weight.shape[0], 3, bias=False, indice_key="submanifold", algo=algo)
    out = torch.func.functional_call(layer.train(), {"weight": weight}, (tensor,))
    pairs.update(out.indice_dict)  # it works on a copy
    return out.features


def _from_zero(sites: Sites) -> tuple[Tensor, list[int]]:
    """What spconv takes: coordinates from 0, row by row in memory (other strides are misread); the grid's size."""
    indices = sites.coords.clone(memory_format=torch.contiguous_format)
    indices[:, 1:] -= indices[:, 1:].amin(0)
    return indices, (indices[:, 1:].amax(0) + 1).tolist()
