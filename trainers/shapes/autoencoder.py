"""An encoder and a decoder of TRELLIS's classes as one network, and the folder that holds both.

autoencoder.json            which part of TRELLIS, the voxels along a side that it was trained on, facts
encoder.json, .safetensors  a stem as in official folders
decoder.json, .safetensors  another
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fastgen import files
from fastgen.config import Model, validate
from fastgen.errors import UserError
from fastgen.nets.weights import fill
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.models import make, write_stem

ABOUT = "autoencoder.json"
HALVES = {
    "structure": {"encoder": "SparseStructureEncoder", "decoder": "SparseStructureDecoder"},
    "latent": {"encoder": "SLatEncoder", "decoder": "SLatMeshDecoder"},
}


class About(Model):
    format: Literal[1] = 1
    part: Literal["structure", "latent"]
    resolution: int = Field(ge=1)
    facts: dict[str, Any] = Field(default_factory=dict)


class Autoencoder(nn.Module):
    """Both halves are trained, averaged and saved together. resolution: voxels along a side of what it sees."""

    def __init__(self, encoder: Network, decoder: Network, resolution: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.resolution = encoder, decoder, resolution

    def write(self, folder: Path, part: str, facts: dict[str, Any]) -> None:
        """Its files into a folder that is there."""
        files.write_json(folder / ABOUT, {"format": 1, "part": part, "resolution": self.resolution, "facts": facts})
        for half in HALVES[part]:
            write_stem(getattr(self, half), folder / half)

    @classmethod
    def read(cls, folder: Path, part: str) -> Autoencoder:
        """In eval mode, without gradients; another part's, and whatever is no autoencoder, is a UserError."""
        about = validate(About, files.read_json(folder / ABOUT), str(folder / ABOUT))
        if about.part != part:
            raise UserError(f"{folder}: the autoencoder of the part '{about.part}', needed is that of '{part}'")
        encoder, decoder = (_read(folder / half, kind) for half, kind in HALVES[part].items())
        return cls(encoder, decoder, about.resolution).eval().requires_grad_(False)


def _read(stem: Path, kind: str) -> Network:
    description, weights = (stem.with_name(f"{stem.name}.{ending}") for ending in ("json", "safetensors"))
    told: Any = files.read_json(description)
    if not isinstance(told, dict) or told.get("name") != kind or not isinstance(told.get("args"), dict):
        raise UserError(f"{description}: describes no {kind}, which is needed here")
    with torch.device("meta"):
        net = make(kind, told["args"], str(description))
    fill(net, files.load_tensors(weights), weights)
    return net
