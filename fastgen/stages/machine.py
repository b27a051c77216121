"""The stage machine: which stages a run has, what they read, which are done, and where a killed run goes on.

Every stage writes into `<out>/<name>/` and ends by writing `stage.json` there: its config, the hashes of its inputs and
of its output, and what it measured. A stage whose record matches is skipped; one whose record does not is refused.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fastgen import files
from fastgen.config import Model, config_hash, dump_yaml, override, plain, read_yaml, validate
from fastgen.data import DataConfig
from fastgen.errors import UserError, suggestion

logger = logging.getLogger("fastgen")
RECORD = "stage.json"
REFERENCES = ("teacher", "student", "init", "pairs", "evaluation")


class Stage(Model):
    """One step of a run. A kind of stage is a subclass with its own fields and its own `work`."""

    stage: str
    name: str

    def inputs(self) -> list[str]:
        """References to what the stage reads: names of earlier stages, `teacher`, or paths."""
        named = [getattr(self, key, None) for key in REFERENCES]
        return [reference for reference in named if isinstance(reference, str)]

    def smoke(self) -> Stage:
        """The same stage with a budget of seconds."""
        return self

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        """Do it, in a folder that may hold a killed attempt; returns what `stage.json` should tell."""
        raise NotImplementedError


class Run(Model):
    """The head of a config. `stages` are validated one by one, each by its own kind."""

    about: str = ""  # paper, what it needs, expected figure, memory and time
    status: str = "smoke only"
    out: str = "runs/fastgen"
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    device: str = "auto"
    threads: int | None = None
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
        tree = override(tree, [*tree.get("smoke", []), "device=cpu"])
    tree = one_stage(override(tree, overrides))
    if smoke and tree.get("teacher") is None and (net := tree.get("smoke_teacher")):
        stand_in = {"name": "teacher", "stage": "train", "method": "flow_matching", "net": net}
        tree["stages"] = [stand_in, *tree["stages"]]
    run = validate(Run, tree, str(path))
    stages = [_stage(data, f"{path}: stages.{data.get('name', '?')}") for data in expand(run.stages)]
    names = [stage.name for stage in stages]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two stages are named '{doubled.pop()}'")
    return run, [stage.smoke() for stage in stages] if smoke else stages


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
    if kind not in kinds():
        raise UserError(f"{where}: no kind of stage '{kind}' ({suggestion(str(kind), kinds())})")
    return validate(kinds()[kind], data, where)


def expand(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks {name, repeat: k, stages: [...]} written out: round i of stage `x` is named `x-i` (the first just `x`).

    A reference "a|b" becomes the newest stage of the first name that has been made so far, else the last name.
    """
    made: dict[str, str] = {}
    flat: list[dict[str, Any]] = []

    def add(stage: dict[str, Any], suffix: str) -> None:
        stage = dict(stage)
        for key in REFERENCES:
            if isinstance(stage.get(key), str):
                names = stage[key].split("|")
                known = [name for name in names if name in made]
                stage[key] = made[known[0]] if known else names[-1]
        name = str(stage.get("name", ""))
        stage["name"] = made[name] = name + suffix
        flat.append(stage)

    for entry in stages:
        for turn in range(int(entry.get("repeat", 1))):
            for stage in entry["stages"] if "repeat" in entry else [entry]:
                add(stage, f"-{turn + 1}" if turn else "")
    return flat


@dataclass
class Context:
    """What a stage may ask of its run."""

    config: Run
    out: Path
    device: str
    interrupt: Callable[[], bool] = lambda: False
    seconds: dict[str, float] = field(default_factory=dict)

    def folder(self, reference: str) -> Path:
        """The folder of a finished stage."""
        return self.out / reference

    def artefact(self, reference: str) -> Path | dict[str, Any]:
        """What a reference means: a stage's output, the run's teacher, or a path; nothing is a UserError."""
        if (self.out / reference / RECORD).exists():
            return self.out / reference / files.read_json(self.out / reference / RECORD)["output"]
        if reference == "teacher":
            if self.config.teacher is None:
                raise UserError(
                    "teacher is not set: add teacher=PATH (a checkpoint folder) to the command or the config"
                )
            return self.config.teacher if isinstance(self.config.teacher, dict) else Path(self.config.teacher)
        return Path(reference)

    def sha256(self, reference: str) -> str:
        """The hash of an input, from the record of the stage that made it or from the files themselves."""
        if (self.out / reference / RECORD).exists():
            return files.read_json(self.out / reference / RECORD)["sha256"]
        artefact = self.artefact(reference)
        if isinstance(artefact, dict):
            return config_hash(artefact)
        if not artefact.exists():
            raise UserError(f"{artefact}: neither a finished stage of this run nor a path")
        return files.sha256(artefact)


def execute(run: Run, stages: list[Stage], context: Context, *, resume: bool, start: str | None = None) -> None:
    """Run every stage that is not done. `start` repeats from that stage on; `resume` continues what was begun."""
    names = [stage.name for stage in stages]
    if start is not None and start not in names:
        raise UserError(f"--from {start}: no such stage ({suggestion(start, names)})")
    out = files.make_folder(context.out)
    begun = (out / "config.yaml").exists()
    if begun and not resume and start is None:
        raise UserError(f"{out}: holds a run already; continue it with --resume, or choose another out=")
    files.write_atomic(out / "config.yaml", dump_yaml(run))
    if start is not None:
        for name in names[names.index(start) :]:
            shutil.rmtree(out / name, ignore_errors=True)
    for stage in stages:
        _run_stage(stage, context)


def _run_stage(stage: Stage, context: Context) -> None:
    folder = context.out / stage.name
    key = {
        "config": plain(stage),
        "seed": context.config.seed,
        "data": plain(context.config.data) if context.config.data else None,
        "inputs": {reference: context.sha256(reference) for reference in stage.inputs()},
    }
    if (folder / RECORD).exists():
        record = files.read_json(folder / RECORD)
        if record["key"] == key:
            logger.info("%s: done before (%.0f s), skipped", stage.name, record["seconds"])
            context.seconds[stage.name] = record["seconds"]
            return
        changed = ", ".join(k for k in key if record["key"].get(k) != key[k])
        raise UserError(
            f"{folder}: finished with another {changed}; repeat it with --from {stage.name}, or choose another out="
        )
    logger.info("%s: %s", stage.name, stage.stage)
    files.make_folder(folder)
    began = time.perf_counter()
    told = stage.work(context, folder)
    context.seconds[stage.name] = time.perf_counter() - began
    output = told.pop("output", ".")
    record = {
        "name": stage.name,
        "stage": stage.stage,
        "key": key,
        "output": output,
        "sha256": told.pop("sha256", None) or files.sha256(folder / output),
        "seconds": context.seconds[stage.name],
        **told,
    }
    files.write_json(folder / RECORD, record)
