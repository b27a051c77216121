"""The stage that runs a teacher's ODE over many noises and keeps the end points."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fastgen.data.shards import PairShards
from fastgen.errors import UserError
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.stages.inputs import prompts, training_data
from fastgen.trainers.pairs import PairsConfig, make_pairs

logger = logging.getLogger("fastgen")


class Pairs(Stage):
    """Pairs of `teacher`: the run's, or a stage's output (the round before)."""

    stage: Literal["pairs"]
    teacher: str = "teacher"
    pairs: PairsConfig = Field(default_factory=PairsConfig)

    incidental: ClassVar = frozenset({"pairs.batch"})

    def settings(self) -> tuple[str, ...]:
        return ("seed", "guidance", "guidance_interval", "size", "data")

    def check(self, run: Context) -> None:
        look = run.look(self.teacher)
        if look is not None and look.reads_text and training_data(run) is None:
            raise UserError(f"stage {self.name}: this teacher reads text; set data.path to prompts or captioned images")

    def smoke(self) -> Pairs:
        # Random weights may lead anywhere: no end point is too far off.
        few = {"num": 64, "per_shard": 32, "steps": 2, "batch": 32, "limit": 1e9, "dtype": "float32"}
        return self.model_copy(update={"pairs": self.pairs.model_copy(update=few)})

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        self.make(run, folder)
        made = PairShards(folder / "shards")
        return {"output": "shards", "sha256": made.sha256, "pairs": len(made)}

    def make(self, run: Context, folder: Path, *, worker: int = 0, workers: int = 1) -> None:
        """Make this worker's missing shards."""
        teacher = run.open_teacher(self.teacher)
        texts = prompts(run, teacher.denoiser) if teacher.denoiser.codec is not None else None

        def advance(done: int, total: int) -> None:
            logger.info("%s: shard %d of %d", self.name, done, total)

        make_pairs(
            teacher,
            self.pairs,
            folder / "shards",
            seed=run.config.seed,
            tag=self.name,
            texts=texts,
            worker=worker,
            workers=workers,
            advance=advance,
            interrupt=run.interrupt,
        )
