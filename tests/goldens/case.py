"""One golden case: its JSON, its tensors, its tolerance, and a record of what was compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HEAD = {"schema", "seed"}  # numbers of every case's head that are no results


class Case:
    """A case file. A kind reads tensors by name and results by key, and calls `close`; the rest is `unread`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data: dict[str, Any] = json.loads(file.read_text())
        name = self.data["tensors_file"]
        self.tensors: dict[str, Tensor] = {} if name is None else load_file(file.parent / name)
        self._read: set[str] = set()

    @property
    def key(self) -> str:
        """What the runner dispatches on."""
        return f"{self.data['group']}/{self.data['kind_of_case']}"

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return self.tensors[name]

    def names(self, pattern: str) -> list[re.Match[str]]:
        """The matches of a pattern with whole tensor names: counts and options are read from names, never assumed."""
        return [match for name in self.tensors if (match := re.fullmatch(pattern, name))]

    def result(self, pattern: str) -> Any:
        """The entry whose whole key matches; keys hold counts ("..._over_64_noises") that differ between cases."""
        (key,) = (key for key in self.data if re.fullmatch(pattern, key))
        self._read.add(key)
        return self.data[key]

    def noted(self, pattern: str) -> float:
        """A number from the tolerance's note, which binds where quantities inside one case differ."""
        match = re.search(pattern + r" ([0-9.e+-]+)", self.data["tolerance"]["note"])
        assert match, f"{self.key}: the note names no tolerance for '{pattern}'"
        return float(match[1])

    def close(
        self,
        found: Tensor | float,
        expected: Tensor | float,
        what: str,
        *,
        atol: float | None = None,
        rtol: float | None = None,
    ) -> None:
        """|found - expected| <= atol + rtol max |expected|, the case's own where not given; infinities must agree."""
        own = self.data["tolerance"]
        atol, rtol = own["atol"] if atol is None else atol, own["rtol"] if rtol is None else rtol
        found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        finite = expected.isfinite()
        assert torch.equal(found[~finite], expected[~finite]), f"{what}: other infinities"
        found, expected = found[finite], expected[finite]
        if expected.numel():
            error, limit = (found - expected).abs().max().item(), atol + rtol * expected.abs().max().item()
            assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"

    def unread(self) -> list[str]:
        """Tensors and results that no check has asked for."""
        numbers = {key for key, value in self.data.items() if isinstance(value, int | float) and key not in HEAD}
        return sorted((self.tensors.keys() | numbers) - self._read)
