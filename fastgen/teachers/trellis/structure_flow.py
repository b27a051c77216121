"""The flow of TRELLIS's first stage: a transformer on the latent of a dense occupancy grid, [B, C, R, R, R]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.teachers.trellis.args import Network, StructureFlowArgs
from fastgen.teachers.trellis.blocks import (
    FlowBlock,
    Grid,
    Modulation,
    TimeEmbedder,
    Transformer,
    initialise_flow,
    positions,
)


class SparseStructureFlowModel(Network, Transformer):
    """velocity = net(x, 1000 t, cond): x [B, in_channels, R, R, R], times [B], cond [B, L, cond_channels]."""

    Args, torso = StructureFlowArgs, ("blocks",)
    pos_emb: Tensor

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        a, channels = self.args, self.args.model_channels
        self.t_embedder = TimeEmbedder(channels)
        if a.share_mod:
            self.adaLN_modulation = Modulation(channels)
        # A persistent buffer in the official files, though it follows from the args.
        self.register_buffer("pos_emb", positions(_cells(a.resolution // a.patch_size), channels, torch.float32))
        self.input_layer = nn.Linear(a.in_channels * a.patch_size**3, channels)
        self.blocks = nn.ModuleList(FlowBlock(**a.block) for _ in range(a.num_blocks))
        self.out_layer = nn.Linear(channels, a.out_channels * a.patch_size**3)
        self.gradient_checkpointing = a.use_checkpoint
        initialise_flow(self, self.t_embedder, self.out_layer)
        self.finish()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, extra: Tensor | None = None) -> Tensor:
        """extra [B, model_channels], if any, is added to the time's embedding."""
        x = x.to(self.input_layer.weight.dtype)
        h = self.input_layer(patches(x, self.args.patch_size)) + self.pos_emb
        told = self.t_embedder(time)
        told = told if extra is None else told + extra.to(told.dtype)
        told = self.adaLN_modulation(told) if self.args.share_mod else told
        h, told, cond = (v.to(self.torso_dtype) for v in (h, told, cond))
        tokens = Grid()
        for block in self.blocks:
            h = self.through(block, h, told, cond, tokens)
        h = h.to(x.dtype)
        h = self.out_layer(functional.layer_norm(h, h.shape[-1:]))
        return unpatches(h, self.args.patch_size, x.shape[-1])


def _cells(resolution: int) -> Tensor:
    """All coordinates of a grid, [R^3, 3], z fastest."""
    return torch.cartesian_prod(*[torch.arange(resolution)] * 3)


def patches(x: Tensor, p: int) -> Tensor:
    """[B, C, R, R, R] to tokens [B, (R / p)^3, C p^3], whose channels are ((c p + a) p + b) p + d."""
    n = x.shape[-1] // p
    x = x.reshape(*x.shape[:2], n, p, n, p, n, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatches(h: Tensor, p: int, resolution: int) -> Tensor:
    """The inverse of `patches`."""
    n = resolution // p
    h = h.reshape(len(h), n, n, n, -1, p, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return h.reshape(len(h), -1, resolution, resolution, resolution)
