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
from typing import Any

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.files import peek_json

PIPELINE = "pipeline.json"
PIPELINES = {"TrellisImageTo3DPipeline": "image", "TrellisTextTo3DPipeline": "text"}  # and what they are told


def recognises(folder: Path) -> bool:
    """Whether a folder's pipeline.json names one of TRELLIS's pipelines."""
    return peek_json(folder / PIPELINE).get("name") in PIPELINES


def read(folder: Path, data: dict[str, Any] | None) -> Denoiser:
    """A pipeline of two flows is not one network, which is a UserError."""
    raise UserError(
        f"{folder}: TRELLIS is two flows and several decoders, not one network: `fastgen generate` makes shapes with "
        "it, `fastgen inspect` counts it; distilling its flows is not built yet"
    )
