"""Attention over ragged sets: the rows of a sample or of a window attend to one another, those of others to none.

Sets are sorted by length and padded in buckets, so that a few calls of torch's fused attention do all of them; long
sets go alone, without a mask. A backward pass computes the attention again from q, k, v, which are all that is kept;
under a derivative along a path, and where a gradient is to be differentiated again, attention is written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.errors import UserError
from fastgen.sparse import backends
from fastgen.sparse.sites import Sites, keys
from fastgen.sparse.tensor import Voxels, as_they_are, autocast

ALONE = 1024  # sets of this length or more are not padded: the call costs less than the padding
CHUNK = 2**25  # entries of padded queries, or of a written-out attention matrix, that are held at once


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sets of nearly one length: rows long [W, L], places beyond a set's end repeat its last row and are False in
    keep bool [W, L] (None: no such place); sets long [W], their numbers."""

    rows: Tensor
    keep: Tensor | None
    sets: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """How N rows are padded. place long [N]: where each row is among the rows of all buckets, one after another;
    order long [N] (rows set by set) and sizes for libraries that take them so."""

    buckets: tuple[Bucket, ...]
    place: Tensor
    order: Tensor
    sizes: tuple[int, ...]


def full(q: Tensor, k: Tensor, v: Tensor, like: Voxels) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sample: q, k, v [N, H, d] on the rows of `like` -> [N, H, d]."""
    return _within(q, k, v, _samples(like.sites))


def windowed(q: Tensor, k: Tensor, v: Tensor, like: Voxels, window: int, shift: int) -> Tensor:
    """The same within each window: voxels of a sample with equal floor((coord + shift) / window) on all axes."""
    return _within(q, k, v, windows(like.sites, window, shift))


def cross(q: Tensor, k: Tensor, v: Tensor, like: Voxels) -> Tensor:
    """Rows q [N, H, d] of sample b attend to k, v [B, L, H, d] of b."""
    if not len(k) == len(v) == like.batch:
        raise ValueError(f"keys of {len(k)} samples for voxels of {like.batch}")
    q, k, v = autocast(q, k, v)
    if backends.chosen().attention != "torch":
        there = torch.tensor([i for i, n in enumerate(like.sites.sizes) if n], dtype=torch.long, device=k.device)
        sizes = [n for n in like.sites.sizes if n]
        k, v = (t.index_select(0, there) for t in (k, v))
        return _varlen(q, k.flatten(0, 1), v.flatten(0, 1), sizes, [k.shape[1]] * len(sizes))
    return _attend(q, k, v, _samples(like.sites))


def windows(sites: Sites, window: int, shift: int) -> Plan:
    """Kept with the sites."""
    return sites.once(("windows", window, shift), lambda: _partition(sites, window, shift))


def _samples(sites: Sites) -> Plan:
    return sites.once("samples", lambda: _plan(torch.arange(len(sites), device=sites.coords.device), sites.sizes))


def _partition(sites: Sites, window: int, shift: int) -> Plan:
    if len(sites) == 0:
        return _plan(torch.zeros(0, dtype=torch.long, device=sites.coords.device), ())
    coords = sites.coords.clone()
    coords[:, 1:] = (coords[:, 1:] + shift).div(window, rounding_mode="floor")
    numbers, order = keys(coords, sites.batch, 0)[0].sort(stable=True)
    return _plan(order, tuple(torch.unique_consecutive(numbers, return_counts=True)[1].tolist()))


def _plan(order: Tensor, sizes: tuple[int, ...]) -> Plan:
    """Buckets of sets whose rows, set by set, are `order`."""
    device = order.device
    lengths = torch.tensor(sizes, dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    groups: dict[int, list[int]] = {}
    for number, n in enumerate(sizes):
        if n:
            groups.setdefault(_ceiling(n), []).append(number)
    place, offset = torch.zeros_like(order), 0
    buckets: list[Bucket] = []
    for _, numbers in sorted(groups.items()):
        sets = torch.tensor(numbers)
        own, longest = lengths[sets], int(lengths[sets].max())
        span = torch.arange(longest)
        rows = order[(starts[sets, None] + torch.minimum(span, own[:, None] - 1)).to(device)]
        keep = (span < own[:, None]).to(device)
        at = torch.arange(offset, offset + keep.numel(), device=device).view_as(rows)
        place[rows[keep]] = at[keep]
        offset += keep.numel()
        buckets.append(Bucket(rows, None if bool((own == longest).all()) else keep, sets.to(device)))
    return Plan(tuple(buckets), place, order, sizes)


def _ceiling(n: int) -> int:
    """The bucket of a length: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., and from ALONE on each length by itself."""
    if n >= ALONE:
        return n
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 and power >= 4 else power


def _within(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    q, k, v = autocast(q, k, v)
    if backends.chosen().attention != "torch":
        back = torch.empty_like(plan.order).scatter_(0, plan.order, torch.arange(len(q), device=q.device))
        sizes = [n for n in plan.sizes if n]
        q, k, v = (t.index_select(0, plan.order) for t in (q, k, v))
        return _varlen(q, k, v, sizes, sizes).index_select(0, back)
    return _attend(q, k, v, plan)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Keys [N, H, d] of the sets' own rows, or [S, L, H, d] of each set."""
    if torch._C._are_functorch_transforms_active() or any(forward_ad.unpack_dual(t)[1] is not None for t in (q, k, v)):
        return _padded(q, k, v, plan, True)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return Ragged.apply(q, k, v, plan)
    return _padded(q, k, v, plan, False)


