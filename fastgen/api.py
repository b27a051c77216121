"""`fastgen.load(path).generate(...)`: any model folder, teacher or student, as something that makes images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import cond as conditions
from fastgen import images
from fastgen.cond import Cond
from fastgen.config import config_hash, validate
from fastgen.errors import UserError, first_line
from fastgen.files import peek_json
from fastgen.samplers.draw import draw
from fastgen.sources import locate
from fastgen.student import Student
from fastgen.teacher import FACTS, Teacher, family, read_denoiser, weights_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("fastgen")
DEFAULT_TEACHER_STEPS = 25


def pick_device(name: str = "auto") -> str:
    """ "auto" is CUDA where there is a device, else the CPU; an absent device is a UserError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # a device without storage fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name}: not available here ({first_line(error)})") from error
    return name


def open_teacher(
    source: Path | dict[str, Any],
    *,
    device: str = "cpu",
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    part: str | None = None,
) -> Teacher:
    """A teacher from a checkpoint folder, or a closed-form one from its description {family: mixture, ...}.

    part: which flow of a TRELLIS folder; see `read_denoiser`.
    """
    if isinstance(source, dict):
        if part is not None:
            raise UserError(f"part={part}: only TRELLIS folders have parts, and a closed-form teacher is none")
        module = family(str(source.get("family")))
        if not hasattr(module, "MixtureConfig"):
            raise UserError("teacher: only the closed-form family 'mixture' can be described; give a checkpoint's path")
        denoiser = module.build(validate(module.MixtureConfig, source, "teacher"))
        return Teacher(denoiser.to(device), guidance=guidance, sha256=config_hash(source))
    denoiser, data = read_denoiser(source, part)
    if denoiser.codec is not None:
        denoiser.codec.to(device)
    return Teacher(
        denoiser.to(device),
        guidance=guidance,
        guidance_interval=guidance_interval,
        sha256=partial(weights_sha256, source, part),  # gigabytes, and not everyone asks
        facts={"teacher": source.name, **data.get("facts", {})},
    )


