"""The stage that trains: a teacher from data, a copy of a closed-form one, or a student by any method."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from torch import Tensor

import fastgen
from fastgen import files, images
from fastgen.api import open_teacher
from fastgen.config import Model, config_hash, explain, plain
from fastgen.data import DataSet
from fastgen.data.part import data_part
from fastgen.data.shards import PairShards
from fastgen.data.source import Source
from fastgen.denoiser import Denoiser
from fastgen.errors import RunFailed, UserError
from fastgen.nets.fresh import FreshNet
from fastgen.samplers import few_step
from fastgen.stages.machine import Context, Stage
from fastgen.student import Student, save_teacher
from fastgen.teacher import Teacher, family, read_denoiser
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Method, find_method
from fastgen.trainers.engine.monitors import left_band, sample_statistics

logger = logging.getLogger("fastgen")
PREVIEW_ROWS = 64
INCIDENTAL = [
    f"loop.{key}"
    for key in ("micro", "save_every", "keep", "keep_every", "log_every", "preview_every", "trackers", "bad_limit")
]


class LpipsConfig(Model):
    """Local weight files of the perceptual distance: the trunk's and the linear heads'."""

    net: Literal["alex", "vgg"] = "vgg"
    trunk: str
    heads: str


class Train(Stage):
    """Trains `method` from `init` (a stage, "teacher", a path) or on a fresh `net`, on `pairs` or on the run's data."""

    stage: Literal["train"]
    method: SerializeAsAny[Method.Config]
    init: str | None = None
    net: SerializeAsAny[FreshNet] | None = None
    init_distilled: bool = False
    teacher: str | None = None
    pairs: str | None = None
    lpips: LpipsConfig | None = None
    loop: LoopConfig = Field(default_factory=LoopConfig)

    incidental: ClassVar = frozenset({"data.on_bad", *INCIDENTAL})

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Model:
        return _by_name(value, "name", lambda name: find_method(name).Config)

    @field_validator("net", mode="before")
    @classmethod
    def _net(cls, value: Any) -> Model | None:
        return None if value is None else _by_name(value, "family", _net_config)

    def smoke(self) -> Train:
        few = {"steps": 6, "batch": 8, "micro": None, "save_every": 3, "preview_every": 6, "log_every": 2}
        return self.model_copy(update={"loop": self.loop.model_copy(update=few)})

    def settings(self) -> tuple[str, ...]:
        return ("seed", "data", "hold_out") if self.pairs is None else ("seed",)

    def check(self, run: Context) -> None:
        if (self.net is None) == (self.init is None):
            raise UserError(f"stage {self.name}: set one of net (a fresh network) and init (a stage, teacher or path)")
        if self.init is not None and self.init not in run.names:
            run.path(self.init)  # refuses a closed-form teacher, which has no weights
        init, teacher = run.look(self.init), run.look(self.teacher)
        if init is not None and init.kind == "student" and not self.init_distilled:
            raise UserError(
                f"stage {self.name}: init={self.init} is a distilled student, not a teacher; "
                "set init_distilled=true if that is meant"
            )
        self._distance("cpu")
        data = None if self.pairs in run.names else self._data(run)
        if self.net is not None and self.teacher is None and self.pairs is None and data is None:
            raise UserError(
                f"stage {self.name}: a fresh net needs data or a teacher to know its shape from; set data.path"
            )
        same_shape(self.name, init=init, teacher=teacher)
        same_shape(self.name, init=init, **{"pairs" if self.pairs else "data": data if init else None})

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        teacher = open_teacher(run.artefact(self.teacher), device=run.device) if self.teacher else None
        data = self._data(run)
        student = self._student(run, teacher, data)
        method = find_method(self.method.name)(self.method, student, teacher, distance=self._distance(run.device))
        data = data if method.needs else None
        same_shape(self.name, student=student, teacher=teacher, **{"pairs" if self.pairs else "data": data})
        self._refuse_other_classes(student, data)
        source = Source(data, run.config.seed) if data is not None else None
        loop = Loop(
            method,
            source,
            self.loop,
            folder,
            seed=run.config.seed,
            device=run.device,
            preview=Preview(source, folder, min(PREVIEW_ROWS, self.loop.batch)),
            interrupt=run.interrupt,
        )
        if loop.resume():
            logger.info("%s: resumed at step %d of %d", self.name, loop.step, self.loop.steps)
        else:
            loop.log.rewind(0)  # what an attempt wrote that was killed before its first checkpoint
        loop.run()
        self._refuse_diverged(loop)
        facts = self._facts(run, teacher, data)
        if method.makes == "teacher":
            save_teacher(loop.student, folder / "model", facts)
        else:
            Student(loop.student, method.sampler(), facts).save(folder / "model")
        return {"output": "model", "facts": facts}

    def _data(self, run: Context) -> DataSet | None:
        if self.pairs is not None:
            return PairShards(run.path(self.pairs))
        return None if run.config.data is None else data_part(run.config.data, "train", run.config.hold_out)

    def _student(self, run: Context, teacher: Teacher | None, data: DataSet | None) -> Denoiser:
        """A trainable copy of what `init` names, or a fresh network in the shape of the teacher, else of the data."""
        if self.init is not None:
            return copy.deepcopy(read_denoiser(run.path(self.init))[0]).requires_grad_(True)
        like = teacher or data
        assert self.net is not None and like is not None  # see check
        torch.manual_seed(run.config.seed)
        return family(self.net.family).build(self.net, like.shape, like.num_classes)

    def _refuse_other_classes(self, student: Denoiser, data: DataSet | None) -> None:
        """Labels that the student has no place for, and a student left without the labels it expects."""
        own, given = student.num_classes, None if data is None else data.num_classes
        if data is None or own == given or (own is None and self.pairs is None):
            return
        if own is None or given is None or given > own:
            what = "pairs" if self.pairs else "data"
            raise UserError(f"stage {self.name}: the student has {_classes(own)}, the {what} have {_classes(given)}")

    def _refuse_diverged(self, loop: Loop) -> None:
        """A network that ends on skipped updates, or with weights that are no numbers, is not written as a model."""
        whole = all(bool(p.isfinite().all()) for p in loop.student.parameters())
        if loop.bad or not whole:
            what = f"the last {loop.bad} update(s) were skipped" if whole else "the weights of 'student' are not finite"
            raise RunFailed(
                f"step {loop.step}: {what}: loss or gradient was not finite, and no model was written; the checkpoints "
                f"are in {loop.checkpoints.folder}; lower loop.optim.lr or set loop.clip, then --from {self.name}"
            )

    def _distance(self, device: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        if self.lpips is None:
            return None
        from fastgen.eval.lpips import LPIPS

        return LPIPS(self.lpips.net, self.lpips.trunk, self.lpips.heads).to(device)

    def _facts(self, run: Context, teacher: Teacher | None, data: DataSet | None) -> dict[str, Any]:
        """What the folder tells of its making; licence and origin come from the teacher or from `init`."""
        origin = {} if teacher is None else dict(teacher.facts)
        if self.init is not None:
            origin = {**read_denoiser(run.path(self.init))[1].get("facts", {}), **origin}
        kept = ("license", "license_link", "base_model", "teacher", "teacher_sha256", "guidance")
        facts = {key: origin[key] for key in kept if key in origin}
        if self.init is not None:
            facts |= {"init": self.init, "init_sha256": run.sha256(self.init)}
        if isinstance(data, PairShards):
            facts |= {"guidance": data.manifest.guidance, "teacher_sha256": data.manifest.teacher}
        return facts | {
            "method": self.method.name,
            "config_hash": config_hash(self),
            "method_config": plain(self.method),
            "data": None if data is None else data.name,
            "training_steps": self.loop.steps,
            "samples": self.loop.steps * self.loop.batch,
            "seed": run.config.seed,
            "fastgen": fastgen.__version__,
            "torch": str(torch.__version__),
        }


def _by_name(value: Any, key: str, find: Callable[[str], type[Model]]) -> Model:
    """The config class that a name decides; mistakes inside it keep their own one line."""
    if isinstance(value, Model):
        return value
    if isinstance(value, str):
        value = {key: value}
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise ValueError(f"a mapping with '{key}' is needed")
    try:
        kind = find(value[key])
    except UserError as error:
        raise ValueError(str(error)) from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error, kind)) from error


