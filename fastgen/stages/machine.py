"""The stage machine: which stages of a run are done, what they read, and where a killed run goes on.

Every stage works in `<out>/<name>/`. It writes `begun.json` first and `stage.json` last; both hold its config, the
run's settings that it reads, and the hashes of its inputs. A finished stage whose record matches is skipped; one that
was begun or finished with anything else is refused, and so is all that can be known to be wrong, before a file is
touched.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.config import dump_yaml, plain
from fastgen.errors import RunFailed, Stopped, UserError, suggestion
from fastgen.stages import records
from fastgen.stages.config import Run, Stage
from fastgen.stages.context import Context
from fastgen.stages.records import BEGUN, RECORD

logger = logging.getLogger("fastgen")
CONFIG = "config.yaml"
CONFIG_HEAD = "# The resolved config of this run, written by fastgen; it can be run again.\n"


def execute(run: Run, stages: list[Stage], context: Context, *, resume: bool, start: str | None = None) -> None:
    """Run every stage that is not done. `start` repeats from that stage on; `resume` continues what was begun."""
    out, names = context.out, tuple(stage.name for stage in stages)
    context.names = names
    if start is not None and start not in names:
        raise UserError(f"--from {start}: no such stage ({suggestion(start, names)})")
    begun = _holds_run(out)
    if begun and not resume and start is None:
        raise UserError(f"{out}: holds a run already; continue it with --resume, or choose another out=")
    if start is not None and not begun:
        raise UserError(f"--from {start}: {out} holds no run to repeat; leave --from out")
    kept = names if start is None else names[: names.index(start)]
    _check(stages, kept, context)
    files.make_folder(out)
    files.write_atomic(out / CONFIG, CONFIG_HEAD + dump_yaml(run))
    for name in names[len(kept) :]:
        records.remove(out / name)
    try:
        for i, stage in enumerate(stages):
            if i and context.interrupt():
                raise Stopped(f"{names[i - 1]} is done, {stage.name} not begun, in {out}")
            _run_stage(stage, context)
    except UserError:
        if not any((out / name).exists() for name in names):  # so that the mended command can be given as it is
            (out / CONFIG).unlink()
            with contextlib.suppress(OSError):  # it held something else
                out.rmdir()
        raise


def _holds_run(out: Path) -> bool:
    config = out / CONFIG
    if config.is_file() and not config.read_bytes().startswith(CONFIG_HEAD.encode()):
        raise UserError(f"{config}: not written by fastgen, and a run would replace it; choose another out=")
    return config.exists()


def _check(stages: list[Stage], kept: tuple[str, ...], context: Context) -> None:
    """Refuse everything that can be known to be wrong before anything runs, and records that no longer hold."""
    for i, stage in enumerate(stages):
        for key, reference in stage.inputs().items():
            if reference in context.names[i:]:
                raise UserError(f"stage {stage.name}: {key}={reference} is not made before this stage")
            if reference not in context.names:
                context.artefact(reference)
        if stage.name not in kept or not context.done(stage.name):
            stage.check(context)
        records.refuse_foreign(context.out / stage.name)
    for stage in stages[: len(kept)]:
        _compare(stage, context)
        if not context.done(stage.name):
            break  # the stages after it read what it is still to make


def _key(stage: Stage, context: Context) -> dict[str, Any]:
    """All that decides what a stage makes."""
    run = plain(context.config)
    return {
        "config": plain(stage),
        "run": {name: run[name] for name in stage.settings()},
        "inputs": {reference: context.sha256(reference) for reference in stage.inputs().values()},
    }


def _compare(stage: Stage, context: Context) -> None:
    """Refuse to go on with a stage that was begun or finished with something else, naming what."""
    folder = context.out / stage.name
    file, state = (RECORD, "finished") if context.done(stage.name) else (BEGUN, "begun")
    if (folder / file).exists():
        changed = list(records.changes(records.read(folder / file)["key"], _key(stage, context), stage.incidental))
        if changed:
            mend = f"repeat it with --from {stage.name}, or choose another out="
            raise UserError(f"{folder}: {state} with another {', another '.join(changed[:3])}; {mend}")


def begin(stage: Stage, context: Context) -> Path:
    """The stage's folder, marked with what it is begun with; a folder begun with anything else is refused."""
    records.refuse_foreign(context.out / stage.name)
    _compare(stage, context)
    folder = files.make_folder(context.out / stage.name)
    records.publish(folder / BEGUN, {"key": _key(stage, context)})
    return folder


def _run_stage(stage: Stage, context: Context) -> None:
    folder = context.folder(stage.name)
    if context.done(stage.name):
        _compare(stage, context)
        context.seconds[stage.name] = records.read(folder / RECORD)["seconds"]
        logger.info("%s: done before (%.0f s), skipped", stage.name, context.seconds[stage.name])
        return
    logger.info("%s: %s", stage.name, stage.stage)
    began = time.perf_counter()
    try:
        told = stage.work(context, begin(stage, context))
        output = told.pop("output", ".")
        sha256 = told.pop("sha256", None) or files.sha256(folder / output)
        context.seconds[stage.name] = time.perf_counter() - began
        head = {"name": stage.name, "stage": stage.stage, "key": _key(stage, context), "output": output}
        record = {**head, "sha256": sha256, "seconds": context.seconds[stage.name], **told}
        files.write_json(folder / RECORD, record)
    except UserError:
        records.forget(folder)
        raise
    except Exception as error:
        if reason := _exhausted(error):
            raise RunFailed(f"stage {stage.name}: {reason}; saved: {_saved(context, folder)}") from error
        raise


def _exhausted(error: BaseException | None) -> str | None:
    """What the machine ran out of, if that is what ended a stage."""
    while error is not None:
        text = str(error).lower()
        if "no space left" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the device; free some and run again with --resume"
        if isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text:
            return "out of memory; lower the rows handled at once (loop.micro, pairs.batch) and run again with --resume"
        error = error.__cause__ or error.__context__
    return None


def _saved(context: Context, folder: Path) -> str:
    finished = ", ".join(name for name in context.names if context.done(name))
    told = [f"the stages {finished}" if finished else "", *records.left(folder)]
    return " and ".join(filter(None, told)) or "nothing yet"
