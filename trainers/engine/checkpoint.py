"""Checkpoints of a run: folders that are whole or absent, the last K and every M-th kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import files
from fastgen.errors import UserError


class Checkpoints:
    """`<folder>/step-00001000/state.pt`: nested dicts of tensors and numbers, read back without running any code."""

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        found = self.folder.glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found if files.is_complete(path))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write one checkpoint and remove those no longer kept."""
        with files.atomic_folder(self.path(step)) as temporary:
            torch.save(state, temporary / "state.pt")
        self.prune()

    def prune(self) -> None:
        """Remove what is no longer kept, and what a killed run left half written or half removed."""
        steps = self.steps()
        kept = {
            self.path(s) for s in steps if s in steps[-self.keep :] or (self.keep_every and s % self.keep_every == 0)
        }
        for path in set(self.folder.iterdir()) - kept:
            (path / files.COMPLETE).unlink(missing_ok=True)  # first of all: half a checkpoint must not look whole
            shutil.rmtree(path)

    def load(self, step: int) -> dict[str, Any]:
        """The state of one checkpoint; a damaged file is a UserError that says what to do."""
        path = self.path(step) / "state.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen unrelated types for damaged files
            mend = f"delete {self.path(step)} to resume from the checkpoint before it"
            raise UserError(f"{path}: damaged ({type(error).__name__}); {mend}") from error


@dataclass(frozen=True)
class PartlyFrozen:
    """A module, and the names of its tensors that a checkpoint leaves out because the run's inputs hold them."""

    module: nn.Module
    frozen: frozenset[str]

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds."""
        return {key: value for key, value in self.module.state_dict().items() if key not in self.frozen}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors back; one too many or too few is a RuntimeError that names it."""
        base = {key: value for key, value in self.module.state_dict().items() if key in self.frozen}
        self.module.load_state_dict(base | state)


def frozen_names(network: nn.Module) -> frozenset[str]:
    """Names of the parameters that do not ask for gradients, every name of one that has several."""
    return frozenset(name for name, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad)
