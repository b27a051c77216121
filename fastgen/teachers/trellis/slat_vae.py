"""TRELLIS's trunk on structured latents, and the encoder to them: a transformer with attention inside windows."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from pydantic import Field
from torch import nn
from torch.nn import functional

from fastgen.sparse import Voxels
from fastgen.sparse.conv import SparseConv3d
from fastgen.teachers.trellis.args import Network, TrunkArgs
from fastgen.teachers.trellis.blocks import Attend, Block, Transformer, initialise, positions
from fastgen.teachers.trellis.ragged import Ragged


class Trunk(Network, Transformer):
    """Voxels with features to voxels with `model_channels` in the torso's dtype; subclasses add what follows."""

    torso: ClassVar[tuple[str, ...]] = ("blocks",)
    converted = (nn.Linear, SparseConv3d)

    def _build(self, channels: int) -> None:
        a = self.args
        self.input_layer = nn.Linear(channels, a.model_channels)
        self.blocks = nn.ModuleList(
            Block(a.model_channels, a.heads, a.mlp_ratio, qk_norm=a.qk_rms_norm) for _ in range(a.num_blocks)
        )
        self.gradient_checkpointing = a.use_checkpoint

    def trunk(self, x: Voxels) -> Voxels:
        """The features behind the last block."""
        outer = self.input_layer.weight.dtype
        h = self.input_layer(x.feats.to(outer))
        h = (h + positions(x.coords[:, 1:], h.shape[1], outer)).to(self.torso_dtype)
        tokens = Ragged(x)
        for i, block in enumerate(self.blocks):
            h = self.through(block, h, self._attend(tokens, i))
        return x.with_feats(h)

    def _attend(self, tokens: Ragged, i: int) -> Attend:
        """Odd blocks' windows are shifted by half a window."""
        if self.args.attn_mode == "full":
            return tokens.full
        window = self.args.window_size
        return partial(tokens.windowed, window=window, shift=window // 2 * (i % 2))

    def _last(self, h: Voxels) -> Voxels:
        """The cast, the norm without weights and the last layer, of all but the mesh decoder."""
        feats = h.feats.to(self.out_layer.weight.dtype)
        return h.with_feats(self.out_layer(functional.layer_norm(feats, feats.shape[-1:])))


class EncoderArgs(TrunkArgs):
    in_channels: int = Field(ge=1)


class SLatEncoder(Trunk):
    """Voxels with DINOv2 features averaged over views [N, in_channels] to mean and log-variance, voxels each."""

    Args = EncoderArgs

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self._build(self.args.in_channels)
        self.out_layer = nn.Linear(self.args.model_channels, 2 * self.args.latent_channels)
        initialise(self)
        self.finish()

    def forward(self, x: Voxels) -> tuple[Voxels, Voxels]:
        mean, logvar = self._last(self.trunk(x)).feats.chunk(2, dim=1)
        return x.with_feats(mean), x.with_feats(logvar)