def _net_config(name: str) -> type[Model]:
    module = family(name)
    if not hasattr(module, "NetConfig"):
        raise UserError(f"family '{name}' has no network to train from nothing")
    return module.NetConfig


def same_shape(stage: str, **things: Any) -> None:
    """Refuse models and data of different sample shapes, naming each; what is None is left out."""
    shapes = {name: tuple(thing.shape) for name, thing in things.items() if thing is not None}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"stage {stage}: samples of different shapes do not go together: {told}")


def _classes(number: int | None) -> str:
    return "no labels" if number is None else f"{number} classes"


class Preview:
    """Fixed noise through the student now and then: a picture, collapse monitors, and the method's own figures."""

    def __init__(self, source: Source | None, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, torch.arange(rows)
        self.data = None if source is None else source.get(self.rows)

    @torch.no_grad()
    def __call__(self, loop: Loop) -> dict[str, float]:
        student, spec = loop.student.eval(), loop.method.sampler()
        batch = loop.batch_of(self.rows, self.data or {})
        z = batch["eps"] if "eps" in batch.data else batch.normal("preview", student.shape)
        cond = batch.cond if student.num_classes is not None else None
        steps = loop.method.preview_steps
        renoise = lambda i: batch.normal("preview/renoise", student.shape, draw=i)  # noqa: E731
        samples = few_step.sample(student, spec, z, steps, cond, renoise=renoise)
        if len(student.shape) == 3 and student.shape[0] in (1, 3):
            files.make_folder(self.folder / "previews")
            grid = images.grid_png(samples.float().cpu().nan_to_num())
            files.write_atomic(self.folder / "previews" / f"step-{loop.step:08d}.png", grid)
        values = loop.method.diagnose(student, batch)
        if "x0" in batch.data:
            statistics = sample_statistics(samples, batch.x0)
            for line in left_band(statistics):
                logger.warning("%s: step %d: %s", self.folder.name, loop.step, line)
            values |= statistics
        return values
