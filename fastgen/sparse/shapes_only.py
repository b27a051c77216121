"""Sites for features on the meta device: worked out from real coordinates, handed out as shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from fastgen.sparse.sites import Sites


class ShapesOnly(Sites):
    """Sites on the meta device that keep their real coordinates, int32 [N, 4] on the CPU, so that neighbours, windows
    and halves are as many as in a run."""

    def __init__(self, real: Tensor, batch: int) -> None:
        super().__init__(real, batch)
        self._real, self.coords = self.coords, self.coords.to("meta")
        self._shown: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        asked_by_make = self.coords is self._real
        before, self.coords = self.coords, self._real
        try:
            found = super().once(key, make)
        finally:
            self.coords = before
        if asked_by_make:
            return found
        if key not in self._shown:
            self._shown[key] = _shapes(found)
        return self._shown[key]


def _shapes(found: Any) -> Any:
    """The same with every tensor on the meta device."""
    if isinstance(found, Tensor):
        return found.to("meta")
    if isinstance(found, Sites):
        return ShapesOnly(found.coords, found.batch)
    if isinstance(found, tuple):
        return tuple(map(_shapes, found))
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        fields = {field.name: _shapes(getattr(found, field.name)) for field in dataclasses.fields(found)}
        return dataclasses.replace(found, **fields)
    return found
