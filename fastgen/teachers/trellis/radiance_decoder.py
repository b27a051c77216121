"""Structured latents to a radiance field of products of vectors in each voxel (Strivec). Its renderer is a CUDA
extension: here are the field's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from fastgen.config import Model
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.args import TrunkArgs
from fastgen.teachers.trellis.blocks import initialise
from fastgen.teachers.trellis.slat_vae import Trunk


class RadianceSettings(Model):
    """rank: products per voxel; dim: entries of each vector."""

    rank: int = Field(ge=1)
    dim: int = Field(ge=1)


@dataclass(frozen=True, eq=False)
class RadianceField:
    """position [N, 3] of the voxels' centres in 0 .. 1; trivec [N, rank, 3, dim], one vector per axis; density
    [N, rank] and features_dc [N, rank, 1, 3] of each product; resolution of the voxels' grid."""

    position: Tensor
    trivec: Tensor
    density: Tensor
    features_dc: Tensor
    resolution: int


class RadianceArgs(TrunkArgs):
    representation_config: RadianceSettings


class SLatRadianceFieldDecoder(Trunk):
    """Voxels with latents to voxels with rank (3 dim + 4) channels; `represent` makes one field per sample."""

    Args = RadianceArgs

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        s = self.args.representation_config
        self._build(self.args.latent_channels)
        self.out_layer = nn.Linear(self.args.model_channels, s.rank * (3 * s.dim + 4))
        initialise(self)
        self.finish()

    def forward(self, x: Voxels) -> Voxels:
        return self._last(self.trunk(x))

    def represent(self, features: Voxels) -> list[RadianceField]:
        """The field of each sample, from what `forward` gives."""
        return [self._one(features.feats[rows], features.coords[rows, 1:]) for rows in features.slices]

    def _one(self, feats: Tensor, coords: Tensor) -> RadianceField:
        settings, resolution = self.args.representation_config, self.args.resolution
        rank, dim = settings.rank, settings.dim
        vectors, density, colour = feats.split([3 * rank * dim, rank, 3 * rank], dim=1)
        return RadianceField(
            (coords.to(feats.dtype) + 0.5) / resolution,
            vectors.reshape(-1, rank, 3, dim) + 1,  # a product of ones is where training starts
            density,
            colour.reshape(-1, rank, 1, 3),
            resolution,
        )
