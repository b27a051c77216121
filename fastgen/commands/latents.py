"""latents: own meshes for TRELLIS."""

from __future__ import annotations

import logging
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastgen.errors import UserError

logger = logging.getLogger("fastgen")
QUIET_SECONDS = 10.0  # between two lines of progress


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
    encoder: Annotated[
        Path | None, typer.Option(help="The folder of DINOv2 with registers, if it is not in the cache.")
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
    from fastgen.sources import locate
    from fastgen.teachers.trellis import recognises
    from fastgen.teachers.trellis.folder import TrellisFolder

    app.mesh_files(meshes)  # before anything is loaded
    folder = locate(trellis)
    if not recognises(folder):
        raise UserError(f"{trellis}: no TRELLIS folder (its pipeline.json names none of TRELLIS's pipelines)")
    encoders = app.Encoders.load(
        TrellisFolder.read(folder),
        latent=latent_encoder or app.LATENT_ENCODER,
        structure=structure_encoder or app.STRUCTURE_ENCODER,
        image=encoder,
        device=pick_device(device),
    )
    if views < app.VIEWS:
        logger.info("%d views a mesh, where the published recipe has %d; the card says so", views, app.VIEWS)
    told = time.monotonic()

    def advance(name: str, done: int) -> None:
        nonlocal told
        if time.monotonic() - told > QUIET_SECONDS:
            told = time.monotonic()
            logger.info("%s: view %d of %d", name, done, views)

    skipped = app.make(
        encoders,
        meshes,
        out,
        views=views,
        size=size,
        up=up.value,
        seed=seed,
        skip_bad=on_bad is OnBad.skip,
        advance=advance,
    )
    logger.info("wrote %s%s", out, f", {len(skipped)} meshes left out" if skipped else "")
