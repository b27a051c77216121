"""Structured latents to meshes: two subdivisions of the voxels, and on the fine ones what FlexiCubes needs."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn.functional import silu

from fastgen.config import Model
from fastgen.geometry import flexicubes
from fastgen.geometry.mesh import Mesh
from fastgen.sparse import Voxels
from fastgen.sparse.conv import SparseConv3d
from fastgen.sparse.spatial import SparseGroupNorm32, subdivide
from fastgen.teachers.trellis.args import TrunkArgs
from fastgen.teachers.trellis.blocks import initialise, zero
from fastgen.teachers.trellis.slat_vae import Trunk

FINER = 4  # two subdivisions
GROUPS = 32


class MeshSettings(Model):
    """Every released decoder predicts colours; the extraction here takes them for granted."""

    use_color: Literal[True]


class MeshArgs(TrunkArgs):
    representation_config: MeshSettings


class SubdivideBlock(nn.Module):
    """Each voxel to its 8 parts: conv(SiLU(norm(conv(divide(SiLU(norm(x))))))) + divide(skip(x)).

    The first norm sees the coarse voxels, and the last convolution is zero at first.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(SparseGroupNorm32(GROUPS, channels), nn.SiLU())
        self.out_layers = nn.Sequential(
            SparseConv3d(channels, out, 3), SparseGroupNorm32(GROUPS, out), nn.SiLU(), SparseConv3d(out, out, 3)
        )
        self.skip_connection = SparseConv3d(channels, out, 1) if channels != out else nn.Identity()
        zero(self.out_layers[3])

    def forward(self, x: Voxels) -> Voxels:
        h = self.act_layers[0](x)
        h = self.out_layers[0](subdivide(h.with_feats(silu(h.feats))))
        h = self.out_layers[1](h)
        h = self.out_layers[3](h.with_feats(silu(h.feats)))
        # The skip looks at one voxel at a time, so it may be taken before its voxel is divided: an eighth of the work.
        return h.with_feats(h.feats + subdivide(self.skip_connection(x)).feats)


class SLatMeshDecoder(Trunk):
    """Voxels with latents at `resolution` to voxels at 4 times that, with the 101 channels of
    `flexicubes.from_features`; `represent` makes one mesh per sample."""

    Args, torso = MeshArgs, ("blocks", "upsample")

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        channels = self.args.model_channels
        self._build(self.args.latent_channels)
        self.upsample = nn.ModuleList(
            [SubdivideBlock(channels, channels // 4), SubdivideBlock(channels // 4, channels // 8)]
        )
        self.out_layer = nn.Linear(channels // 8, sum(flexicubes.CHANNELS.values()))
        initialise(self)
        self.finish()

    def forward(self, x: Voxels) -> Voxels:
        h = self.trunk(x)
        for block in self.upsample:
            h = self.through(block, h)
        return h.with_feats(self.out_layer(h.feats.to(self.out_layer.weight.dtype)))

    def represent(self, features: Voxels) -> list[Mesh]:
        """The mesh of each sample, from what `forward` gives."""
        size = FINER * self.args.resolution
        return [
            flexicubes.from_features(features.feats[rows], features.coords[rows, 1:], size) for rows in features.slices
        ]
