"""The config of a run: its head, its stages, each validated by its own kind, and how `--smoke` and blocks expand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from fastgen.config import Model, override, read_yaml, validate
from fastgen.data import DataConfig
from fastgen.errors import UserError, suggestion

if TYPE_CHECKING:
    from fastgen.stages.context import Context

REFERENCES = ("teacher", "student", "init", "pairs", "evaluation", "latents", "base", "structure", "latent")


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
    teacher_config: str | None = None  # for a single-file checkpoint: a diffusers folder with configs and tokenizers
    guidance: float | None = None  # of the teacher, where a stage does not say
    guidance_interval: tuple[float, float] | None = None  # guided only between these noise levels sigma / alpha
    size: int | None = Field(
        default=None, ge=8
    )  # pixels a side of a latent teacher's images; None: what it was made for
    cache: str | None = None  # of embeddings and latents; None: `fastgen.sources.cache_folder()`
    data: DataConfig | None = None
    hold_out: int = Field(default=5, ge=2)  # every k-th image of data without a split of their own
    smoke: tuple[str, ...] = ()  # overrides for --smoke: made-up data and tiny networks
    smoke_teacher: str | dict[str, Any] | None = (
        None  # for teacher=PATH under --smoke: zoo:NAME, or a net to be trained
    )
    stages: list[dict[str, Any]]

    @field_validator("stages")
    @classmethod
    def _not_empty(cls, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not stages:
            raise ValueError("a run needs at least one stage")
        return stages

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"[{interval[0]:g}, {interval[1]:g}] holds no noise level; give [LOW, HIGH], LOW < HIGH")
        return interval


class Block(Model):
    """Stages that are repeated: round i of stage `x` is named `x-i` (the first just `x`)."""

    name: str = ""
    repeat: int = Field(default=1, ge=1)
    stages: list[dict[str, Any]] = Field(min_length=1)


def kinds() -> dict[str, type[Stage]]:
    """The kinds of stages by name."""
    from fastgen.stages.assemble import Assemble
    from fastgen.stages.evaluate import Evaluate
    from fastgen.stages.evaluate_solids import EvaluateSolids
    from fastgen.stages.pairs import Pairs
    from fastgen.stages.report import Report
    from fastgen.stages.shape_vae import ShapeVAE
    from fastgen.stages.train import Train
    from fastgen.stages.world import World

    made: dict[str, type[Stage]] = {"train": Train, "pairs": Pairs, "evaluate": Evaluate, "report": Report}
    made |= {"assemble": Assemble, "evaluate_solids": EvaluateSolids, "shape_vae": ShapeVAE, "world": World}
    return made


def load_run(path: Path, overrides: list[str], *, smoke: bool = False) -> tuple[Run, list[Stage]]:
    """Read a config, apply `--smoke` and the overrides, and validate every part of it."""
    tree = read_yaml(path)
    if smoke:
        tree = override(tree, [*_made_up(tree.get("smoke"), overrides), "device=cpu"])
    tree = override(tree, overrides)
    _refuse_misplaced(tree, path)
    run = validate(Run, one_stage(tree), str(path))
    if smoke and run.teacher is None and isinstance(run.smoke_teacher, str):
        run = run.model_copy(update={"teacher": run.smoke_teacher})
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
