"""The stage that trains: a teacher from data, a copy of a closed-form one, or a student by any method."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from torch import Tensor

import fastgen
from fastgen.codec import Codec
from fastgen.config import Model, config_hash, explain, plain
from fastgen.data import DataSet
from fastgen.data.encoded import CaptionDropout, Encoded, Texts
from fastgen.data.shards import PairShards
from fastgen.data.source import Source
from fastgen.denoiser import Denoiser
from fastgen.errors import RunFailed, UserError
from fastgen.nets.fresh import FreshNet
from fastgen.nets.lora import (
    StudentConfig,
    add_lora,
    enable_gradient_checkpointing,
    load_lora,
    lora_settings,
    lora_tensors,
    merged,
    share,
)
from fastgen.samplers.replay import refuse_unreplayable
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.stages.inputs import as_seen, latent_rows, training_data
from fastgen.stages.preview import Preview
from fastgen.student import Adapters, Student, save_teacher
from fastgen.teacher import Teacher, facts_of, family
from fastgen.trainers.engine.loop import Loop, LoopConfig, Rows
from fastgen.trainers.engine.loop import check as check_loop
from fastgen.trainers.engine.method import Method, find_method

logger = logging.getLogger("fastgen")
PREVIEW_ROWS = 64
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = (
    "a red fox sitting in fresh snow, morning light",
    "a bowl of ramen on a wooden table, seen from above",
    "an astronaut riding a horse, oil painting",
    "a street sign that reads FAST",
)
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
    part: Literal["structure", "latent"] | None = None  # which flow of a TRELLIS folder
    latents: str | None = None  # of shapes: a stage, or a folder; None: the run's data
    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher_precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of frozen weights: the teacher's, and under adapters
    caption_dropout: float = Field(default=0.0, ge=0, le=1)  # share of rows that are given the empty prompt
    preview_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=PROMPTS, min_length=1)
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
        ours = ("seed", "guidance", "guidance_interval", "size")
        return (*ours, "data", "hold_out") if self.pairs is None and self.latents is None else ours

    def check(self, run: Context) -> None:
        if (self.net is None) == (self.init is None):
            raise UserError(f"stage {self.name}: set one of net (a fresh network) and init (a stage, teacher or path)")
        if self.init is not None and self.init not in run.names:
            run.path(self.init)  # refuses a closed-form teacher, which has no weights
        self._refuse_misplaced_part()
        init, teacher = run.look(self.init, self.part), run.look(self.teacher, self.part)
        if init is not None and init.kind == "student" and not self.init_distilled:
            raise UserError(
                f"stage {self.name}: init={self.init} is a distilled student, not a teacher; "
                f"set stages.{self.name}.init_distilled=true if that is meant"
            )
        self._distance("cpu", None)
        self._refuse_precision()
        check_loop(self.loop, find_method(self.method.name))
        data = None if self.pairs in run.names or self.part is not None else self._data(run)
        if self.net is not None and self.teacher is None and self.pairs is None and data is None:
            raise UserError(
                f"stage {self.name}: a fresh net needs data or a teacher to know its shape from; set data.path"
            )
        same_shape(self.name, init=init, teacher=teacher)
        if init is not None and data is not None and data.shape:
            given = {"pairs": data} if self.pairs else {"data": data}
            same_shape(self.name, init=init if self.pairs else init._replace(shape=init.data_shape), **given)

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        if self.init is not None:
            from fastgen.plan import refuse_if_too_large  # which builds stages itself

            refuse_if_too_large(self, run)
        teacher = run.open_teacher(self.teacher, self.part) if self.teacher else None
        data = None if self.part is not None else self._data(run)
        student = self.make_student(run, teacher, data)
        if self.part is not None:
            flows = (student,) if teacher is None else (student, teacher.denoiser)
            data = latent_rows(run, self.latents, self.part, *flows)
        method = self.build(run, student, teacher)
        source = self._source(run, method, data if method.needs else None)
        loop = Loop(
            method,
            source,
            self.loop,
            folder,
            seed=run.config.seed,
            device=run.device,
            preview=self._preview(run, source, folder, student),
            interrupt=run.interrupt,
        )
        if loop.resume():
            logger.info("%s: resumed at step %d of %d", self.name, loop.step, self.loop.steps)
        else:
            loop.log.rewind(0)  # what an attempt wrote that was killed before its first checkpoint
        loop.run()
        self._refuse_diverged(loop)
        facts = self._facts(run, teacher, data if method.needs else None) | self._finished(loop, source)
        if method.makes == "teacher":
            save_teacher(loop.student, folder / "model", facts)
        else:
            denoiser, adapters = self._plain(run, loop.student)
            Student(denoiser, method.sampler(), facts, adapters).save(folder / "model")
        return {"output": "model", "facts": facts}

    def _data(self, run: Context) -> DataSet | None:
        return training_data(run) if self.pairs is None else PairShards(run.path(self.pairs))

    def build(self, run: Context, student: Denoiser, teacher: Teacher | None) -> Method:
        """The method with its networks: trained whole, or as adapters on frozen weights that they share."""
        kind, lora, seed = find_method(self.method.name), self.student.lora, run.config.seed
        more = {}
        if lora is not None and teacher is not None:
            more = {name: add_lora(share(teacher.denoiser), lora, seed + i) for i, name in enumerate(kind.copies, 1)}
        if self.student.gradient_checkpointing:
            for denoiser in (student, *more.values(), *([teacher.denoiser] if teacher is not None else [])):
                enable_gradient_checkpointing(denoiser)
        method = kind(self.method, student, teacher, distance=self._distance(run.device, student.codec), **more)
        if method.makes == "student" and student.codec is not None:
            refuse_unreplayable(student, method.sampler())
        if teacher is not None and self.teacher_precision != "fp32":
            # Only now: what is trained whole was copied in float32.
            teacher.denoiser.store_in(HALF[self.teacher_precision])
        return method

    def make_student(self, run: Context, teacher: Teacher | None, data: DataSet | None) -> Denoiser:
        """A trainable copy of what `init` names, or a fresh network in the shape of the teacher, else of the data."""
        if self.init is not None:
            shared = self.student.lora is not None and teacher is not None and self.init == self.teacher
            student = share(teacher.denoiser) if shared and teacher else run.open_denoiser(self.init, self.part)
            if self.student.lora is not None:
                return add_lora(student, self.student.lora, run.config.seed)
            return copy.deepcopy(student).requires_grad_(True)
        like = teacher or data
        assert self.net is not None and like is not None  # see check
        torch.manual_seed(run.config.seed)
        return family(self.net.family).build(self.net, like.shape, like.num_classes)

    def _source(self, run: Context, method: Method, data: DataSet | None) -> Rows | None:
        """Rows of the data as the student sees them."""
        student = method.student
        if data is not None:
            data = as_seen(run, data, student, images="x0" in method.needs)
        kind = "pairs" if self.pairs else "latents" if self.part else "data"
        same_shape(self.name, student=student, teacher=method.teacher, **{kind: data})
        self._refuse_other_classes(student, data)
        if self.caption_dropout and not isinstance(data, Encoded):
            raise UserError(
                f"stage {self.name}: caption_dropout drops captions of the data, and here are none "
                "(pairs are made without by pairs.null_share)"
            )
        if data is None:
            return None
        source = Source(data, run.config.seed)
        if not isinstance(data, Encoded) or not self.caption_dropout:
            return source
        logger.info("%s: %g %% of the rows are given the empty prompt", self.name, 100 * self.caption_dropout)
        return CaptionDropout(source, data.texts, self.caption_dropout)

    def _preview(self, run: Context, source: Rows | None, folder: Path, student: Denoiser) -> Preview:
        if student.codec is None:
            return Preview(source, folder, min(PREVIEW_ROWS, self.loop.batch))
        texts = Texts(student.codec, self.preview_prompts, run.cache).make()
        student.codec.release()
        rows = texts.rows(torch.arange(len(texts)))
        return Preview(source, folder, min(PREVIEW_ROWS, self.loop.batch), shown=rows)

    def _plain(self, run: Context, student: Denoiser) -> tuple[Denoiser, Adapters | None]:
        """The trained network as plain weights, with its adapters beside it where it has some."""
        if self.student.lora is None:
            return student, None
        assert self.init is not None  # adapters need something to adapt
        adapters = Adapters(lora_tensors(student), lora_settings(student))
        # Merged into the weights as they were read: those that were trained under may have been rounded.
        return merged(load_lora(run.open_denoiser(self.init), adapters.tensors, adapters.settings)), adapters

    def _refuse_misplaced_part(self) -> None:
        if self.part is None and self.latents is not None:
            raise UserError(f"stage {self.name}: latents={self.latents} are for a flow of TRELLIS; set part")
        if self.part is None:
            return
        for key in ("net", "pairs"):
            if getattr(self, key) is not None:
                told = "trains a flow of a folder on latents of shapes"
                raise UserError(f"stage {self.name}: part={self.part} {told}; leave {key} out")

    def _refuse_precision(self) -> None:
        name, asked = self.method.name, self.teacher_precision
        allowed = find_method(name).precisions
        if asked not in allowed:
            raise UserError(
                f"stage {self.name}: teacher_precision={asked}: method {name} differentiates its networks' inputs, "
                f"whose gradients {asked} cannot hold; use {', '.join(allowed)}"
            )
        if asked != "fp32" and self.teacher is None:
            raise UserError(f"stage {self.name}: teacher_precision={asked}: this stage has no teacher; leave it off")
        if self.student.lora is not None and self.init is None:
            raise UserError(f"stage {self.name}: student.lora adapts trained weights; set init instead of net")

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
                f"step {loop.step}: {what}: loss or gradient was not finite, and no model was written{loop.kept()}; "
                f"see that the data are finite, lower loop.optim.lr or set loop.clip, then --from {self.name}"
            )

    def _finished(self, loop: Loop, source: Rows | None) -> dict[str, Any]:
        """What the method has to say of the network that it made; see `Method.finish`."""
        rows = torch.arange(loop.drawn, loop.drawn + min(PREVIEW_ROWS, self.loop.batch))
        return loop.method.finish(loop.student.eval(), loop.batch_of(rows, {} if source is None else source.get(rows)))

    def _distance(self, device: str, codec: Codec | None) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The perceptual distance of two samples, of what latents decode to."""
        if self.lpips is None:
            return None
        from fastgen.eval.lpips import LPIPS

        distance = LPIPS(self.lpips.net, self.lpips.trunk, self.lpips.heads).to(device)
        return distance if codec is None else lambda a, b: distance(codec.decode(a), codec.decode(b))

    def _facts(self, run: Context, teacher: Teacher | None, data: DataSet | None) -> dict[str, Any]:
        """What the folder tells of its making; licence and origin come from the teacher or from `init`."""
        origin = {} if teacher is None else dict(teacher.facts)
        if self.init is not None:
            own = {} if self.init in run.names else {"teacher": run.path(self.init).name}
            origin = {**own, **facts_of(run.path(self.init)), **origin}
        kept = ("license", "license_link", "base_model", "teacher", "teacher_sha256", "guidance")
        facts: dict[str, Any] = {key: origin[key] for key in kept if key in origin}
        if self.init is not None:
            facts |= {"init": self.init, "init_sha256": run.sha256(self.init)}
        if teacher is not None:
            weight = getattr(self.method, "guidance", None)
            facts["guidance"] = run.config.guidance if weight is None else weight
            facts["teacher_sha256"] = teacher.sha256
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
