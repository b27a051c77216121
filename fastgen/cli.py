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
    from fastgen.stages.machine import Context, Stage

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
    from fastgen.stages.machine import Context, load_run

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
    model: Annotated[Path, typer.Argument(help="A student or teacher folder.")],
    prompt: Annotated[str | None, typer.Argument(help="For models that read text.")] = None,
    out: Annotated[Path, typer.Option(help="A .png (a grid if --num > 1) or a folder (one file per image).")] = Path(
        "out.png"
    ),
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    label: Annotated[int | None, typer.Option(help="Class, for class-conditional models (default: no label).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network steps (default: the student's fewest).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight, for teachers.")] = None,
    solver: Annotated[str | None, typer.Option(help="ODE solver, for teachers: see `fastgen list samplers`.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Make images with a model folder."""
    from fastgen import api, images
    from fastgen.files import make_folder, write_atomic

    grid = out.suffix.lower() == ".png" and not out.is_dir()
    if out.suffix and not grid and not out.is_dir():
        raise UserError(f"--out {out}: give a .png file or a folder")
    loaded = api.load(model, device=device)
    loaded.refuse_no_pictures(prompt)
    samples = loaded.sample(num=num, label=label, steps=steps, seed=seed, guidance=guidance, solver=solver)
    if grid:
        make_folder(out.parent)
        write_atomic(out, images.grid_png(samples))
    else:
        make_folder(out)
        for i, sample in enumerate(samples):
            images.save_png(out / f"{i:05d}.png", sample)
    logger.info("wrote %s", out)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A student or teacher folder.")],
    reference: Annotated[str, typer.Option(help="Data: 'digits', a folder of images, a parquet or IDX path.")],
    num: Annotated[int, typer.Option(min=16, help="How many samples.")] = 5000,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    extractor: Annotated[
        str, typer.Option(help="classifier, random-conv, pooled-pixels, or a classifier's file.")
    ] = "classifier",
    as_json: Json = False,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Measure a model's samples against real images: FD, KID, precision, recall, shares, nearest image."""
    from fastgen.evaluate import evaluate as run

    results = run(model, reference, num=num, steps=steps, seed=seed, extractor=extractor, device=device)
    if as_json:
        print(json.dumps({"results": [result.to_dict() for result in results]}))
    else:
        for result in results:
            print(result)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model, a run, a pair set, or data.")], as_json: Json = False
) -> None:
    """Say what a path is: a teacher or student and its facts, a run and its stages, pairs, or images."""
    from fastgen.inspection import inspect as look

    _show(look(path), as_json)


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
