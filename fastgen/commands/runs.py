"""quickstart, distill, pairs: what makes students."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgen.commands import signals
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.stages.config import Stage
    from fastgen.stages.context import Context

logger = logging.getLogger("fastgen")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config overrides: loop.steps=100")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in out=FOLDER; finished stages are skipped.")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Repeat the run from this stage on.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Tiny nets, made-up data, CPU, seconds: does the config run at all?")
]


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
    context = Context(run, out, device, interrupt=lambda: signals.received() is not None, names=names)
    signals.ask_to_stop()
    return stages, context


def _run(config: Path, overrides: list[str], *, smoke: bool, resume: bool, start: str | None) -> Context:
    """Execute a config's stages; returns the surroundings they ran in."""
    from fastgen.stages.machine import execute

    stages, context = _open(config, overrides, smoke=smoke)
    execute(context.config, stages, context, resume=resume, start=start)
    return context


def _config(name: str) -> Path:
    from fastgen.listing import find_config

    return find_config(name)
