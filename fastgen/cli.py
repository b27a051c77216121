"""The command line. Every command imports what it needs when it runs: `--help` and `list` start without torch."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.errors import RunFailed, Stopped, UserError

if TYPE_CHECKING:
    from fastgen.stages.config import Stage
    from fastgen.stages.context import Context

logger = logging.getLogger("fastgen")
app = typer.Typer(
    help="Distil a slow diffusion or flow teacher into a 1-4 step student, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config overrides: loop.steps=100")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in out=FOLDER; finished stages are skipped.")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Repeat the run from this stage on.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Tiny nets, made-up data, CPU, seconds: does the config run at all?")
]

_received: list[int] = []


def _end(number: int, frame: Any) -> None:
    """A command that has nothing to save ends at once."""
    raise SystemExit(128 + number)


def _ask(number: int, frame: Any) -> None:
    """The first signal asks a run politely: it saves and stops. The second one ends the process at once."""
    if _received:
        raise SystemExit(128 + number)
    _received.append(number)
    # Past Python's buffers: the signal may have come in the midst of a write to them.
    os.write(2, b"fastgen: stopping where the run can be continued; once more to stop at once\n")


def _on_signals(handler: Callable[[int, Any], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def main() -> None:
    """Run the CLI and turn every ending into its exit code: 0, 1 (run failed), 2 (input), 130 / 143 (signals)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    _on_signals(_end)
    try:
        # Without any word typer prints the help; its own way to report a mistake takes three lines.
        sys.exit(app(prog_name="fastgen", standalone_mode=not sys.argv[1:]) or 0)
    except UserError as error:
        message, code = str(error), 2
    except RunFailed as error:
        message, code = str(error), 1
    except Stopped as ending:
        message, code = f"{ending}; continue with --resume", 128 + _received[0]
    except OSError as error:  # of the machine, not of the input: a failing disk, too many open files
        message, code = f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's or typer's usage errors, whose home depends on the version
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "fastgen")
        message, code = f"{error.format_message()} (see `{where} --help`)", 2
    print(f"fastgen: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _open(config: Path, overrides: list[str], *, smoke: bool) -> tuple[list[Stage], Context]:
    """A config's stages and their surroundings, and signals that let them save."""
    import torch

    from fastgen.api import pick_device
    from fastgen.stages.config import load_run
    from fastgen.stages.context import Context

    run, stages = load_run(config, overrides, smoke=smoke)
    if run.threads:
        torch.set_num_threads(run.threads)
    names = tuple(stage.name for stage in stages)
    out, device = Path(run.out).expanduser(), pick_device(run.device)
    context = Context(run, out, device, interrupt=lambda: bool(_received), names=names)
    _on_signals(_ask)
    return stages, context


def _run(config: Path, overrides: list[str], *, smoke: bool, resume: bool, start: str | None) -> Context:
    """Execute a config's stages; returns the surroundings they ran in."""
    from fastgen.stages.machine import execute

    stages, context = _open(config, overrides, smoke=smoke)
    execute(context.config, stages, context, resume=resume, start=start)
    return context


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the budget: shows the way, does not pass the gate.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Train a digit teacher, distil it to one step, prove it, and write report.html. No download, no GPU, minutes."""
    from fastgen.quickstart import run

    run(
        lambda overrides: _run(_config("quickstart"), overrides, smoke=False, resume=resume, start=None).out,
        out,
        quick=quick,
    )


@app.command()
def distill(
    config: Annotated[str, typer.Argument(metavar="CONFIG|METHOD", help="A YAML file, a shipped config, or a method.")],
    overrides: Overrides = None,
    resume: Resume = False,
    start: From = None,
    smoke: Smoke = False,
) -> None:
    """Run a config: make pairs, train, distil, evaluate, as its stages say."""
    context = _run(_config(config), overrides or [], smoke=smoke, resume=resume, start=start)
    for name in context.names:
        logger.info("made %s", context.artefact(name))


def _config(name: str) -> Path:
    from fastgen.listing import find_config

    return find_config(name)


@app.command()
def pairs(
    config: Annotated[str, typer.Argument(metavar="CONFIG|METHOD")],
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="Which pairs stage of the config.")] = "pairs",
    worker: Annotated[int, typer.Option(min=0, help="This worker's number.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="How many workers share the set.")] = 1,
    smoke: Smoke = False,
) -> None:
    """Make a config's teacher pairs, alone or as one of many workers; what is whole is kept, so repeating is safe."""
    from fastgen.errors import suggestion
    from fastgen.stages.machine import begin
    from fastgen.stages.pairs import Pairs

    stages, context = _open(_config(config), overrides or [], smoke=smoke)
    found = {one.name: one for one in stages if isinstance(one, Pairs)}
    if stage not in found:
        raise UserError(f"--stage {stage}: no such pairs stage in {config} ({suggestion(stage, found)})")
    if worker >= workers:
        raise UserError(f"--worker {worker}: the workers of --workers {workers} are numbered 0 .. {workers - 1}")
    context.artefact(found[stage].teacher)  # before a folder is made: it may be a stage that has not been run
    found[stage].check(context)
    folder = begin(found[stage], context)
    found[stage].make(context, folder, worker=worker, workers=workers)
    logger.info("%s: this worker's shards are whole", folder / "shards")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A student or teacher: a folder, a .safetensors file or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="For models that read text.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: one image each.")] = None,
    out: Annotated[Path, typer.Option(help="A .png (a grid if --num > 1) or a folder (one file per image).")] = Path(
        "out.png"
    ),
    num: Annotated[
        int | None, typer.Option(min=1, help="How many images (default: 1, or one for each prompt).")
    ] = None,
    label: Annotated[int | None, typer.Option(help="Class, for class-conditional models (default: no label).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network steps (default: the student's fewest).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    size: Annotated[str | None, typer.Option(metavar="N|HxW", help="Pixels, for latent models.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight, for teachers.")] = None,
    solver: Annotated[str | None, typer.Option(help="ODE solver, for teachers: see `fastgen list samplers`.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="For a single file: a diffusers folder with configs and tokenizers.")
    ] = None,
    tiling: Annotated[
        bool, typer.Option("--tiling", help="Decode in tiles: less memory, slightly other pixels.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images made at once.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Make images with a model."""
    from fastgen import api, images
    from fastgen.data.prompts import read_prompts
    from fastgen.files import make_folder, write_atomic

    grid = out.suffix.lower() == ".png" and not out.is_dir()
    if out.suffix and not grid and not out.is_dir():
        raise UserError(f"--out {out}: give a .png file or a folder")
    if prompt is not None and prompts is not None:
        raise UserError("a prompt and --prompts: give one of them")
    texts = read_prompts(prompts) if prompts is not None else None if prompt is None else [prompt]
    if texts is not None and len(texts) > 1:
        texts = [texts[i % len(texts)] for i in range(num or len(texts))]
    loaded = api.load(model, config=config, device=device)
    if size is not None:
        loaded.resize(*_sides(size))
    loaded.refuse_no_pictures()
    loaded.tile(tiling)
    samples = loaded.sample(
        num=num or len(texts or [0]),
        prompts=texts,
        label=label,
        steps=steps,
        seed=seed,
        guidance=guidance,
        solver=solver,
        batch=batch,
    )
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


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="A student folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to be made.")],
    to: Annotated[str, typer.Option(help="diffusers (a whole pipeline), lora, or single-file.")],
    keys: Annotated[str | None, typer.Option(help="Names in a LoRA file: kohya (default) or peft.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where the replay runs.")] = "auto",
) -> None:
    """Make a student's folder for stock diffusers, replay it there, and print how to run it in one line of Python."""
    from fastgen.api import pick_device
    from fastgen.samplers.export.make import export as make

    made = make(student, to, out, keys=keys, dtype=dtype, device=pick_device(device))
    logger.info("wrote %s; to run it:", made.folder)
    print(made.line)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A student or teacher; none: --samples is measured.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="'digits', a folder of images, a parquet or IDX path, or a file of statistics.")
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
        typer.Option(help="classifier (default), inception, random-conv, pooled-pixels, or a classifier's file."),
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
    as_json: Json = False,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Measure samples against real images: FD (or FID), KID, precision, recall, IS, CLIP score, nearest image."""
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


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="A student or teacher folder.")] = None,
    vs: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measured in turns with MODEL; says speed-ups.")
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="No checkpoint: sd15, sd21 or sdxl at full size; --vs too.")
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
) -> None:
    """Measure latency, memory and cost of a model, beside another one's, in many ways of running it."""
    from fastgen.bench import Options, numbers, run
    from fastgen.eval.rows import cells, table

    options = Options(
        model,
        vs,
        random_weights,
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
    rows = []
    for row in run(options, json_to=json_to, repeats=repeats):
        rows.append(row)
        logger.info("%s", "  ".join(cells(row)))
    print(f"\n{table(rows)}", file=sys.stderr)
    if json_to == "-":
        print(json.dumps({"rows": [row.to_dict() for row in rows]}))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model, a run, a pair set, or data.")],
    overrides: Overrides = None,
    method: Annotated[
        str | None, typer.Option("--plan", metavar="CONFIG|METHOD", help="What training from this model would take.")
    ] = None,
    vram: Annotated[float | None, typer.Option(min=0.1, help="Of the device, in GiB: what makes it fit?")] = None,
    as_json: Json = False,
) -> None:
    """Say what a path is: a teacher or student and its facts, a run and its stages, pairs, or images.

    With --plan: the memory of weights, averages, moments and gradients of a method on this model, and an estimate of
    activations; KEY=VALUE changes its config.
    """
    if method is None:
        from fastgen.inspection import inspect as look

        if overrides or vram is not None:
            raise UserError("config overrides and --vram go with --plan METHOD")
        _show(look(path), as_json)
        return
    from fastgen.plan import plan

    made = plan(path, method, overrides or [], vram=vram)
    if as_json:
        print(json.dumps(made.to_dict()))
    else:
        print("\n".join(made.lines()))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, teachers, samplers or configs")], as_json: Json = False
) -> None:
    """List methods, teacher families, samplers or shipped configs."""
    from fastgen.listing import listing

    rows = listing(what)
    if as_json:
        print(json.dumps({what: rows}))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        status = f"  [{row['status']}]" if row.get("status") else ""
        print(f"{row['name']:<{width}}  {row['about']}{status}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: torch build, devices, packages, attention kernels."""
    from fastgen.doctor import problems, report

    rows = report()
    if as_json:
        print(json.dumps({"checks": [row._asdict() for row in rows]}))
    else:
        for row in rows:
            print(f"{row.status:<8} {row.name:<22} {row.detail}")
    if problems(rows):
        raise typer.Exit(1)


def _show(facts: dict[str, Any], as_json: bool, indent: str = "") -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _show(value, False, indent + "  ")
        else:
            print(f"{indent}{key}: {value}")


if __name__ == "__main__":
    main()
