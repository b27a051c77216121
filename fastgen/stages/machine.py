"""The stage machine: which stages a run has, what they read, which are done, and where a killed run goes on.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, field_validator

from fastgen import files
from fastgen.config import Model, config_hash, dump_yaml, override, plain, read_yaml, validate
from fastgen.data import DataConfig
from fastgen.errors import RunFailed, Stopped, UserError, suggestion
from fastgen.stages import records
from fastgen.stages.records import BEGUN, RECORD

logger = logging.getLogger("fastgen")
CONFIG = "config.yaml"
CONFIG_HEAD = "# The resolved config of this run, written by fastgen; it can be run again.\n"
REFERENCES = ("teacher", "student", "init", "pairs", "evaluation")


class Stage(Model):
    """One step of a run. A kind of stage is a subclass with its own fields and its own `work`."""

    stage: str
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")  # it becomes a folder, which --from removes

    # Keys, of the stage or of the run's settings, that do not decide what it makes: they may change on a resume.
    incidental: ClassVar[frozenset[str]] = frozenset()

    def inputs(self) -> dict[str, str]:
        """What the stage reads, by key: names of earlier stages, `teacher`, or paths."""
        named = {key: getattr(self, key, None) for key in REFERENCES}
        return {key: reference for key, reference in named.items() if isinstance(reference, str)}

    def settings(self) -> tuple[str, ...]:
        """Which fields of the run decide what the stage makes."""
        return ("seed",)

    def smoke(self) -> Stage:
        """The same stage with a budget of seconds."""
        return self

    def check(self, run: Context) -> None:
        """Refuse what would fail later. Called before the run begins: the stages before this one may not be done."""

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        """Do it, in a folder that may hold a killed attempt; returns what `stage.json` should tell."""
        raise NotImplementedError


class Run(Model):
    """The head of a config. `stages` are validated one by one, each by its own kind."""

    about: str = ""  # paper, what it needs, expected figure, memory and time
    status: str = "smoke only"
    out: str = Field(default="runs/fastgen", min_length=1)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    teacher: str | dict[str, Any] | None = None  # a path, or a closed-form teacher: {family: mixture, ...}
    guidance: float | None = None  # of the teacher, where a stage does not say
    data: DataConfig | None = None
    hold_out: int = Field(default=5, ge=2)  # every k-th image of data without a split of their own
    smoke: tuple[str, ...] = ()  # overrides for --smoke: made-up data and tiny networks
    smoke_teacher: dict[str, Any] | None = None  # the network that stands in for teacher=PATH under --smoke
    stages: list[dict[str, Any]]

    @field_validator("stages")
    @classmethod
    def _not_empty(cls, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not stages:
            raise ValueError("a run needs at least one stage")
        return stages


class Block(Model):
    """Stages that are repeated: round i of stage `x` is named `x-i` (the first just `x`)."""

    name: str = ""
    repeat: int = Field(default=1, ge=1)
    stages: list[dict[str, Any]] = Field(min_length=1)


def kinds() -> dict[str, type[Stage]]:
    """The kinds of stages by name."""
    from fastgen.stages.evaluate import Evaluate
    from fastgen.stages.pairs import Pairs
    from fastgen.stages.report import Report
    from fastgen.stages.train import Train

    return {"train": Train, "pairs": Pairs, "evaluate": Evaluate, "report": Report}


def load_run(path: Path, overrides: list[str], *, smoke: bool = False) -> tuple[Run, list[Stage]]:
    """Read a config, apply `--smoke` and the overrides, and validate every part of it."""
    tree = read_yaml(path)
    if smoke:
        tree = override(tree, [*_made_up(tree.get("smoke"), overrides), "device=cpu"])
    tree = override(tree, overrides)
    _refuse_misplaced(tree, path)
    run = validate(Run, one_stage(tree), str(path))
    if smoke and run.teacher is None and run.smoke_teacher:
        stand_in = {"name": "teacher", "stage": "train", "method": "flow_matching", "net": run.smoke_teacher}
        run = run.model_copy(update={"stages": [stand_in, *run.stages]})
    stages = [_stage(data, f"{path}: stages.{data.get('name', '?')}") for data in expand(run.stages, str(path))]
    names = [stage.name for stage in stages]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two stages are named '{doubled[0]}'")
    return run, [stage.smoke() for stage in stages] if smoke else stages


def _made_up(smoke: Any, overrides: list[str]) -> Iterator[str]:
    """The config's overrides for --smoke, but for those that the user's own reach into: data.path=X keeps the data."""
    given = [line.partition("=")[0] for line in overrides]
    for line in smoke if isinstance(smoke, list) else ():  # anything else is told when the run is validated
        key = str(line).partition("=")[0]
        if not any(own == key or own.startswith(f"{key}.") for own in given):
            yield str(line)


def _refuse_misplaced(tree: dict[str, Any], path: Path) -> None:
    """A key of a stage at the head of a config with many, or one that neither the run nor its single stage knows."""
    stage_keys = {key for kind in kinds().values() for key in kind.model_fields}
    for key in tree:
        if key in Run.model_fields:
            continue
        if "stages" in tree and key in stage_keys and isinstance(tree["stages"], list):
            names = [str(entry.get("name")) for entry in tree["stages"] if isinstance(entry, dict)]
            raise UserError(f"{path}: '{key}' belongs to a stage: stages.NAME.{key} (NAME: {', '.join(names)})")
        if "stages" not in tree and key not in kinds()["train"].model_fields:
            known = {*Run.model_fields, *kinds()["train"].model_fields} - {"stages", "stage", "name"}
            raise UserError(f"{path}: unknown key '{key}' ({suggestion(str(key), known)})")


def one_stage(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without `stages` is one training stage: the keys that are not the run's are the stage's."""
    if "stages" in tree:
        return tree
    own = {key: value for key, value in tree.items() if key in Run.model_fields}
    stage = {key: value for key, value in tree.items() if key not in Run.model_fields}
    teacher = {"teacher": "teacher"} if own.get("teacher") is not None else {}
    return {**own, "stages": [{"stage": "train", "name": "train", **teacher, **stage}]}


