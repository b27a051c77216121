"""Conditions: a dict of tensors with the batch in dimension 0 ({"label": [B]}, {"text": [B, T, D], ...}), or None."""

from __future__ import annotations

import torch
from torch import Tensor

Cond = dict[str, Tensor] | None


def length(cond: Cond) -> int:
    """How many rows a condition has."""
    if not cond:
        raise ValueError("no condition, so no rows to count")
    return len(next(iter(cond.values())))


def concat(first: Cond, second: Cond) -> Cond:
    """One batch after the other; both must hold the same conditions."""
    if first is None and second is None:
        return None
    if first is None or second is None or first.keys() != second.keys():
        names = [sorted(c) if c else "nothing" for c in (first, second)]
        raise ValueError(f"conditions differ: {names[0]} beside {names[1]}")
    return {name: torch.cat([first[name], second[name]]) for name in first}


def select(cond: Cond, rows: Tensor | slice) -> Cond:
    """Some rows of every tensor."""
    return None if cond is None else {name: value[rows] for name, value in cond.items()}


def repeat(cond: Cond, n: int) -> Cond:
    """A single row, n times (the null condition for a batch of n)."""
    return None if cond is None else {name: value.expand(n, *value.shape[1:]) for name, value in cond.items()}


def to(cond: Cond, device: torch.device | str) -> Cond:
    """Every tensor on a device."""
    return None if cond is None else {name: value.to(device) for name, value in cond.items()}


def replace(cond: Cond, null: Cond, where: Tensor) -> Cond:
    """The null row in place of every row marked in `where`, bool [B] (condition dropout)."""
    if cond is None or null is None:
        return cond
    marks = {name: where.reshape(-1, *(1,) * (value.ndim - 1)) for name, value in cond.items()}
    return {name: torch.where(marks[name], null[name].to(value.dtype), value) for name, value in cond.items()}
