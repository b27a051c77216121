"""The stage that runs a teacher's ODE over many noises and keeps the end points."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fastgen.api import open_teacher
from fastgen.data.shards import PairShards
from fastgen.stages.machine import Context, Stage
from fastgen.trainers.pairs import PairsConfig, make_pairs

logger = logging.getLogger("fastgen")


class Pairs(Stage):
    """Pairs of `teacher`: the run's, or a stage's output (the round before)."""

    stage: Literal["pairs"]
    teacher: str = "teacher"
    pairs: PairsConfig = Field(default_factory=PairsConfig)

    incidental: ClassVar = frozenset({"pairs.batch"})

    def settings(self) -> tuple[str, ...]:
        return ("seed", "guidance")

    def check(self, run: Context) -> None:
        run.look(self.teacher)

    def smoke(self) -> Pairs:
        few = {"num": 64, "per_shard": 32, "steps": 2, "batch": 32}
        return self.model_copy(update={"pairs": self.pairs.model_copy(update=few)})

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        self.make(run, folder)
        made = PairShards(folder / "shards")
        return {"output": "shards", "sha256": made.sha256, "pairs": len(made)}

    def make(self, run: Context, folder: Path, *, worker: int = 0, workers: int = 1) -> None:
        """Make this worker's missing shards."""
        teacher = open_teacher(run.artefact(self.teacher), device=run.device, guidance=run.config.guidance)

        def advance(done: int, total: int) -> None:
            logger.info("%s: shard %d of %d", self.name, done, total)

        make_pairs(
            teacher,
            self.pairs,
            folder / "shards",
            seed=run.config.seed,
            tag=self.name,
            worker=worker,
            workers=workers,
            advance=advance,
            interrupt=run.interrupt,
        )
