"""What a run shows of its student now and then: a picture, collapse monitors, and the method's own figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgen import files, images
from fastgen.codec import Codec
from fastgen.denoiser import Denoiser
from fastgen.samplers import few_step
from fastgen.sparse import Voxels
from fastgen.trainers.engine.loop import Loop, Rows
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.monitors import left_band, sample_statistics

logger = logging.getLogger("fastgen")


class Preview:
    """Fixed noise through the student now and then: a picture, collapse monitors, and the method's own figures.

    shown: fixed conditions for the picture; None: those of the first rows.
    """

    def __init__(self, source: Rows | None, folder: Path, rows: int, shown: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self.rows = folder, torch.arange(rows)
        self.data = None if source is None else source.get(self.rows)
        self.shown = shown

    @torch.no_grad()
    def __call__(self, loop: Loop) -> dict[str, float]:
        student, spec = loop.student.eval(), loop.method.sampler()
        batch = loop.batch_of(self.rows, self.data or {})
        shown = batch
        if self.shown is not None:
            shown = loop.batch_of(torch.arange(len(next(iter(self.shown.values())))), self.shown)
        z = shown["eps"] if "eps" in shown.data else self._noise(shown, student)
        conditional = student.num_classes is not None or student.reads is not None
        steps = loop.method.preview_steps
        renoise = lambda i: shown.normal_like("preview/renoise", z, i)  # noqa: E731
        samples = few_step.sample(student, spec, z, steps, shown.cond if conditional else None, renoise=renoise)
        self._picture(samples, student.codec, loop.step)
        values = loop.method.diagnose(student, batch)
        if "x0" in batch.data and isinstance(samples, Tensor):  # voxels differ from shape to shape
            statistics = sample_statistics(samples, batch.x0)
            for line in left_band(statistics):
                logger.warning("%s: step %d: %s", self.folder.name, loop.step, line)
            values |= statistics
        return values

    def _noise(self, shown: Batch, student: Denoiser) -> Tensor:
        """Unit noise; of a student on voxels, on those of the rows that are shown."""
        if "x0" in shown.data and isinstance(shown["x0"], Voxels):
            return shown.normal_like("preview", shown["x0"])
        return shown.normal("preview", student.shape)

    def _picture(self, samples: Tensor, codec: Codec | None, step: int) -> None:
        if codec is not None:
            samples = codec.decode(samples)
            codec.release()
        if samples.ndim == 4 and samples.shape[1] in (1, 3):
            files.make_folder(self.folder / "previews")
            grid = images.grid_png(samples.float().cpu().nan_to_num())
            files.write_atomic(self.folder / "previews" / f"step-{step:08d}.png", grid)
