"""Structured latents to 3D Gaussians: each voxel holds a few, spread around its centre by a Hammersley sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from fastgen.config import Model
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.args import TrunkArgs
from fastgen.teachers.trellis.blocks import initialise
from fastgen.teachers.trellis.slat_vae import Trunk

# Attributes in the order of the last layer's channels, each for all Gaussians of a voxel, and their sizes.
CHANNELS = {"_xyz": (3,), "_features_dc": (1, 3), "_scaling": (3,), "_rotation": (4,), "_opacity": (1,)}
LOW, EXTENT = -0.5, 1.0  # the box that positions 0 .. 1 are mapped to, along each axis


class LearningRates(Model):
    """What each attribute is multiplied by."""

    xyz: float = Field(alias="_xyz")
    features_dc: float = Field(alias="_features_dc")
    opacity: float = Field(alias="_opacity")
    scaling: float = Field(alias="_scaling")
    rotation: float = Field(alias="_rotation")


class GaussianSettings(Model):
    """The decoder's `representation_config`.

    voxel_size       how far a Gaussian may be from its voxel's centre, in half voxels
    kernel           the smallest scale: that of the filter against aliasing, in world units
    scaling_bias, opacity_bias   what a zero decodes to
    """

    model_config = ConfigDict(populate_by_name=True)

    lr: LearningRates
    perturb_offset: bool
    voxel_size: float = Field(gt=1)  # at 1 or less the sequence's corner has no inverse tanh
    num_gaussians: int = Field(ge=1)
    image_kernel: float = Field(alias="2d_filter_kernel_size")  # for renderers
    kernel: float = Field(alias="3d_filter_kernel_size", ge=0)
    scaling_bias: float = Field(gt=0)
    opacity_bias: float = Field(gt=0, lt=1)
    scaling_activation: Literal["exp", "softplus"]


@dataclass(frozen=True, eq=False)
class Gaussians:
    """G Gaussians in world coordinates, z up; the sources of each attribute beside it, as the decoder gave them.

    position [G, 3] in 0 .. 1; features_dc [G, 1, 3], the constant harmonic of the colour; raw_scaling [G, 3],
    raw_rotation [G, 4] and raw_opacity [G, 1] before biases and activations.
    """

    position: Tensor
    features_dc: Tensor
    raw_scaling: Tensor
    raw_rotation: Tensor
    raw_opacity: Tensor
    settings: GaussianSettings

    @property
    def xyz(self) -> Tensor:
        return self.position * EXTENT + LOW

    @property
    def scales(self) -> Tensor:
        """Standard deviations along the axes, [G, 3]."""
        s, bias = self.settings, torch.tensor(self.settings.scaling_bias, dtype=torch.float64)
        if s.scaling_activation == "softplus":
            inverse = bias + torch.log(-torch.expm1(-bias))
            active = functional.softplus(self.raw_scaling + float(inverse))
        else:
            active = torch.exp(self.raw_scaling + float(bias.log()))
        return torch.sqrt(active.square() + s.kernel**2)

    @property
    def unnormalised_rotation(self) -> Tensor:
        """Quaternions (w, x, y, z) [G, 4] of any length, as .ply files hold them."""
        return self.raw_rotation + self.raw_rotation.new_tensor([1.0, 0, 0, 0])

    @property
    def rotation(self) -> Tensor:
        """Unit quaternions (w, x, y, z), [G, 4]."""
        return functional.normalize(self.unnormalised_rotation, dim=-1)

    @property
    def opacity_logit(self) -> Tensor:
        """[G, 1], as .ply files hold it; not by way of the opacity, which rounds to 1."""
        return self.raw_opacity + float(torch.logit(torch.tensor(self.settings.opacity_bias, dtype=torch.float64)))

    @property
    def opacity(self) -> Tensor:
        return self.opacity_logit.sigmoid()

    @property
    def log_scales(self) -> Tensor:
        """[G, 3], as .ply files hold them."""
        return self.scales.log()


class GaussianArgs(TrunkArgs):
    representation_config: GaussianSettings


class SLatGaussianDecoder(Trunk):
    """Voxels with latents to voxels with 14 channels per Gaussian; `represent` makes one `Gaussians` per sample."""

    Args = GaussianArgs
    offset_perturbation: Tensor

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.settings: GaussianSettings = self.args.representation_config
        self._build(self.args.latent_channels)
        self.out_layer = nn.Linear(self.args.model_channels, 14 * self.settings.num_gaussians)
        points = hammersley(self.settings.num_gaussians)
        self.register_buffer("offset_perturbation", torch.atanh((2 * points - 1) / self.settings.voxel_size))
        initialise(self)
        self.finish()

    def forward(self, x: Voxels) -> Voxels:
        return self._last(self.trunk(x))

    def represent(self, features: Voxels) -> list[Gaussians]:
        """The Gaussians of each sample, from what `forward` gives."""
        return [self._one(features.feats[rows], features.coords[rows, 1:]) for rows in features.slices]

    def _one(self, feats: Tensor, coords: Tensor) -> Gaussians:
        s, rates, found, start = self.settings, self.settings.lr.model_dump(by_alias=True), {}, 0
        for name, shape in CHANNELS.items():
            end = start + s.num_gaussians * torch.Size(shape).numel()
            found[name] = feats[:, start:end].reshape(len(feats), s.num_gaussians, *shape) * rates[name]
            start = end
        offset = found.pop("_xyz") + (self.offset_perturbation if s.perturb_offset else 0)
        offset = torch.tanh(offset) / self.args.resolution * 0.5 * s.voxel_size
        position = ((coords.to(feats.dtype) + 0.5) / self.args.resolution)[:, None] + offset
        return Gaussians(
            position=position.flatten(0, 1),
            features_dc=found["_features_dc"].flatten(0, 1),
            raw_scaling=found["_scaling"].flatten(0, 1),
            raw_rotation=found["_rotation"].flatten(0, 1),
            raw_opacity=found["_opacity"].flatten(0, 1),
            settings=s,
        )


def hammersley(n: int) -> Tensor:
    """n points [n, 3] of the unit cube: (i / n, i's digits in base 2, and in base 3, mirrored at the point)."""
    return torch.tensor([[i / n, _mirrored(i, 2), _mirrored(i, 3)] for i in range(n)])


def _mirrored(i: int, base: int) -> float:
    value, place = 0.0, 1.0
    while i:
        place /= base
        i, digit = divmod(i, base)
        value += digit * place
    return value
