"""How much memory a computation takes, found by running it on the meta device: shapes without values, in seconds.

Every tensor that is made is counted from its making to its end, the backward pass included, so gradient checkpointing
and what autograd keeps are counted as they are. Two things are put in the place of what a GPU would do: attention
keeps its inputs and its output (as flash kernels do), and half precision casts what `torch.autocast` would cast.
What a GPU takes besides is not seen: workspaces of convolutions, fragmentation, the driver's own part. A mask is
taken to pick every entry.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config as fake
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.sparse.attention import Ragged
from fastgen.sparse.tensor import autocast

# CUDA's autocast lists, as far as networks of images use them.
HALF = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose2d),
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.Tensor.matmul, torch.Tensor.__matmul__),
}
FULL = {functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax, torch.Tensor.softmax}


def peak_bytes(compute: Callable[[], Any], half: torch.dtype | None = None) -> int:
    """The most that is alive at once of what `compute` makes on the meta device; `half` is autocast's type, if any."""
    live, gpu = _Live(), _AsOnGPU(half)
    masks = fake.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with masks, gpu, _recomputed_in(gpu), live:
        compute()
    return live.peak


@contextmanager
def _recomputed_in(mode: TorchFunctionMode) -> Iterator[None]:
    """Autograd's engine leaves such modes behind; what is computed again for it, by a checkpoint or by attention over
    ragged sets, must be computed as at first."""
    ragged: Any = Ragged
    checkpoint, backward = torch.utils.checkpoint.checkpoint, ragged.backward

    def again(ctx: Any, grad: Tensor) -> Any:
        with mode:
            return backward(ctx, grad)

    torch.utils.checkpoint.checkpoint = partial(checkpoint, context_fn=lambda: (nullcontext(), mode))
    ragged.backward = staticmethod(again)
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint
        ragged.backward = staticmethod(backward)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and value.is_meta and _key(value) not in self._known | given:
                self._add(value.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _AsOnGPU(TorchFunctionMode):
    """Autocast and fused attention, neither of which the meta device has."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half
        self._weights: dict[int, Tensor] = {}  # autocast, too, casts a trained weight once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is autocast:
            return args if self.half is None else tuple(value.to(self.half) for value in args)
        if func is functional.scaled_dot_product_attention:
            inputs = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            return _Attention.apply(*(self._cast(value, self.half) for value in inputs))
        if self.half is not None and func in HALF | FULL:
            dtype = self.half if func in HALF else torch.float32
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter) or not value.requires_grad:
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]


class _Attention(torch.autograd.Function):
    """What flash attention keeps: q, k, v [B, heads, n, d] and the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors[:3])
