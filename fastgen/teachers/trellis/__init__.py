"""TRELLIS (2412.01506): a flow on a dense occupancy latent, a flow on the occupied voxels' latents, and the decoders of
both.

    structure_flow.py structure_vae.py     the first stage: where there is something
    slat_flow.py slat_vae.py               the second: what is there; the trunk that decoders share, and the encoder
    gaussian_ radiance_ mesh_decoder.py    what latents become
    models.py                              all of them by the class names of the official json files
    flows.py                               the two flows as denoisers
    conditions.py                          DINOv2 and CLIP, and how a picture is prepared
    folder.py                              an official folder: pipeline.json, stems, weights
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import UserError, suggestion
from fastgen.files import peek_json

if TYPE_CHECKING:
    from fastgen.denoiser import Denoiser
    from fastgen.teachers.trellis.flows import FlowDenoiser

PIPELINE = "pipeline.json"
PIPELINES = {"TrellisImageTo3DPipeline": "image", "TrellisTextTo3DPipeline": "text"}  # and what they are told
PARTS = ("structure", "latent")  # the flows of a folder, in the order in which they are sampled


def recognises(folder: Path) -> bool:
    """Whether a folder's pipeline.json names one of TRELLIS's pipelines."""
    return peek_json(folder / PIPELINE).get("name") in PIPELINES


def read(folder: Path, data: dict[str, Any] | None) -> Denoiser:
    """A flow's own folder, which has a fastgen.json (`data`); a pipeline of two flows is a UserError."""
    if data is not None:
        from fastgen.teachers.trellis.folder import read_flow

        return read_flow(folder, data)
    raise UserError(
        f"{folder}: TRELLIS is two flows and several decoders, not one network; name a flow, part=structure or "
        "part=latent. `fastgen generate` makes shapes with all of it, `fastgen inspect` counts it"
    )


def read_part(folder: Path, part: str | None) -> tuple[FlowDenoiser, dict[str, Any]]:
    """One flow of a pipeline's folder in float32, and its facts: {"kind", "facts"}; no part is a UserError."""
    from fastgen.teachers.trellis.folder import TrellisFolder

    if part is None:
        read(folder, None)
    if part not in PARTS:
        raise UserError(f"{folder}: no part '{part}' ({suggestion(str(part), PARTS)})")
    found = TrellisFolder.read(folder)
    return found.flow(part), {"kind": found.kind(part), "facts": found.facts(part)}
