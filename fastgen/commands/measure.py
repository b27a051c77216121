"""evaluate, bench: what they are worth."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.commands.look import Json
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.eval.rows import Row

logger = logging.getLogger("fastgen")
OF_MESHES = "--reference, --seed, --points, --extractor, --fid, --weights, --json, --device"


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="A student or teacher; none: --samples is measured. Or meshes: see below.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="'digits', a folder of images, a parquet or IDX path, a file of statistics, or meshes."),
    ] = None,
    num: Annotated[int | None, typer.Option(min=16, help="How many samples (default: 5000, or all there are).")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight, for teachers.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published protocol: coco2017-5k, coco2014-30k or cifar10-50k.")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="classifier (default; inception with --prompts), random-conv, pooled-pixels, or a file."),
    ] = None,
    fid: Annotated[str | None, typer.Option(help="The Inception network, images resized by 'tf' or 'clean'.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The Inception network's file (default: in FASTGEN_WEIGHTS_DIR).")
    ] = None,
    backend: Annotated[str, typer.Option(help="own, clean-fid or torchmetrics.")] = "own",
    prompts: Annotated[Path | None, typer.Option(help="Prompts of a text model, taken in their order.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A CLIPModel folder: the CLIP score besides.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Keep images here, and go on from those kept; or the images to measure.")
    ] = None,
    save_reference: Annotated[
        Path | None, typer.Option(help="Write the reference's statistics: .safetensors, or .npz for others.")
    ] = None,
    crop: Annotated[int | None, typer.Option(min=8, help="Centre squares, by Lanczos to this side.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images made at a time.")] = None,
    points: Annotated[
        int | None, typer.Option(min=100, help="Meshes: drawn on each surface (default: 100000).")
    ] = None,
    as_json: Json = False,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Measure samples against real images: FD (or FID), KID, precision, recall, IS, CLIP score, nearest image.

    A mesh (.glb, .obj, .ply) or a folder of them in place of MODEL, and the same as --reference, matched by name:
    Chamfer distances, F-scores, normal consistency, soundness, and for folders FD over rendered views.
    """
    from fastgen.evaluate_shapes import holds_meshes

    if holds_meshes(model) or holds_meshes(reference):
        of_images = {
            "num": num,
            "steps": steps,
            "guidance": guidance,
            "preset": preset,
            "backend": None if backend == "own" else backend,
            "prompts": prompts,
            "clip": clip,
            "samples": samples,
            "save-reference": save_reference,
            "crop": crop,
            "batch": batch,
        }
        of_views = {"extractor": extractor, "fid": fid, "weights": weights}
        _evaluate_shapes(model, reference, of_images, points, as_json, seed=seed, device=device, **of_views)
        return
    if points is not None:
        raise UserError(f"--points {points}: of meshes; leave it out")
    from fastgen.evaluate import Ask
    from fastgen.evaluate import evaluate as run

    results = run(
        Ask(
            model=model,
            reference=reference,
            num=num,
            steps=steps,
            seed=seed,
            guidance=guidance,
            preset=preset,
            extractor=extractor,
            fid=fid,
            weights=weights,
            backend=backend,
            prompts=prompts,
            clip=clip,
            samples=samples,
            save_reference=save_reference,
            crop=crop,
            batch=batch,
            device=device,
        )
    )
    if as_json:
        print(json.dumps({"results": [result.to_dict() for result in results]}))
    else:
        for result in results:
            print(result)


