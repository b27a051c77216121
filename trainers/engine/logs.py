"""What a run tells: a line of JSON per measured step always, trackers when asked, a progress bar on a terminal."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgen import files
from fastgen.errors import require

logger = logging.getLogger("fastgen")
QUIET_SECONDS = 10.0  # between progress lines where stderr is not a terminal


class Log:
    """`log.jsonl` in the run's folder, the progress bar, and accelerate's trackers by name."""

    def __init__(self, out: Path, steps: int, trackers: Sequence[str] = (), *, shown: bool = True) -> None:
        self.path, self.steps, self.shown = out / "log.jsonl", steps, shown
        self._trackers, self._accelerator = list(trackers), cast(Any, None)
        self._bar: Progress | None = None
        self._told = self._began = 0.0
        self._first = 0

    def __enter__(self) -> Log:
        files.make_folder(self.path.parent)
        self._told = self._began = time.monotonic()
        self._first = -1
        if self._trackers and self.shown:
            accelerate = require("accelerate", extra="log", purpose=f"tracking with {', '.join(self._trackers)}")
            for name in self._trackers:
                require(name, extra="log", purpose=f"loop.trackers={name}")
            self._accelerator = accelerate.Accelerator(
                log_with=self._trackers, project_dir=str(self.path.parent), cpu=True
            )
            self._accelerator.init_trackers("fastgen")
        console = Console(stderr=True)
        if self.shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]} {task.fields[loss]}"), console=console)
            self._task = self._bar.add_task(self.path.parent.name, total=self.steps, rate="", loss="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._accelerator:
            self._accelerator.end_training()

    def step(self, step: int, values: Mapping[str, Any], *, write: bool) -> None:
        """One step is done: move the bar, and write its values if they were measured."""
        if self._first < 0:
            self._first = step - 1
        if write:
            self.write(step, values)
        now = time.monotonic()
        if not self.shown or (self._bar and not write) or (not self._bar and now - self._told < QUIET_SECONDS):
            return
        self._told = now
        rate = (step - self._first) / max(now - self._began, 1e-9)
        loss = next((f"loss {float(v):.4g}" for key, v in values.items() if key.startswith("loss/")), "")
        if self._bar:
            self._bar.update(self._task, completed=step, rate=f"{rate:.1f} it/s", loss=loss)
        else:
            left = (self.steps - step) / rate
            logger.info(
                "%s: step %d of %d, %.1f it/s, %.0f s left, %s",
                self.path.parent.name,
                step,
                self.steps,
                rate,
                left,
                loss,
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; values that are not finite are written as null, since JSON has no word for them."""
        numbers = {key: float(value) for key, value in values.items()}
        if not self.shown:
            return
        line = {"step": step, **{key: v if math.isfinite(v) else None for key, v in numbers.items()}}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._accelerator:
            self._accelerator.log(numbers, step=step)

    def rewind(self, step: int) -> None:
        """Drop the lines that a killed run wrote after the checkpoint it is resumed from."""
        if self.shown and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            files.write_atomic(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a log line; one cut off by a kill counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
