"""The flow of TRELLIS's second stage: a transformer on the features of occupied voxels, half-sized by convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from fastgen.sparse import Voxels
from fastgen.sparse.conv import SparseConv3d
from fastgen.sparse.spatial import downsample, upsample
from fastgen.teachers.trellis.args import Network, SLatFlowArgs
from fastgen.teachers.trellis.blocks import (
    FlowBlock,
    Modulation,
    Norm,
    TimeEmbedder,
    Transformer,
    initialise_flow,
    positions,
    zero,
)
from fastgen.teachers.trellis.ragged import Ragged


class ResBlock(nn.Module):
    """Two convolutions round a modulation by the time; the grid is changed first, the second convolution zero at first.

    h = conv1(SiLU(norm1(x)));  conv2(SiLU(norm2(h) (1 + scale) + shift)) + skip(x)
    """

    def __init__(self, channels: int, out: int, embedding: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.norm1, self.norm2 = Norm(channels, affine=True), Norm(out)
        self.conv1, self.conv2 = SparseConv3d(channels, out, 3), SparseConv3d(out, out, 3)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.skip_connection = nn.Linear(channels, out) if channels != out else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Voxels, time: Tensor) -> Voxels:
        scale, shift = self.emb_layers(time).chunk(2, dim=1)
        x = downsample(x) if self.down else upsample(x) if self.up else x
        tokens = Ragged(x)
        h = self.conv1(x.with_feats(silu(self.norm1(x.feats)))).feats
        h = self.norm2(h) * (1 + tokens.spread(scale)) + tokens.spread(shift)
        h = self.conv2(x.with_feats(silu(h))).feats
        return x.with_feats(h + self.skip_connection(x.feats))


class SLatFlowModel(Network, Transformer):
    """velocity = net(x, 1000 t, cond): voxels x with [N, in_channels], times [B], cond [B, L, cond_channels]."""

    Args, torso = SLatFlowArgs, ("input_blocks", "blocks", "out_blocks")
    converted = (nn.Linear, SparseConv3d)

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        a, channels = self.args, self.args.model_channels
        outside = a.io_block_channels[0] if a.io_block_channels else channels
        self.t_embedder = TimeEmbedder(channels)
        if a.share_mod:
            self.adaLN_modulation = Modulation(channels)
        self.input_layer = nn.Linear(a.in_channels, outside)
        self.input_blocks, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        if a.io_block_channels:
            self._add_stage(outside)
        self.blocks = nn.ModuleList(FlowBlock(**a.block) for _ in range(a.num_blocks))
        self.out_layer = nn.Linear(outside, a.out_channels)
        self.gradient_checkpointing = a.use_checkpoint
        initialise_flow(self, self.t_embedder, self.out_layer)
        self.finish()

    def _add_stage(self, outside: int) -> None:
        """The one stage of convolutions: on the way back a block is given, beside its input, what its mirror made."""
        channels, more = self.args.model_channels, self.args.num_io_res_blocks - 1
        times = 2 if self.args.use_skip_connection else 1
        self.input_blocks.extend(ResBlock(outside, outside, channels) for _ in range(more))
        self.input_blocks.append(ResBlock(outside, channels, channels, down=True))
        self.out_blocks.append(ResBlock(times * channels, outside, channels, up=True))
        self.out_blocks.extend(ResBlock(times * outside, outside, channels) for _ in range(more))

    def forward(self, x: Voxels, time: Tensor, cond: Tensor, extra: Tensor | None = None) -> Voxels:
        """extra [B, model_channels], if any, is added to the time's embedding."""
        outer = self.input_layer.weight.dtype
        told = self.t_embedder(time)
        told = told if extra is None else told + extra.to(told.dtype)
        told = self.adaLN_modulation(told) if self.args.share_mod else told
        told, cond = told.to(self.torso_dtype), cond.to(self.torso_dtype)
        h = x.with_feats(self.input_layer(x.feats.to(outer)).to(self.torso_dtype))
        skips = []
        for block in self.input_blocks:
            h = self.through(block, h, told)
            skips.append(h.feats)
        h = self._transform(h, told, cond)
        for block in self.out_blocks:
            skip = skips.pop()
            h = h.with_feats(torch.cat([h.feats, skip], dim=1)) if self.args.use_skip_connection else h
            h = self.through(block, h, told)
        # Unlike its siblings' this norm comes before the cast: half precision in, half precision out.
        feats = functional.layer_norm(h.feats, h.feats.shape[-1:]).to(outer)
        return x.with_feats(self.out_layer(feats))

    def _transform(self, h: Voxels, told: Tensor, cond: Tensor) -> Voxels:
        tokens, feats = Ragged(h), h.feats
        feats = feats + positions(h.coords[:, 1:], feats.shape[1], torch.promote_types(feats.dtype, torch.float32)).to(
            feats.dtype
        )
        for block in self.blocks:
            feats = self.through(block, feats, told, cond, tokens)
        return h.with_feats(feats)
