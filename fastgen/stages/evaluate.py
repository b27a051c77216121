"""The stage that measures a student against its teacher and real data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fastgen import files, images
from fastgen.cond import Cond
from fastgen.data import DataSet
from fastgen.data.part import LEAST_REAL, real_images
from fastgen.errors import UserError
from fastgen.eval.latency import measure
from fastgen.eval.protocol import MANY, classifier_for, image_protocol, point_protocol
from fastgen.samplers.draw import draw
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.stages.train import same_shape
from fastgen.student import Student
from fastgen.teacher import Teacher

ROW = 20  # images of a row in the picture of all three
GRID = 50  # images of a grid, ten to a row: with ten classes each column is one


class Evaluate(Stage):
    """`student` and `teacher` on the run's data (images), or against the closed-form truth (points)."""

    stage: Literal["evaluate"]
    student: str
    teacher: str = "teacher"
    n: int = Field(default=5000, ge=16)
    rows: int | None = Field(default=None, ge=LEAST_REAL)  # of each part of the data; None: all
    classifier_steps: int = Field(default=1000, ge=1)  # of the gate's classifier, where the data bring none
    latency_batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 64)
    latency_repeats: int = Field(default=10, ge=1)

    incidental: ClassVar = frozenset({"data.on_bad"})

    def settings(self) -> tuple[str, ...]:
        return ("seed", "guidance", "data", "hold_out")

    def smoke(self) -> Evaluate:
        few = {"n": 16, "rows": 1500, "classifier_steps": 5, "latency_batches": (1,), "latency_repeats": 1}
        return self.model_copy(update=few)

    def check(self, run: Context) -> None:
        student, teacher = run.look(self.student), run.look(self.teacher)
        if student is not None and student.kind != "student":
            raise UserError(f"stage {self.name}: student={self.student} is a teacher; name a student or a stage")
        if teacher is None or len(teacher.shape) == 3:
            same_shape(self.name, student=student, teacher=teacher, data=self._parts(run)[0])

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        student = Student.load(run.path(self.student))
        student.denoiser.to(run.device).eval()
        teacher = run.open_teacher(self.teacher)
        same_shape(self.name, student=student.denoiser, teacher=teacher)
        seed = run.config.seed
        if len(teacher.shape) == 1:
            if teacher.denoiser.family != "mixture":
                raise UserError(f"stage {self.name}: points are judged against a closed-form teacher (family mixture)")
            report = point_protocol(student, teacher, n=self.n, seed=seed)
        else:
            report = self._images(run, student, teacher)
            write_grids(folder, student, teacher, seed, min(GRID, self.n))
        report["latency_ms"] = self._latencies(student, teacher)
        files.write_json(folder / "evaluate.json", report)
        return {"output": "evaluate.json"}

    def _images(self, run: Context, student: Student, teacher: Teacher) -> dict[str, Any]:
        train, held_out = self._parts(run)
        same_shape(self.name, student=student.denoiser, data=train)
        if student.denoiser.num_classes != teacher.num_classes:
            told = f"student {student.denoiser.num_classes}, teacher {teacher.num_classes}"
            raise UserError(f"stage {self.name}: the numbers of classes differ: {told}")
        extractor, seed = classifier_for(train, self.classifier_steps), run.config.seed
        report = image_protocol(student, teacher, train, held_out, n=self.n, seed=seed, extractor=extractor)
        return {**report, "data": train.name}

    def _parts(self, run: Context) -> tuple[DataSet, DataSet]:
        """The training and the held-out part of the run's data, which need labels for the gate's classifier."""
        if run.config.data is None:
            raise UserError(f"stage {self.name}: images are compared with data; set data.path (or data.kind=digits)")
        train, held_out = real_images(run.config.data, run.config.hold_out, self.rows)
        if train.num_classes is None:
            raise UserError(f"stage {self.name}: the gate reads labels, and the data '{train.name}' have none")
        return train, held_out

    def _latencies(self, student: Student, teacher: Teacher) -> dict[str, dict[str, dict[str, float]]]:
        """Median milliseconds of whole calls, {model: {steps: {batch: ms}}}: teacher at many, student at each count."""
        table: dict[str, dict[str, dict[str, float]]] = {"teacher": {}, "student": {}}
        calls: list[tuple[str, Teacher | Student, int]] = [("teacher", teacher, MANY)]
        calls += [("student", student, n) for n in sorted(student.sampler.times)]
        synchronize = torch.cuda.synchronize if student.denoiser.device.type == "cuda" else lambda: None
        repeats = self.latency_repeats
        for name, model, steps in calls:
            row = {}
            for batch in self.latency_batches:
                rows = torch.arange(batch)
                call = partial(draw, model, rows, seed=0, steps=steps, cond=labels(teacher, rows))
                timed = measure(call, batch=batch, warmup=min(3, repeats), repeats=repeats, synchronize=synchronize)
                row[str(batch)] = timed.p50_ms
            table[name][str(steps)] = row
        return table


def labels(model: Teacher | Student, rows: torch.Tensor) -> Cond:
    """The classes in turn, for a class-conditional model."""
    classes = model.denoiser.num_classes
    return None if classes is None else {"label": rows % classes}


def write_grids(folder: Path, student: Student, teacher: Teacher, seed: int, count: int) -> None:
    """Teacher at many steps and at one, and the student at its fewest, from the same noise and labels: a grid each, and
    `side_by_side.png` with a row each."""
    rows = torch.arange(count)
    few = min(student.sampler.times)
    cond = labels(teacher, rows)
    grids = {
        f"teacher@{MANY}": draw(teacher, rows, seed=seed, steps=MANY, cond=cond),
        "teacher@1": draw(teacher, rows, seed=seed, steps=1, solver="euler", cond=cond),
        f"student@{few}": draw(student, rows, seed=seed, steps=few, cond=cond),
    }
    for name, samples in grids.items():
        files.write_atomic(folder / f"{name}.png", images.grid_png(samples, columns=10))
    together = torch.cat([samples[:ROW] for samples in grids.values()])
    files.write_atomic(folder / "side_by_side.png", images.grid_png(together, columns=min(ROW, count)))