class Ragged(torch.autograd.Function):
    """Torch's fused kernels cannot be differentiated twice; this can. Ragged rows are kept, not padded ones."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(q, k, v)
        return _padded(q, k, v, plan, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        twice = torch.is_grad_enabled()
        inputs = ctx.saved_tensors
        if not twice:
            inputs = tuple(
                t.detach().requires_grad_(need) for t, need in zip(inputs, ctx.needs_input_grad, strict=False)
            )
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        with torch.enable_grad(), as_they_are(grad):
            q, k, v = inputs
            out = _padded(q, k, v, ctx.plan, twice)
            found = iter(
                torch.autograd.grad(out, wanted, grad, create_graph=twice, allow_unused=True, materialize_grads=True)
            )
        return (*(next(found) if need else None for need in ctx.needs_input_grad[:3]), None)


def _padded(q: Tensor, k: Tensor, v: Tensor, plan: Plan, written: bool) -> Tensor:
    """Bucket by bucket; `written`: by products and softmax, which have every derivative."""
    if not plan.buckets:
        return q[:, :, :1] * v.new_zeros(v.shape[-1])
    with as_they_are(q):
        outs = [out for bucket in plan.buckets for out in _bucket(q, k, v, bucket, written)]
    return torch.cat(outs).index_select(0, plan.place)


def _bucket(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, written: bool) -> Iterator[Tensor]:
    """Rows [W L, H, d] of a bucket in a few pieces."""
    count, longest = bucket.rows.shape
    own = k.ndim == 3
    keys = longest if own else k.shape[1]
    each = q.shape[1] * max(longest * q.shape[2], longest * keys if written else 0, keys * q.shape[2])
    size = max(1, CHUNK // max(each, 1))
    for first in range(0, count, size):
        part = slice(first, first + size)
        rows, sets = bucket.rows[part], bucket.sets[part]
        query = _take(q, rows)
        key, value = (_take(t, rows) if own else t.index_select(0, sets).transpose(1, 2) for t in (k, v))
        mask = bucket.keep[part, None, None] if own and bucket.keep is not None else None
        yield _sdpa(query, key, value, mask, written).transpose(1, 2).flatten(0, 1)


def _take(t: Tensor, rows: Tensor) -> Tensor:
    """[N, H, d] -> [W, H, L, d]."""
    return t.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, written: bool) -> Tensor:
    if not written:
        return functional.scaled_dot_product_attention(query, key, value, mask)
    rows = max(1, CHUNK // max(query[..., 0, 0].numel() * key.shape[-2], 1))
    with sdpa_kernel(SDPBackend.MATH):
        parts = [functional.scaled_dot_product_attention(part, key, value, mask) for part in query.split(rows, -2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int]) -> Tensor:
    """Sets one after another, by the library chosen: q [N, H, d], k and v [M, H, d]."""
    name = backends.chosen().attention
    _refuse(name, q, k, v)
    if len(q) == 0:
        return q
    if name == "xformers":
        from xformers import ops

        mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, key_lengths)
        return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    from flash_attn import flash_attn_varlen_func

    ends = [torch.tensor([0, *n]).cumsum(0).to(q.device, torch.int32) for n in (lengths, key_lengths)]
    return flash_attn_varlen_func(q, k, v, *ends, max(lengths), max(key_lengths))


def _refuse(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """What a library cannot do is a UserError; both can be imported where none of their kernels is."""
    if torch._C._are_functorch_transforms_active() or any(forward_ad.unpack_dual(t)[1] is not None for t in (q, k, v)):
        raise UserError(f"attention={name} has no derivative along a path; use attention=torch")
    if q.device.type != "cuda":
        raise UserError(f"attention={name} has no kernel for a {q.device.type}; use attention=torch")
    if name == "flash_attn" and q.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"attention=flash_attn computes in float16 or bfloat16, not {q.dtype}; use attention=torch")