def _evaluate_shapes(
    meshes: str | None,
    reference: str | None,
    of_images: dict[str, Any],
    points: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from fastgen.evaluate_shapes import POINTS, Ask
    from fastgen.evaluate_shapes import evaluate as run

    for option, value in of_images.items():
        if value is not None:
            raise UserError(f"--{option} {value}: of images; meshes take {OF_MESHES}")
    if meshes is None or reference is None:
        given = f"{meshes}: give the meshes it is held against as --reference"
        raise UserError(given if meshes else f"--reference {reference}: give the meshes to be measured before it")
    report = run(Ask(meshes=meshes, reference=reference, points=points or POINTS, **options))
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        for result in report.results:
            print(result)


def bench(
    model: Annotated[str | None, typer.Argument(help="A student or teacher folder.")] = None,
    vs: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measured in turns with MODEL; says speed-ups.")
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="No checkpoint: sd15, sd21, sdxl, sana-0.6b or -1.6b; --vs too.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N,N", help="Default: all that a student was made for.")] = None,
    batch: Annotated[str, typer.Option(metavar="N,N")] = "1",
    variants: Annotated[
        str, typer.Option(help="Joined by +, listed by commas: eager,bf16+compile-regional.")
    ] = "eager",
    scope: Annotated[str, typer.Option(help="net, e2e, and bare: the networks alone.")] = "net,e2e",
    json_to: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="JSON lines, a row at once; - is stdout.")
    ] = None,
    device: Annotated[str, typer.Option()] = "auto",
    teacher_steps: Annotated[int, typer.Option(min=1, help="Of a teacher given by --vs.")] = 25,
    solver: Annotated[str, typer.Option(help="Of a teacher: see `fastgen list samplers`.")] = "euler",
    guidance: Annotated[float | None, typer.Option(help="Of a teacher; it doubles the network's batch.")] = None,
    tiny_decoder: Annotated[Path | None, typer.Option(metavar="FOLDER", help="An AutoencoderTiny.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Processes; figures are medians of theirs.")] = 1,
    iterations: Annotated[int | None, typer.Option(min=1, help="Timed calls (default: 50, and 10 s of them).")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Calls before (default: 10, and 3 s of them).")] = None,
    limit: Annotated[float | None, typer.Option(min=0, help="Seconds at which a pass is cut short (30).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    structure: Annotated[
        Path | None, typer.Option(metavar="MESH", help="TRELLIS: its stages, on the voxels of this closed mesh.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="TRELLIS: fp32, fp16 or bf16.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="TRELLIS: the encoder's folder, if it is not in the cache.")
    ] = None,
) -> None:
    """Measure latency, memory and cost of a model, beside another one's, in many ways of running it.

    A TRELLIS folder with --structure MESH: each stage on that mesh's voxels; its --variants are eager, spconv, xformers
    and flash_attn.
    """
    from fastgen import bench as images
    from fastgen import bench_shapes as shapes
    from fastgen.bench import numbers
    from fastgen.eval.rows import cells, table

    of_shapes: dict[str, Any] = {"structure": structure, "dtype": dtype, "encoder": encoder}
    told: dict[str, Any] = dict(
        model=model,
        vs=vs,
        random_weights=random_weights,
        steps=None if steps is None else numbers("--steps", steps),
        batch=numbers("--batch", batch),
        variants=tuple(variants.split(",")),
        scopes=tuple(scope.split(",")),
        device=device,
        teacher_steps=teacher_steps,
        solver=solver,
        guidance=guidance,
        tiny_decoder=tiny_decoder,
        iterations=iterations,
        warmup=warmup,
        limit=limit,
        seed=seed,
    )
    measured: Iterator[Row]
    if structure is not None or shapes.folder_of(model) is not None:
        measured = shapes.run(shapes.ShapeOptions(**told, **of_shapes), json_to=json_to, repeats=repeats)
    else:
        for option, value in of_shapes.items():
            if value is not None:
                raise UserError(f"--{option} {value}: of TRELLIS folders; leave it out")
        measured = images.run(images.Options(**told), json_to=json_to, repeats=repeats)
    rows = []
    for row in measured:
        rows.append(row)
        logger.info("%s", "  ".join(cells(row)))
    print(f"\n{table(rows)}", file=sys.stderr)
    if json_to == "-":
        print(json.dumps({"rows": [row.to_dict() for row in rows]}))
