"""TRELLIS's encoder of structured latents and its mesh decoder, trained from nothing on distances.

    mean, log-variance = E(features),  z = mean + sigma eps, one z for each voxel of the surface
    L = sdf + colour |c - c*|^2 + flat (|deform|^2 + |weights|^2) + kl KL(q(z | features) || N(0, 1))

sdf is the error at the 8 corners of every fine voxel, weighted by exp(-|d*| / near): the surface lies where d* changes
its sign, and far from it nothing is read off. The decoder gives distances in widths of fine voxels, and FlexiCubes
takes 1 / resolution from each, so what is compared with the truth is what it leaves. Deformations and weights have
nothing to learn where distances are exact, and are held at zero.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from fastgen.geometry import flexicubes
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.mesh_decoder import FINER
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn
from fastgen.trainers.shapes.bodies import CUT, LATTICE, fine_corners
from fastgen.trainers.shapes.structure_vae import divergence


class LatentVAE(Method):
    """Networks: the autoencoder (named "student" as every exported network)."""

    class Config(Method.Config):
        name: Literal["latent_vae"] = "latent_vae"
        kl: float = Field(default=0.01, ge=0)
        near: float = Field(default=2.0, gt=0)  # in widths of fine voxels, as distances are here
        colour: float = Field(default=10.0, ge=0)
        flat: float = Field(default=0.01, ge=0)

    makes = "teacher"

    def __init__(self, config: Any, student: Any) -> None:
        super().__init__(config, student)
        self.needs = frozenset({"x0"})
        self._corners = fine_corners()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        net: Any = self.student
        shown: Any = batch.x0
        mean, logvar = net.encoder(shown)
        z = mean + (logvar / 2).exp() * batch.normal_like("posterior", mean)
        parts = self.errors(net.decoder(z), shown)
        parts["kl"] = divergence(mean.feats, logvar.feats)
        c = self.config
        weighed = parts["sdf"] + c.colour * parts["colour"] + c.flat * parts["flat"] + c.kl * parts["kl"]
        return weighed, parts

    def errors(self, made: Voxels, shown: Voxels) -> dict[str, Tensor]:
        """What the decoder made of voxels [64 N, 101] against what these are, [N, CHANNELS]."""
        sdf, deform, weights, colour = made.feats.split(list(flexicubes.CHANNELS.values()), dim=1)
        truth = FINER * shown.feats[:, :LATTICE][:, self._corners.to(made.device)].reshape(-1, 8)
        weight = (-truth.abs() / self.config.near).exp()
        off = sdf - 1 / (FINER * self.resolution) - truth
        seen = colour.unflatten(1, (8, 6))[..., :3].sigmoid()
        colour = (shown.feats[:, None, LATTICE:] / CUT + 1) / 2
        told = colour.expand(-1, FINER**3, -1).reshape(-1, 1, 3)
        return {
            "sdf": (weight * off.square()).sum() / weight.sum(),
            "colour": (seen - told).square().mean(),
            "flat": deform.square().mean() + weights.square().mean(),
        }

    @property
    def resolution(self) -> int:
        """Voxels along a side."""
        net: Any = self.student
        return net.decoder.args.resolution
