"""The stage that measures a student against its teacher and real data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from fastgen import files, images
from fastgen.api import open_teacher
from fastgen.cond import Cond
from fastgen.errors import UserError
from fastgen.eval.latency import measure
from fastgen.eval.protocol import MANY, classifier_for, image_protocol, point_protocol
from fastgen.samplers.draw import draw
from fastgen.stages.machine import Context, Stage
from fastgen.stages.train import data_part
from fastgen.student import Student
from fastgen.teacher import Teacher

LATENCY_BATCHES = (1, 64)
GRID = 50  # images of a grid, ten to a row: with ten classes each column is one


class Evaluate(Stage):
    """`student` and `teacher` on the run's data (images), or against the closed-form truth (points)."""

    stage: Literal["evaluate"]
    student: str
    teacher: str = "teacher"
    n: int = Field(default=5000, ge=16)

    def smoke(self) -> Evaluate:
        return self.model_copy(update={"n": 256})

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        student = Student.load(run.artefact(self.student))
        student.denoiser.to(run.device).eval()
        teacher = open_teacher(run.artefact(self.teacher), device=run.device, guidance=run.config.guidance)
        seed = run.config.seed
        if len(student.denoiser.shape) == 1:
            report = point_protocol(student, teacher, n=self.n, seed=seed)
        else:
            report = self._images(run, student, teacher)
            write_grids(folder, student, teacher, seed)
        report["latency_ms"] = latencies(student, teacher)
        files.write_json(folder / "evaluate.json", report)
        return {"output": "evaluate.json"}

    def _images(self, run: Context, student: Student, teacher: Teacher) -> dict[str, Any]:
        config = run.config
        if config.data is None:
            raise UserError(f"stage {self.name}: images are compared with data; set data.path (or data.kind=digits)")
        train, held_out = (data_part(config.data, part, config.hold_out) for part in ("train", "held_out"))
        extractor = classifier_for(train)
        report = image_protocol(student, teacher, train, held_out, n=self.n, seed=config.seed, extractor=extractor)
        return {**report, "data": train.name}


def labels(model: Teacher | Student, rows: torch.Tensor) -> Cond:
    """The classes in turn, for a class-conditional model."""
    classes = model.denoiser.num_classes
    return None if classes is None else {"label": rows % classes}


def write_grids(folder: Path, student: Student, teacher: Teacher, seed: int) -> None:
    """Teacher at many steps and at one, and the student at its fewest, from the same noise and labels."""
    rows = torch.arange(GRID)
    few = min(student.sampler.times)
    cond = labels(teacher, rows)
    grids = {
        f"teacher@{MANY}": draw(teacher, rows, seed=seed, steps=MANY, cond=cond),
        "teacher@1": draw(teacher, rows, seed=seed, steps=1, solver="euler", cond=cond),
        f"student@{few}": draw(student, rows, seed=seed, steps=few, cond=cond),
    }
    for name, samples in grids.items():
        files.write_atomic(folder / f"{name}.png", images.grid_png(samples, columns=10))


def latencies(student: Student, teacher: Teacher) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds of a whole call, {model: {steps: {batch: ms}}}: teacher at many, student at each count."""
    table: dict[str, dict[str, dict[str, float]]] = {"teacher": {}, "student": {}}
    calls: list[tuple[str, Teacher | Student, int]] = [("teacher", teacher, MANY)]
    calls += [("student", student, n) for n in sorted(student.sampler.times)]
    synchronize = torch.cuda.synchronize if student.denoiser.device.type == "cuda" else lambda: None
    for name, model, steps in calls:
        row = {}
        for batch in LATENCY_BATCHES:
            rows = torch.arange(batch)
            call = partial(draw, model, rows, seed=0, steps=steps, cond=labels(teacher, rows))
            row[str(batch)] = measure(call, batch=batch, repeats=10, synchronize=synchronize).p50_ms
        table[name][str(steps)] = row
    return table
