"""Tensors worked out once for every row of something, and kept on disk: prompts' embeddings, images' latents.

    <folder>/manifest.json              what decides the content; the folder's name ends in its hash
    <folder>/rows-000000.safetensors    tensors [n, ...] of rows 0 .. n - 1, and so on

A table is made shard by shard, each written whole or not at all, so a killed maker goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen import files
from fastgen.config import config_hash
from fastgen.data.shards import payload
from fastgen.errors import Stopped, UserError

MANIFEST = "manifest.json"


class Table:
    """Named tensors of `total` rows. `key` is everything that decides them, as plain data.

    Opened shards are mapped, not read: a row costs what it holds.
    """

    def __init__(self, cache: Path, kind: str, key: dict[str, Any], total: int, per_shard: int = 1024) -> None:
        self.key = {"format": 1, "kind": kind, **key, "total": total, "per_shard": per_shard}
        self.folder = cache / f"{kind}-{config_hash(self.key)}"
        self.total, self.per_shard = total, per_shard
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.total

    @property
    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [i for i in range(-(-self.total // self.per_shard)) if not self._file(i).exists()]

    def make(
        self,
        work: Callable[[Sequence[int]], dict[str, Tensor]],
        *,
        batch: int = 32,
        advance: Callable[[int, int], None] = lambda done, total: None,
        interrupt: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make what is missing: work(rows) gives the tensors [n, ...] of n rows. A stale folder is refused."""
        self._claim()
        for done, shard in enumerate(missing := self.missing):
            advance(done, len(missing))
            if interrupt():
                raise Stopped(f"{done} of {len(missing)} missing parts made in {self.folder}")
            rows = range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.total))
            parts = [work(rows[at : at + batch]) for at in range(0, len(rows), batch)]
            tensors = {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
            files.write_atomic(self._file(shard), save(tensors, metadata={"sha256": payload(tensors)}))

    def get(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The tensors [B, ...] of rows int64 [B]."""
        found: dict[str, Tensor] = {}
        for place, row in enumerate(rows.tolist()):
            shard = self._shard(row // self.per_shard)
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                value = shard.get_slice(name)[row % self.per_shard]
                if name not in found:
                    found[name] = value.new_empty(len(rows), *value.shape)
                found[name][place] = value
        return found

    def _claim(self) -> None:
        manifest = self.folder / MANIFEST
        if manifest.exists():
            self._refuse_stale()
        else:
            files.make_folder(self.folder)
            files.write_json(manifest, self.key)

    def _refuse_stale(self) -> None:
        told = files.read_json(self.folder / MANIFEST)
        differing = [name for name in self.key if not isinstance(told, dict) or told.get(name) != self.key[name]]
        if differing:
            raise UserError(
                f"{self.folder}: a stale cache: made with another {', another '.join(differing)}; delete the folder"
            )

    def _file(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:06d}.safetensors"

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            file = self._file(number)
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: missing or damaged ({error}); delete it and run again") from error
            # Once for each shard of a run, which reads all of it anyhow.
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if (opened.metadata() or {}).get("sha256") != payload(tensors):
                raise UserError(f"{file}: damaged (its content is not what was written); delete it and run again")
            self._open[number] = opened
        return self._open[number]