class Generator:
    """A model and a device. `model` is the Teacher or the Student; `steps` are the counts it may be run with."""

    def __init__(self, model: Teacher | Student) -> None:
        self.model = model

    @property
    def steps(self) -> tuple[int, ...] | None:
        """A student's step counts; None for a teacher, which takes any."""
        return tuple(sorted(self.model.sampler.times)) if isinstance(self.model, Student) else None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one sample as `sample` returns it."""
        codec = self.model.denoiser.codec
        return self.model.denoiser.shape if codec is None else codec.image_shape

    def sample(
        self,
        *,
        num: int = 1,
        first: int = 0,
        prompts: Sequence[str] | None = None,
        label: int | None = None,
        labels: Tensor | None = None,
        steps: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        solver: str | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """num samples from number `first` on, float32 [num, ...] (images in [-1, 1]); each depends on seed and number.

        Models that read text need `prompts`: one for all, or num of them. Others take one label for all, or `labels`
        int64 [num]; neither means no label. steps defaults to the student's smallest count, or 25 for a teacher;
        guidance and solver are for teachers, guidance also for students whose network takes it. batch: samples made at
        once, default 64, of latent models 4.
        """
        if isinstance(self.model, Student):
            weight = None if self.model.sampler.guidance is not None else guidance
            refused = [name for name, value in (("guidance", weight), ("solver", solver)) if value is not None]
            if refused:
                raise UserError(f"{refused[0]}: this student has it built in; it takes num, label, steps and seed")
        denoiser = self.model.denoiser
        batch = batch if batch is not None else 64 if denoiser.codec is None else 4
        if num < 1 or batch < 1 or not 0 <= seed < 2**32:
            raise UserError(f"num={num}, batch={batch}, seed={seed}: at least 1, at least 1, and 0 .. 2^32 - 1")
        if label is not None and labels is not None:
            raise UserError("label and labels: give one of them")
        asked = torch.full((num,), label) if label is not None else labels
        if denoiser.codec is not None:
            cond = self._texts(prompts, asked, num)
            guidance = self._text_guidance(guidance)
        else:
            if denoiser.needs_embeddings:
                told = f"{denoiser.family} networks are read without text encoders and VAE so far"
                raise UserError(f"{told}; draw latents from embeddings in Python (docs/teachers.md)")
            if prompts is not None:
                raise UserError("a prompt: this model does not read text; it takes num, label, steps and seed")
            if guidance is not None and isinstance(self.model, Teacher) and (not denoiser.has_null or asked is None):
                raise UserError(
                    f"guidance={guidance}: it needs a label, and a model that was trained without labels too"
                )
            cond = self._labels(asked, num)
        default = self.steps[0] if self.steps else DEFAULT_TEACHER_STEPS
        samples = draw(
            self.model,
            torch.arange(first, first + num),
            seed=seed,
            steps=default if steps is None else steps,
            cond=cond,
            guidance=guidance,
            solver=solver,
            batch=batch,
        )
        return samples if denoiser.codec is None else self._decoded(samples, batch)

    @torch.inference_mode()
    def _decoded(self, latents: Tensor, batch: int) -> Tensor:
        codec = self.model.denoiser.codec
        assert codec is not None
        return torch.cat([codec.decode(part).cpu() for part in latents.split(batch)])

    def _texts(self, prompts: Sequence[str] | None, labels: Tensor | None, num: int) -> Cond:
        """The conditions of num prompts; equal ones are encoded once."""
        codec = self.model.denoiser.codec
        assert codec is not None
        if labels is not None:
            raise UserError("label: this model reads text; give it a prompt")
        if isinstance(prompts, str) or not prompts or len(prompts) not in (1, num):
            raise UserError("prompts: this model reads text; give it one prompt, or as many as images")
        unique = list(dict.fromkeys(prompts))
        rows = conditions.to(codec.encode_prompts(unique), "cpu")
        chosen = torch.tensor([unique.index(prompt) for prompt in prompts])
        return conditions.select(rows, chosen.expand(num))

    def _text_guidance(self, asked: float | None) -> float | None:
        """What a text teacher is guided by: as asked, by its own default, else as its stock pipeline is by default."""
        usual = self.model.denoiser.usual_guidance
        if asked is not None or isinstance(self.model, Student) or self.model.guidance is not None or usual is None:
            return asked
        logger.info("guidance %g, the stock pipeline's default; --guidance 1 is without", usual)
        return usual

    def tile(self, tiling: bool) -> None:
        """Decode in tiles; a model without latents has nothing to decode, and is refused."""
        codec = self.model.denoiser.codec
        if codec is not None:
            codec.tiling = tiling
        elif tiling:
            raise UserError("tiling: this model makes pixels, there is nothing to decode in tiles")

    def resize(self, height: int, width: int) -> Generator:
        """Make images of another size in pixels from now on, where the model's size is free."""
        self.model.denoiser.resized(height, width)
        return self

    def _labels(self, labels: Tensor | None, num: int) -> Cond:
        classes = self.model.denoiser.num_classes
        if classes is None:
            if labels is not None:
                raise UserError("label: this model is unconditional; leave it out")
            return None
        if labels is None:
            null = self.model.denoiser.null
            return {"label": torch.arange(num) % classes if null is None else null["label"].cpu().expand(num)}
        if labels.shape != (num,) or labels.dtype != torch.int64:
            raise UserError(f"labels: int64 [{num}], one for each sample, are needed")
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"label: this model has the classes 0 .. {classes - 1}")
        return {"label": labels}

    def generate(self, prompt: str | None = None, **options: Any) -> list[Image]:
        """Like `sample`, as PIL images."""
        self.refuse_no_pictures()
        if prompt is not None:
            options["prompts"] = [prompt]
        return images.to_pil(self.sample(**options))

    def refuse_no_pictures(self) -> None:
        """Samples that are no grey or RGB images are a UserError."""
        shape = self.image_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(f"this model makes samples of shape {shape}, which are no images; use sample() in Python")


def load(path: str | Path, *, config: str | Path | None = None, device: str = "auto") -> Generator:
    """A model, student or teacher, ready to generate: a folder, a single file or a hub id (see `sources.locate`).

    What is wrong with it is told as a UserError.
    """
    folder = locate(path, config=config)
    student = peek_json(folder / FACTS).get("kind") == "student"
    return load_student(folder, device=device) if student else load_teacher(folder, device=device)


def _refuse_shapes(folder: Path) -> None:
    """What makes shapes needs two flows and a decoder, and no pipeline of images."""
    from fastgen.teachers.trellis import recognises

    told = peek_json(folder / FACTS).get("denoiser")
    if recognises(folder):
        raise UserError(f"{folder}: TRELLIS makes shapes: `fastgen generate`, or fastgen.shapes.Shapes in Python")
    if isinstance(told, dict) and told.get("family") == "trellis":
        raise UserError(
            f"{folder}: one flow of TRELLIS, which makes nothing by itself: a stage `assemble` puts it into a folder "
            "that `fastgen generate` takes (docs/trellis.md)"
        )


def load_student(path: str | Path, *, device: str = "auto") -> Generator:
    """A student folder; a teacher is refused."""
    _refuse_shapes(Path(path))
    student, device = Student.load(path), pick_device(device)
    student.denoiser.to(device).eval()
    if student.denoiser.codec is not None:
        student.denoiser.codec.to(device)
    return Generator(student)


def load_teacher(path: str | Path, *, device: str = "auto", guidance: float | None = None) -> Generator:
    """Any checkpoint as a teacher, a student's network included."""
    folder = locate(path)
    _refuse_shapes(folder)
    return Generator(open_teacher(folder, device=pick_device(device), guidance=guidance))
