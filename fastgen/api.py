"""`fastgen.load(path).generate(...)`: any model folder, teacher or student, as something that makes images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import files, images
from fastgen.cond import Cond
from fastgen.config import config_hash, validate
from fastgen.errors import UserError
from fastgen.samplers.draw import draw
from fastgen.student import Student
from fastgen.teacher import Teacher, family, read_denoiser

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_TEACHER_STEPS = 25


def pick_device(name: str = "auto") -> str:
    """ "auto" is CUDA where there is a device, else the CPU; an absent device is a UserError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # a device without storage fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name}: not available here ({str(error).splitlines()[0]})") from error
    return name


def open_teacher(source: Path | dict[str, Any], *, device: str = "cpu", guidance: float | None = None) -> Teacher:
    """A teacher from a checkpoint folder, or a closed-form one from its description {family: mixture, ...}."""
    if isinstance(source, dict):
        module = family(str(source.get("family")))
        if not hasattr(module, "MixtureConfig"):
            raise UserError("teacher: only the closed-form family 'mixture' can be described; give a checkpoint's path")
        denoiser = module.build(validate(module.MixtureConfig, source, "teacher"))
        return Teacher(denoiser.to(device), guidance=guidance, sha256=config_hash(source))
    denoiser, data = read_denoiser(source)
    facts = {"teacher": source.name, **data.get("facts", {})}
    return Teacher(denoiser.to(device), guidance=guidance, sha256=files.sha256(source), facts=facts)


class Generator:
    """A model and a device. `model` is the Teacher or the Student; `steps` are the counts it may be run with."""

    def __init__(self, model: Teacher | Student) -> None:
        self.model = model

    @property
    def steps(self) -> tuple[int, ...] | None:
        """A student's step counts; None for a teacher, which takes any."""
        return tuple(sorted(self.model.sampler.times)) if isinstance(self.model, Student) else None

    def sample(
        self,
        *,
        num: int = 1,
        label: int | None = None,
        labels: Tensor | None = None,
        steps: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        solver: str | None = None,
        batch: int = 64,
    ) -> Tensor:
        """num samples, float32 [num, ...] (images in [-1, 1]); sample i depends on (seed, i) only.

        One label for all, or `labels` int64 [num]; neither means no label. steps defaults to the student's smallest
        count, or 25 for a teacher; guidance and solver are for teachers.
        """
        if isinstance(self.model, Student):
            refused = [name for name, value in (("guidance", guidance), ("solver", solver)) if value is not None]
            if refused:
                raise UserError(f"{refused[0]}: this student has it built in; it takes num, label, steps and seed")
        if num < 1 or batch < 1 or not 0 <= seed < 2**32:
            raise UserError(f"num={num}, batch={batch}, seed={seed}: at least 1, at least 1, and 0 .. 2^32 - 1")
        if label is not None and labels is not None:
            raise UserError("label and labels: give one of them")
        asked = torch.full((num,), label) if label is not None else labels
        if guidance is not None and (self.model.denoiser.null is None or asked is None):
            raise UserError(f"guidance={guidance}: it needs a label, and a model that was trained without labels too")
        default = self.steps[0] if self.steps else DEFAULT_TEACHER_STEPS
        return draw(
            self.model,
            torch.arange(num),
            seed=seed,
            steps=default if steps is None else steps,
            cond=self._labels(asked, num),
            guidance=guidance,
            solver=solver,
            batch=batch,
        )

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
        self.refuse_no_pictures(prompt)
        return images.to_pil(self.sample(**options))

    def refuse_no_pictures(self, prompt: str | None = None) -> None:
        """A prompt for a model that reads none, and samples that are no grey or RGB images, are UserErrors."""
        shape = self.model.denoiser.shape
        if prompt is not None:
            raise UserError("a prompt: this model does not read text; it takes num, label, steps and seed")
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(f"this model makes samples of shape {shape}, which are no images; use sample() in Python")


def load(path: str | Path, *, device: str = "auto") -> Generator:
    """A model folder, student or teacher, ready to generate; what is wrong with it is told as a UserError."""
    _, data = read_denoiser(path)
    return load_student(path, device=device) if data.get("kind") == "student" else load_teacher(path, device=device)


def load_student(path: str | Path, *, device: str = "auto") -> Generator:
    """A student folder; a teacher is refused."""
    student = Student.load(path)
    student.denoiser.to(pick_device(device)).eval()
    return Generator(student)


def load_teacher(path: str | Path, *, device: str = "auto", guidance: float | None = None) -> Generator:
    """Any checkpoint as a teacher, a student's network included."""
    return Generator(open_teacher(Path(path), device=pick_device(device), guidance=guidance))
