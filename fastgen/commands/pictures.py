"""generate, export: what students are for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.errors import UserError

logger = logging.getLogger("fastgen")


def generate(
    model: Annotated[str, typer.Argument(help="A student or teacher: a folder, a .safetensors file or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="For models that read text.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: one image each.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .png (a grid if --num > 1) or a folder (one file per image); out.png. TRELLIS: see below."
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="How many images (default: 1, or one for each prompt).")
    ] = None,
    label: Annotated[int | None, typer.Option(help="Class, for class-conditional models (default: no label).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network steps (default: the student's fewest).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    size: Annotated[str | None, typer.Option(metavar="N|HxW", help="Pixels, for latent models.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance weight, for teachers and for students that take it.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="ODE solver, for teachers: see `fastgen list samplers`.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="For a single file: a diffusers folder with configs and tokenizers.")
    ] = None,
    tiling: Annotated[
        bool, typer.Option("--tiling", help="Decode in tiles: less memory, slightly other pixels.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images made at once.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    image: Annotated[
        Path | None, typer.Option(help="TRELLIS: what to make a shape of (RGBA, or rembg cuts it).")
    ] = None,
    gaussians: Annotated[
        bool, typer.Option("--gaussians", help="TRELLIS: Gaussians (.ply) instead of a mesh.")
    ] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="TRELLIS: the folder of the image or text encoder, if it is not in the cache.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="TRELLIS: fp32, fp16 or bf16.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="TRELLIS students: euler, or renoise, with fresh noise between the steps.")
    ] = None,
) -> None:
    """Make images with a model, or shapes with TRELLIS: --out a .glb (out.glb), .obj, .ply, .gif, or a folder."""
    from fastgen.commands import shapes
    from fastgen.data.prompts import read_prompts
    from fastgen.sources import exists, locate
    from fastgen.teachers import trellis

    if prompt is not None and prompts is not None:
        raise UserError("a prompt and --prompts: give one of them")
    texts = read_prompts(prompts) if prompts is not None else None if prompt is None else [prompt]
    both: dict[str, Any] = {
        "texts": texts,
        "num": num,
        "steps": steps,
        "seed": seed,
        "guidance": guidance,
        "device": device,
    }
    of_images: dict[str, Any] = {"label": label, "size": size, "solver": solver, "tiling": tiling, "batch": batch}
    of_shapes: dict[str, Any] = {
        "image": image,
        "gaussians": gaussians,
        "encoder": encoder,
        "dtype": dtype,
        "sampler": sampler,
    }
    folder = locate(model, config=config) if exists(model) else Path(model)
    if trellis.recognises(folder):
        shapes.refuse(of_images)
        shapes.generate(folder, out or Path("out.glb"), **both, **of_shapes)
        return
    for option, value in of_shapes.items():
        if value:
            raise UserError(f"--{option}: of TRELLIS folders; {model} is none")
    _images(model, config, out or Path("out.png"), **both, **of_images)


def _images(
    model: str,
    config: Path | None,
    out: Path,
    *,
    texts: list[str] | None,
    num: int | None,
    device: str,
    size: str | None,
    tiling: bool,
    **options: Any,
) -> None:
    from fastgen import api, images
    from fastgen.commands.shapes import ENDINGS
    from fastgen.files import make_folder, write_atomic

    grid = out.suffix.lower() == ".png" and not out.is_dir()
    if out.suffix and not grid and not out.is_dir():
        told = f"; shapes are made by a whole TRELLIS folder, and {model} is none" if out.suffix in ENDINGS else ""
        raise UserError(f"--out {out}: give a .png file or a folder{told}")
    if texts is not None and len(texts) > 1:
        texts = [texts[i % len(texts)] for i in range(num or len(texts))]
    loaded = api.load(model, config=config, device=device)
    if size is not None:
        loaded.resize(*_sides(size))
    loaded.refuse_no_pictures()
    loaded.tile(tiling)
    samples = loaded.sample(num=num or len(texts or [0]), prompts=texts, **options)
    if grid:
        make_folder(out.parent)
        write_atomic(out, images.grid_png(samples))
    else:
        make_folder(out)
        for i, sample in enumerate(samples):
            images.save_png(out / f"{i:05d}.png", sample)
    logger.info("wrote %s", out)


def _sides(size: str) -> tuple[int, int]:
    """ "512" or "512x768" (height x width)."""
    parts = size.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise UserError(f"--size {size}: a number of pixels, or HEIGHTxWIDTH as in 512x768")
    return int(parts[0]), int(parts[-1])


def export(
    student: Annotated[Path, typer.Argument(help="A student folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to be made.")],
    to: Annotated[str, typer.Option(help="diffusers (a whole pipeline), lora, or single-file.")],
    keys: Annotated[str | None, typer.Option(help="Names in a LoRA file: kohya (default) or peft.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or hub id, for the line of a LoRA or a single file.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="For students told how far they step: the one step count of this folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the replay runs.")] = "auto",
) -> None:
    """Make a student's folder for stock diffusers, replay it there, and print how to run it in one line of Python."""
    from fastgen.api import pick_device
    from fastgen.samplers.export.make import export as make

    made = make(student, to, out, keys=keys, dtype=dtype, base=base, steps=steps, device=pick_device(device))
    logger.info("wrote %s; to run it:", made.folder)
    print(made.line)
