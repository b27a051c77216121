"""What TRELLIS's networks are made of: the same blocks for tokens of a grid [B, L, C] and for voxels' features [N, C].

Attribute names are the keys of the official checkpoints. `Tokens` is all that a block knows of how samples lie in a
tensor. Norms compute in float32 at least, and give back the dtype they were given (2412.01506's reference code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

from fastgen.layout import wide

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [..., heads, size] -> [..., heads, size]
FREQUENCIES = 128  # of the time embedding, each with a cosine and a sine
PERIOD = 10_000.0


class Tokens(Protocol):
    """How the tokens of a batch's samples lie in a tensor."""

    def spread(self, rows: Tensor) -> Tensor:
        """One row per sample, [B, C], shaped to be added to the tokens."""
        ...

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of every token to all of its sample's: [..., heads, size] each."""
        ...

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of every token to its sample's condition: k, v [B, L, heads, size]."""
        ...


class Grid:
    """Samples of one size: tokens [B, L, C]."""

    def spread(self, rows: Tensor) -> Tensor:
        return rows[:, None]

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    cross = full


class Norm(nn.LayerNorm):
    """Layer norm over the last dimension, in float32 at least."""

    def __init__(self, channels: int, *, affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).to(x.dtype)


class HeadNorm(nn.Module):
    """Each head divided by its root mean square, times gamma [heads, size]; x [..., heads, size]."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        return (functional.normalize(wide(x), dim=-1) * self.gamma * math.sqrt(x.shape[-1])).to(x.dtype)


class TimeEmbedder(nn.Module):
    """Network times [B] (1000 t) to [B, channels]: cosines, then sines, then two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, time: Tensor) -> Tensor:
        time = time.to(next(self.mlp.parameters()).dtype)
        angles = time[:, None] * falling(FREQUENCIES, time)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def falling(n: int, like: Tensor) -> Tensor:
    """n frequencies from 1 towards 1 / PERIOD, PERIOD^(-i / n), in the place and dtype of `like`."""
    steps = torch.arange(n, device=like.device, dtype=like.dtype) / n
    return torch.exp(-math.log(PERIOD) * steps)


def positions(coords: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The embedding of integer coordinates [N, 3]: [N, channels], sines then cosines of each axis, zeros at the end."""
    points = coords.to(dtype)
    angles = points[..., None] * falling(channels // 6, points)
    told = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return functional.pad(told, (0, channels - told.shape[1]))


class MLP(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        if qk_norm:
            self.q_rms_norm, self.k_rms_norm = (HeadNorm(heads, channels // heads) for _ in range(2))
        self.qk_norm = qk_norm

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.qk_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return self.to_out(attend(q, k, v).flatten(-2))


class CrossAttention(nn.Module):
    def __init__(self, channels: int, cond_channels: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(cond_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        if qk_norm:
            self.q_rms_norm, self.k_rms_norm = (HeadNorm(heads, channels // heads) for _ in range(2))
        self.qk_norm = qk_norm

    def forward(self, x: Tensor, cond: Tensor, attend: Attend) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(cond).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        if self.qk_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return self.to_out(attend(q, k, v).flatten(-2))


class Modulation(nn.Sequential):
    """Six rows of C for a block from the time's embedding [B, C]; zero at first, so that the block is its skip."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(channels, 6 * channels))


class FlowBlock(nn.Module):
    """Self-attention and MLP modulated by the time (adaLN-zero), with an unmodulated cross-attention between them.

    x += gate self(norm1(x) (1 + scale) + shift)
    x += cross(norm2(x), cond)
    x += gate' mlp(norm3(x) (1 + scale') + shift')
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        heads: int,
        ratio: float,
        *,
        share_mod: bool,
        qk_norm: bool,
        qk_norm_cross: bool,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = Norm(channels), Norm(channels, affine=True), Norm(channels)
        self.self_attn = SelfAttention(channels, heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(channels, cond_channels, heads, qk_norm=qk_norm_cross)
        self.mlp = MLP(channels, ratio)
        if not share_mod:
            self.adaLN_modulation = Modulation(channels)
        self.share_mod = share_mod

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, tokens: Tokens) -> Tensor:
        """Tokens x, the time's embedding [B, C] (with `share_mod` [B, 6 C]), the condition [B, L, cond_channels]."""
        rows = time if self.share_mod else self.adaLN_modulation(time)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (tokens.spread(row) for row in rows.chunk(6, dim=1))
        x = x + gate * self.self_attn(self.norm1(x) * (1 + scale) + shift, tokens.full)
        x = x + self.cross_attn(self.norm2(x), cond, tokens.cross)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


class Block(nn.Module):
    """The encoders' and decoders': x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, channels: int, heads: int, ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels), Norm(channels)
        self.attn = SelfAttention(channels, heads, qk_norm=qk_norm)
        self.mlp = MLP(channels, ratio)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A network with `blocks` of the kinds above, whose activations may be computed again in the backward pass."""

    _supports_gradient_checkpointing: ClassVar[bool] = True  # what diffusers' networks have, and `nets.lora` asks for
    blocks: nn.ModuleList
    gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def through(self, block: nn.Module, *args: Any) -> Any:
        """A block's output, its activations kept or not."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def initialise(net: nn.Module) -> None:
    """Linear layers as for a training from scratch: Xavier-uniform weights, no biases."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def initialise_flow(net: nn.Module, embedder: TimeEmbedder, last: nn.Linear) -> None:
    """As `initialise`, with a small time embedding, and zeros where a fresh flow is to be still: v = 0."""
    initialise(net)
    for layer in embedder.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    zero(last)
    for module in net.modules():
        if isinstance(module, Modulation):
            zero(module[1])


def zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
