"""Forward-mode rules for dual tensors (a value and its derivative along one direction), in place of torch's own.

Torch has no rule for fused attention, one for group norm that fails where its input is not contiguous (behind the
attention of a U-Net), and slow ones for norms, convolutions, linear layers and divisions by a number. Here each is
written out with the kernels that torch keeps for forward and backward (figures: docs/jvp.md). Derivatives carry no
graph, so that where the value keeps its own (`single_pass`) hardly anything else is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Kernel = Callable[..., Tensor]
Dual = tuple[Tensor, Tensor | None]  # a value and its derivative, None where it stands still
CHUNK = 2**24  # entries of an attention matrix that are held at once where nothing is kept for a backward pass
HEADS = (16, 32, 64, 128, 256)  # head sizes of jvp_flash_attention
ANY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
TOKENS = 32  # it takes numbers of tokens that are multiples of this


def split(x: Tensor) -> Dual:
    """A tensor's value and its derivative at the current level."""
    return forward_ad.unpack_dual(x)


def moves(values: Iterable[Any]) -> bool:
    """Whether any tensor among these has a derivative; a parameter never has."""
    tensors = (v for v in values if isinstance(v, Tensor) and type(v) is not nn.Parameter)
    return any(split(tensor)[1] is not None for tensor in tensors)


class Rules(TorchFunctionMode):
    """While it lasts, the functions of `RULES` are differentiated by the rules here, at the current dual level.

    kernel          for attention: `jvp_flash_attention`'s, wherever it fits; None: written out
    fused, written  how many calls of attention went which way

    A compiled operation (`torch.ops`) that drops the derivative would do so without a word: NotImplementedError.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.kernel, self.fused, self.written = kernel, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if rule := RULES.get(func):
            return rule(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            _keeps(func, (args, kwargs), out)
        return out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        bare = attn_mask is None and dropout_p == 0 and not enable_gqa
        if bare and self.kernel is not None and fits(query, key, value):
            self.fused += 1
            return self.kernel(query, key, value, causal=is_causal, sm_scale=scale)
        self.written += moves((query, key, value))
        if bare and not is_causal and moves((query, key, value)):
            return attention(query, key, value, scale)
        # Rare: torch writes these out itself under sdpa_kernel(MATH).
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _keeps(func: Any, inputs: Any, out: Any) -> None:
    floating = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    if floating and moves(tree_leaves(inputs)) and not moves(floating):
        raise NotImplementedError(f"forward AD: {func} has no forward-mode rule and drops the derivative")


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether jvp_flash_attention's kernel takes these: self-attention, [B, heads, tokens, size]."""
    return (
        q.dim() == 4
        and q.shape == k.shape == v.shape
        and q.shape[-1] in HEADS
        and q.shape[-2] % TOKENS == 0
        and all(split(x)[1] is not None for x in (q, k, v))
    )


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v and its derivative, q [..., Q, E], k [..., K, E], v [..., K, F].

    S = scale q k^T, P = softmax(S), H = P (dS - rowsum(P dS)), dO = H v + P dv, rows of q in chunks, so that memory
    does not grow with the square of the number of tokens. A value that keeps its graph comes from torch's own kernels.
    """
    (q, dq), k, v = split(query), split(key), split(value)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    kept = torch.is_grad_enabled()
    rows = max(1, min(q.shape[-2], CHUNK // (q[..., 0, 0].numel() * k[0].shape[-2])))
    with torch.no_grad():
        parts = [
            _rows((q[..., i : i + rows, :], None if dq is None else dq[..., i : i + rows, :]), k, v, scale, not kept)
            for i in range(0, q.shape[-2], rows)
        ]
        out, moved = (part[0] if len(part) == 1 else torch.cat(part, -2) for part in zip(*parts, strict=True))
    if kept:
        with sdpa_kernel(ANY):
            out = functional.scaled_dot_product_attention(q, k[0], v[0], scale=scale)
    return forward_ad.make_dual(out, moved)


def _rows(query: Dual, key: Dual, value: Dual, scale: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """Some rows of the value, where it is wanted, and of the derivative."""
    (q, dq), (k, dk), (v, dv) = query, key, value
    q = q * scale
    weights = (q @ k.mT).softmax(-1)
    moved = weights.new_zeros(()) if dv is None else weights @ dv
    if dq is not None or dk is not None:
        scores = [] if dq is None else [(dq * scale) @ k.mT]
        scores += [] if dk is None else [q @ dk.mT]
        total = scores[0] if len(scores) == 1 else scores[0].add_(scores[1])
        # The Jacobian of softmax is symmetric: its backward kernel is its forward rule.
        moved = moved + torch._softmax_backward_data(total, weights, -1, weights.dtype) @ v
    return weights @ v if wanted else moved, moved


def _affine(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Linear layers and convolutions: the derivative goes the same way, without the bias."""
    x, dx = split(input)
    if dx is None or moves((weight, bias)):
        return func(input, weight, bias, *args, **kwargs)
    out = func(x, weight, bias, *args, **kwargs)
    with torch.no_grad():
        moved = func(dx, weight, None, *args, **kwargs)
    return forward_ad.make_dual(out, moved)


def _group_norm(
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """dy = weight J dx; J, that of the bare norm, is symmetric: the backward kernel without a weight is J."""
    x, dx = split(input)
    if dx is None or moves((weight, bias)):
        return func(input, num_groups, weight, bias, eps)
    x, dx = x.contiguous(), dx.contiguous()
    n, channels, places = x.shape[0], x.shape[1], x[0, 0].numel()
    out, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, places, num_groups, eps)
    with torch.no_grad():
        backward = torch.ops.aten.native_group_norm_backward
        moved = backward(dx, x, mean, rstd, None, n, channels, places, num_groups, (True, False, False))[0]
        if weight is not None:
            moved.mul_(weight.view(-1, *[1] * (x.dim() - 2)))
    return forward_ad.make_dual(out, moved)


def _layer_norm(
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `_group_norm`."""
    x, dx = split(input)
    if dx is None or moves((weight, bias)):
        return func(input, normalized_shape, weight, bias, eps)
    x, dx = x.contiguous(), dx.contiguous()
    out, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    with torch.no_grad():
        backward = torch.ops.aten.native_layer_norm_backward
        moved = backward(dx, x, normalized_shape, mean, rstd, None, None, (True, False, False))[0]
        if weight is not None:
            moved.mul_(weight)
    return forward_ad.make_dual(out, moved)


def _silu(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    x, dx = split(input)
    if dx is None or inplace:
        return func(input, inplace)
    with torch.no_grad():
        moved = torch.ops.aten.silu_backward(dx, x)
    return forward_ad.make_dual(func(x), moved)


def _divide(func: Any, input: Any, other: Any, **kwargs: Any) -> Tensor:
    """By a number (diffusers' residual layers divide by their scale): torch's rule is that of a quotient of two."""
    if not isinstance(input, Tensor) or isinstance(other, Tensor) or kwargs:
        return func(input, other, **kwargs)
    x, dx = split(input)
    if dx is None:
        return func(input, other)
    with torch.no_grad():
        moved = dx / other
    return forward_ad.make_dual(func(x, other), moved)


RULES: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _affine,
    functional.conv1d: _affine,
    functional.conv2d: _affine,
    functional.conv3d: _affine,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.silu: _silu,
    torch.div: _divide,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
}
