"""TRELLIS's networks by the class names of their json files."""

from __future__ import annotations

from typing import Any

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