def _stage(data: dict[str, Any], where: str) -> Stage:
    kind = data.get("stage")
    if not isinstance(kind, str) or kind not in kinds():
        raise UserError(f"{where}: no kind of stage '{kind}' ({suggestion(str(kind), kinds())})")
    return validate(kinds()[kind], data, where)


def expand(entries: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The stages with every `Block` written out.

    A reference "a|b" becomes the newest stage of the first name that has been made so far, else the last name.
    """
    made: dict[str, str] = {}
    flat: list[dict[str, Any]] = []
    for entry in entries:
        block = Block(stages=[entry])
        if "repeat" in entry or "stages" in entry:
            block = validate(Block, entry, f"{where}: stages.{entry.get('name', '?')}")
        for turn in range(block.repeat):
            for stage in map(dict, block.stages):
                for key in REFERENCES:
                    if isinstance(stage.get(key), str):
                        names = stage[key].split("|")
                        stage[key] = next((made[name] for name in names if name in made), names[-1])
                if isinstance(name := stage.get("name"), str):
                    stage["name"] = made[name] = f"{name}-{turn + 1}" if turn else name
                flat.append(stage)
    return flat


class Look(NamedTuple):
    """What is to be known of a model before it is used."""

    kind: str  # "student" or "teacher"
    shape: tuple[int, ...]


@dataclass
class Context:
    """What a stage may ask of its run. `names` are the run's stages in order; `execute` fills them in."""

    config: Run
    out: Path
    device: str
    interrupt: Callable[[], bool] = lambda: False
    names: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    _hashes: dict[Path, str] = field(default_factory=dict)
    _looks: dict[str, Look] = field(default_factory=dict)

    def folder(self, reference: str) -> Path:
        """The folder of a stage."""
        return self.out / reference

    def done(self, name: str) -> bool:
        """Whether a stage of this run is finished."""
        return name in self.names and (self.out / name / RECORD).exists()

    def artefact(self, reference: str) -> Path | dict[str, Any]:
        """What a reference means: a stage's output, the run's teacher, or a path; nothing is a UserError."""
        if reference in self.names:
            if not self.done(reference):
                raise UserError(f"stage '{reference}' is not done yet; `fastgen distill` makes it")
            return self.out / reference / records.read(self.out / reference / RECORD)["output"]
        given = self.config.teacher if reference == "teacher" else reference
        if given is None:
            raise UserError("teacher is not set: add teacher=PATH (a checkpoint folder) to the command or the config")
        if isinstance(given, dict):
            return given
        path = Path(given).expanduser()
        if reference == "teacher" and not path.exists():
            raise UserError(f"teacher={given}: no such file or folder")
        if not given or not path.exists():
            hint = suggestion(given, {*self.names, "teacher"})
            raise UserError(f"'{given}': neither a stage of this run nor an existing path ({hint})")
        return path

    def path(self, reference: str) -> Path:
        """Like `artefact`, where only a folder will do; a closed-form teacher is a UserError."""
        artefact = self.artefact(reference)
        if isinstance(artefact, dict):
            raise UserError(
                f"'{reference}' is a closed-form teacher, which has no weights; "
                "put a stage with method imitate first and name that"
            )
        return artefact

    def look(self, reference: str | None) -> Look | None:
        """A model that comes from outside the run, read once to see that it can be; None for what a stage makes."""
        from fastgen.api import open_teacher
        from fastgen.teacher import read_denoiser

        if reference is None or reference in self.names:
            return None
        if reference not in self._looks:
            source = self.artefact(reference)
            if isinstance(source, dict):
                self._looks[reference] = Look("teacher", open_teacher(source).shape)
            else:
                denoiser, data = read_denoiser(source)
                self._looks[reference] = Look(data.get("kind", "teacher"), denoiser.shape)
        return self._looks[reference]

    def sha256(self, reference: str) -> str:
        """The hash of an input, from the record of the stage that made it or from the files themselves."""
        artefact = self.artefact(reference)
        if reference in self.names:
            return records.read(self.out / reference / RECORD)["sha256"]
        if isinstance(artefact, dict):
            return config_hash(artefact)
        if artefact not in self._hashes:
            self._hashes[artefact] = files.sha256(artefact)
        return self._hashes[artefact]


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
