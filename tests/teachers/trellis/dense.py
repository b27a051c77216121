"""The second stage's flow on a full grid, by torch's dense operations: written from the format, key by key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, gelu, interpolate, layer_norm, linear, normalize, silu


class DenseLatentFlow(nn.Module):
    """velocity [B, C, S, S, S] = net(x, 1000 t, cond), with the parameters of a `SLatFlowModel` of one stage."""

    def __init__(self, sparse: Any) -> None:
        super().__init__()
        self.sparse, self.args = sparse, sparse.args

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, extra: None = None) -> Tensor:
        self.p = dict(self.sparse.named_parameters())
        told = self.affine("t_embedder.mlp.2", silu(self.affine("t_embedder.mlp.0", cosines(time))))
        h, skips = self.affine("input_layer", x.movedim(1, -1)), []
        for i in range(self.args.num_io_res_blocks):
            last = i == self.args.num_io_res_blocks - 1
            h = self.res(f"input_blocks.{i}", halved(h) if last else h, told)
            skips.append(h)
        side = h.shape[1]
        h = h.flatten(1, 3) + places(side, h)
        for i in range(self.args.num_blocks):
            h = self.block(f"blocks.{i}", h, told, cond)
        h = h.unflatten(1, (side,) * 3)
        for i in range(self.args.num_io_res_blocks):
            h = torch.cat([h, skips.pop()], -1)
            h = self.res(f"out_blocks.{i}", doubled(h) if i == 0 else h, told)
        return self.affine("out_layer", layer_norm(h, h.shape[-1:])).movedim(-1, 1)

    def affine(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.p.get(f"{name}.weight"), self.p.get(f"{name}.bias"), 1e-6)

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.p[f"{name}.conv.weight"].permute(0, 4, 1, 2, 3)
        return conv3d(x.movedim(-1, 1), weight, self.p[f"{name}.conv.bias"], padding=1).movedim(1, -1)

    def res(self, name: str, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.affine(f"{name}.emb_layers.1", silu(told))[:, None, None, None].chunk(2, -1)
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", h) * (1 + scale) + shift))
        return h + (self.affine(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.p else x)

    def block(self, name: str, x: Tensor, told: Tensor, cond: Tensor) -> Tensor:
        rows = self.affine(f"{name}.adaLN_modulation.1", silu(told))[:, None].chunk(6, -1)
        h = self.norm(f"{name}.norm1", x) * (1 + rows[1]) + rows[0]
        q, k, v = self.affine(f"{name}.self_attn.to_qkv", h).chunk(3, -1)
        x = x + rows[2] * self.attention(f"{name}.self_attn", q, k, v)
        q = self.affine(f"{name}.cross_attn.to_q", self.norm(f"{name}.norm2", x))
        x = x + self.attention(f"{name}.cross_attn", q, *self.affine(f"{name}.cross_attn.to_kv", cond).chunk(2, -1))
        h = self.norm(f"{name}.norm3", x) * (1 + rows[4]) + rows[3]
        h = self.affine(f"{name}.mlp.mlp.2", gelu(self.affine(f"{name}.mlp.mlp.0", h), approximate="tanh"))
        return x + rows[5] * h

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.args.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if f"{name}.q_rms_norm.gamma" in self.p:
            q, k = (
                normalize(t, dim=-1) * self.p[f"{name}.{which}_rms_norm.gamma"][:, None] * t.shape[-1] ** 0.5
                for which, t in (("q", q), ("k", k))
            )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.affine(f"{name}.to_out", (weights @ v).transpose(1, 2).flatten(-2))


def cosines(time: Tensor) -> Tensor:
    steps = torch.exp(-math.log(10_000) * torch.arange(128, dtype=time.dtype) / 128)
    return torch.cat([(time[:, None] * steps).cos(), (time[:, None] * steps).sin()], 1)


def places(side: int, like: Tensor) -> Tensor:
    """[side^3, C] in the dtype of `like`."""
    n = like.shape[-1] // 6
    cells = torch.cartesian_prod(*[torch.arange(side, dtype=like.dtype)] * 3)
    angles = cells[..., None] * torch.exp(-math.log(10_000) * torch.arange(n, dtype=like.dtype) / n)
    told = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return torch.cat([told, told.new_zeros(len(told), like.shape[-1] - told.shape[1])], 1)


def halved(x: Tensor) -> Tensor:
    """The sum of 8 cells over 9: [B, S, S, S, C] to half the side."""
    half = x.shape[1] // 2
    return x.reshape(len(x), half, 2, half, 2, half, 2, -1).sum((2, 4, 6)) / 9


def doubled(x: Tensor) -> Tensor:
    return interpolate(x.movedim(-1, 1), scale_factor=2, mode="nearest").movedim(1, -1)
