"""TRELLIS's networks by the class names of their json files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgen import files
from fastgen.errors import UserError, suggestion
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.gaussian_decoder import SLatGaussianDecoder
from fastgen.teachers.trellis.mesh_decoder import SLatMeshDecoder
from fastgen.teachers.trellis.radiance_decoder import SLatRadianceFieldDecoder
from fastgen.teachers.trellis.slat_flow import SLatFlowModel
from fastgen.teachers.trellis.slat_vae import SLatEncoder
from fastgen.teachers.trellis.structure_flow import SparseStructureFlowModel
from fastgen.teachers.trellis.structure_vae import SparseStructureDecoder, SparseStructureEncoder

NETWORKS: dict[str, type[Network]] = {
    network.__name__: network
    for network in (
        SparseStructureFlowModel,
        SparseStructureEncoder,
        SparseStructureDecoder,
        SLatFlowModel,
        SLatEncoder,
        SLatGaussianDecoder,
        SLatRadianceFieldDecoder,
        SLatMeshDecoder,
    )
}
ELASTIC = "Elastic"  # training configs name variants with other memory management and the same parameters


def class_of(name: str, where: str) -> type[Network]:
    """The class that a json names; an unknown one is a UserError. where: the file, for messages."""
    found = NETWORKS.get(name.removeprefix(ELASTIC))
    if found is None:
        raise UserError(f"{where}: no TRELLIS network is called '{name}' ({suggestion(name, NETWORKS)})")
    return found


def make(name: str, args: dict[str, Any], where: str) -> Network:
    """A network with fresh weights from a json's name and args; mistakes in them are UserErrors."""
    kind = class_of(name, where)
    try:
        return kind(**args)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def write_stem(net: Network, stem: Path) -> None:
    """A network's .json and .safetensors as official folders have them, in the dtypes that it has: float32, or its
    torso in float16."""
    args = {**net.args.model_dump(mode="json", by_alias=True), "use_fp16": net.torso_dtype == torch.float16}
    files.write_json(stem.with_name(f"{stem.name}.json"), {"name": type(net).__name__, "args": args})
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    save_file(tensors, stem.with_name(f"{stem.name}.safetensors"))
