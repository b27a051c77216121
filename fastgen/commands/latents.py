"""latents: own meshes for TRELLIS, and what its flows are told of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.data.shape_conditions import Conditions
    from fastgen.latents import Encoders
    from fastgen.teachers.trellis.folder import TrellisFolder

logger = logging.getLogger("fastgen")
QUIET_SECONDS = 10.0  # between two lines of progress
PICTURES = 4  # of a mesh: 24, as published, are 68 MB on disk


class Up(str, Enum):
    y = "y"
    z = "z"


class OnBad(str, Enum):
    refuse = "refuse"
    skip = "skip"


def latents(
    trellis: Annotated[str, typer.Argument(help="A TRELLIS folder; of the four, image-large holds the encoders.")],
    meshes: Annotated[Path, typer.Argument(help="A folder of .glb, .gltf, .obj, .off, .ply, .stl; sub-folders too.")],
    out: Annotated[Path, typer.Argument(help="The folder to be made, or to go on with.")],
    views: Annotated[int, typer.Option(min=1, help="Rendered views of each mesh.")] = 150,
    size: Annotated[int, typer.Option(min=16, help="Pixels a side of a view.")] = 512,
    pictures: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures of each mesh as conditions of an image pipeline: 4; 2.8 MB each."),
    ] = None,
    conditions: Annotated[bool, typer.Option(help="Pictures or captions of the meshes for the flows.")] = True,
    encoder: Annotated[
        Path | None, typer.Option(help="The folder of DINOv2 with registers, if it is not in the cache.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="The folder of CLIP's text encoder, if it is not in the cache.")
    ] = None,
    latent_encoder: Annotated[
        str | None, typer.Option(metavar="STEM", help="Another stem than ckpts/slat_enc_swin8_B_64l8_fp16.")
    ] = None,
    structure_encoder: Annotated[
        str | None, typer.Option(metavar="STEM", help="Another stem than ckpts/ss_enc_conv3d_16l8_fp16.")
    ] = None,
    up: Annotated[Up, typer.Option(help="The axis that points up in the meshes' files.")] = Up.y,
    on_bad: Annotated[OnBad, typer.Option(help="What to do about meshes that cannot be used.")] = OnBad.refuse,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the views' directions.")] = 0,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Make a folder of meshes into TRELLIS latents; finished ones are kept, so repeating goes on."""
    from fastgen import latents as app
    from fastgen.api import pick_device
    from fastgen.data.shape_conditions import Captions
    from fastgen.sources import locate
    from fastgen.teachers.trellis import recognises
    from fastgen.teachers.trellis.conditions import TextEncoder
    from fastgen.teachers.trellis.folder import TrellisFolder

    found = app.mesh_files(meshes)  # before anything is loaded
    folder = locate(trellis)
    if not recognises(folder):
        raise UserError(f"{trellis}: no TRELLIS folder (its pipeline.json names none of TRELLIS's pipelines)")
    told = TrellisFolder.read(folder)
    captions = _captions(told, meshes, found, pictures, conditions)
    encoders = app.Encoders.load(
        told,
        latent=latent_encoder or app.LATENT_ENCODER,
        structure=structure_encoder or app.STRUCTURE_ENCODER,
        image=encoder,
        device=pick_device(device),
    )
    if views < app.VIEWS:
        logger.info("%d views a mesh, where the published recipe has %d; the card says so", views, app.VIEWS)
    last = time.monotonic()

    def advance(what: str, of: int, name: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last > QUIET_SECONDS:
            last = time.monotonic()
            logger.info("%s: %s %d of %d", name, what, done, of)

    asked: Conditions | None = None
    if captions is not None:
        asked = Captions(TextEncoder(told.encoder, folder=text_encoder, device=pick_device(device)), captions)
    elif conditions:
        asked = _pictures(encoders, pictures or PICTURES, len(found), advance)
    skipped = app.make(
        encoders,
        meshes,
        out,
        views=views,
        size=size,
        up=up.value,
        seed=seed,
        conditions=asked,
        skip_bad=on_bad is OnBad.skip,
        advance=partial(advance, "view", views),
    )
    logger.info("wrote %s%s", out, f", {len(skipped)} meshes left out" if skipped else "")


def _captions(
    told: TrellisFolder, meshes: Path, found: dict[str, Path], pictures: int | None, conditions: bool
) -> dict[str, list[str]] | None:
    """What a text pipeline is told of each mesh; None for an image pipeline, or where no conditions are asked for."""
    from fastgen.data.mesh_captions import captions_of
    from fastgen.teachers.trellis.flows import IMAGE

    if pictures is not None and not conditions:
        raise UserError(f"--pictures {pictures} with --no-conditions: give one of the two")
    if not conditions or told.condition == IMAGE:
        return None
    if pictures is not None:
        raise UserError(f"--pictures {pictures}: the flows of {told.path} are told texts; leave it out")
    return captions_of(meshes, found)


def _pictures(encoders: Encoders, count: int, meshes: int, advance: Callable[[str, int, str, int], None]) -> Conditions:
    from fastgen.data.shape_conditions import Pictures

    made = Pictures(encoders.image, encoders.hashes["image_encoder"], count, advance=partial(advance, "picture", count))
    each, total = made.bytes / 1e6, made.bytes * meshes / 1e9
    logger.info("%d pictures a mesh as conditions: %.3g MB on disk, %.3g GB for %d meshes", count, each, total, meshes)
    return made
