"""generate, for a TRELLIS folder: pictures or texts become meshes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import RunFailed, UserError

if TYPE_CHECKING:
    from fastgen.shapes import Shapes
    from fastgen.sparse import Voxels

logger = logging.getLogger("fastgen")
ENDINGS = (".glb", ".obj", ".ply", ".gif")
TAKEN = "--image or a prompt, --prompts, --out, --num, --steps, --sampler, --seed, --guidance, --encoder, --gaussians"


def refuse(options: dict[str, Any]) -> None:
    """Options that only models of images have."""
    for option, value in options.items():
        if value not in (None, False):
            raise UserError(f"--{option}: TRELLIS takes {TAKEN}, --dtype")


def generate(
    folder: Path,
    out: Path,
    *,
    image: Path | None,
    texts: Sequence[str] | None,
    num: int | None,
    steps: int | None,
    sampler: str | None,
    seed: int,
    guidance: float | None,
    encoder: Path | None,
    gaussians: bool,
    dtype: str | None,
    device: str,
) -> None:
    """Make `num` shapes, number i of which depends on the seed and i; steps, sampler and guidance go to both stages.

    guidance is the usual weight, 1 + cfg_strength. dtype defaults on a GPU to fp16, as released, or to fp32 for a
    student, whose training half precision can undo; on a CPU to fp32.
    """
    _refuse_ending(out, gaussians)
    from fastgen.api import pick_device
    from fastgen.files import make_folder, refuse_unwritable
    from fastgen.shapes import Shapes
    from fastgen.teachers.trellis.folder import DECODERS, LATENT_FLOW, STRUCTURE_DECODER, STRUCTURE_FLOW, TrellisFolder

    told = TrellisFolder.read(folder)
    refuse_unwritable(out.parent if out.suffix else out)  # before minutes of work
    count = num or len(texts or [image])
    if out.suffix and count > 1:
        raise UserError(f"--out {out}: {count} shapes need a folder")
    if guidance is not None and guidance < 1:
        raise UserError(f"--guidance {guidance}: at least 1, which is without; TRELLIS's cfg_strength w is this less 1")
    asked = _asked(told.condition, image, texts)
    device = pick_device(device)
    usual = "fp32" if device == "cpu" or told.student is not None else "fp16"
    shapes = Shapes(told, device=device, torso=dtype or usual, encoder=encoder)
    changes: dict[str, Any] = {"steps": steps, "cfg_strength": None if guidance is None else guidance - 1}
    shapes.check(sampler=sampler, **changes)  # before the encoder is read
    for role in (STRUCTURE_FLOW, STRUCTURE_DECODER, LATENT_FLOW, DECODERS["gaussian" if gaussians else "mesh"]):
        told.files(role)
    changes |= {"seed": seed, "sampler": sampler}
    cond = shapes.condition([asked[i % len(asked)] for i in range(count)])
    latents = shapes.latents(cond, shapes.structure(cond, **changes), **changes)
    ending = out.suffix.lower() or (".ply" if gaussians else ".glb")
    make_folder(out.parent if out.suffix else out)
    files = [out] if out.suffix else [out / f"{i:05d}{ending}" for i in range(count)]
    _write(shapes, latents, files, gaussians)
    logger.info("wrote %s", out)


def _refuse_ending(out: Path, gaussians: bool) -> None:
    ending = out.suffix.lower()
    if ending and ending not in ENDINGS:
        raise UserError(f"--out {out}: give a {', '.join(ENDINGS)} file, or a folder")
    if gaussians and ending not in ("", ".ply", ".gif"):
        raise UserError(f"--gaussians --out {out}: Gaussians are written as .ply, or turned as .gif")


def _asked(condition: str, image: Path | None, texts: Sequence[str] | None) -> list[Any]:
    """The pictures or the texts, whichever this pipeline needs."""
    if condition == "image":
        if image is None or texts is not None:
            raise UserError("this is TRELLIS from images: give --image FILE, and no prompt")
        return [_open(image)]
    if texts is None or image is not None:
        raise UserError("this is TRELLIS from texts: give a prompt, and no --image")
    return list(texts)


def _open(file: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(file)
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"--image {file}: no such file") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"--image {file}: not a whole picture ({str(error)[:120]})") from error
    return picture


def _write(shapes: Shapes, latents: Voxels, files: list[Path], gaussians: bool) -> None:
    from fastgen.geometry import splats
    from fastgen.geometry.export import save_mesh
    from fastgen.geometry.gaussian_ply import save_gaussians
    from fastgen.geometry.views import save_gif, turntable

    if gaussians:
        for file, made in zip(files, shapes.gaussians(latents), strict=True):
            save_gif(file, splats.turntable(made)) if file.suffix.lower() == ".gif" else save_gaussians(file, made)
        return
    for file, mesh in zip(files, shapes.meshes(latents), strict=True):
        if not len(mesh.faces):
            raise RunFailed(f"{file}: this shape has no surface, and was not written; try another seed")
        save_gif(file, turntable(mesh)) if file.suffix.lower() == ".gif" else save_mesh(file, mesh)
