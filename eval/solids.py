"""What a mesh of a procedural solid is worth: its distance to the solid it should be, and which solid it looks like.

The pose is not told to the model, so the nearest pose counts: mesh and solid are both moved to the centroid of their
surface, and the solid may point along any axis. The distance is CD-L1, the mean of both ways' means: from points of the
mesh to the solid by its exact distance, and from points of the solid to the nearest of the mesh's points (its floor is
a quarter of sqrt(area / n)). A mesh without a surface counts 1, more than any distance inside the cube.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastgen.data.solids import Solid, conditions
from fastgen.errors import require
from fastgen.eval.meshes import sample
from fastgen.geometry.mesh import Mesh

POINTS = 4000  # of a mesh
MARKS = 1000  # of a solid
NOTHING = 1.0  # the distance of a mesh without a surface
Condition = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """chamfer: to the solid asked for. looks: the (kind, size) of the nearest solid; None: no surface."""

    asked: Condition
    chamfer: float
    looks: Condition | None

    @property
    def right(self) -> bool:
        return self.looks == self.asked

    @property
    def right_kind(self) -> bool:
        return self.looks is not None and self.looks[0] == self.asked[0]


@dataclass(frozen=True)
class _Template:
    """A solid in one of its poses, its surface's centroid at the origin, and points of that."""

    solid: Solid
    marks: Tensor

    @property
    def condition(self) -> Condition:
        return self.solid.kind, self.solid.size


class Judge:
    """Every condition in every pose, ready to be compared with meshes."""

    def __init__(self, *, points: int = POINTS, marks: int = MARKS, seed: int = 0) -> None:
        self.points, self.seed = points, seed
        self.templates = [_Template(solid, solid.points(marks, seed=seed).double()) for solid in _poses()]

    def verdict(self, mesh: Mesh | None, asked: Condition) -> Verdict:
        """Of a mesh, or of none; asked: (kind, size)."""
        if mesh is None or not has_surface(mesh):
            return Verdict(asked, NOTHING, None)
        seen = _Seen(sample(_centred(mesh), self.points, seed=self.seed)[0])
        # Half of the way there is a lower bound of the distance: most solids are ruled out by it alone.
        bounds = [seen.there(one.solid) / 2 for one in self.templates]
        found: dict[Condition, float] = {}
        for i in sorted(range(len(bounds)), key=bounds.__getitem__):
            one, best = self.templates[i], min(found.values(), default=math.inf)
            if bounds[i] < (found.get(asked, math.inf) if one.condition == asked else best):
                distance = bounds[i] + seen.back(one.marks) / 2
                found[one.condition] = min(distance, found.get(one.condition, math.inf))
        return Verdict(asked, min(found[asked], NOTHING), min(found, key=found.__getitem__))


def _poses() -> Iterator[Solid]:
    for kind, size in conditions():
        for axis in (2,) if kind == "sphere" else (0, 1, 2):
            x, y, z = Solid(kind, size, axis).centroid
            yield Solid(kind, size, axis, (-x, -y, -z))


@dataclass
class _Seen:
    """Points [n, 3] of a mesh."""

    points: Tensor

    @cached_property
    def tree(self) -> Any:
        require("scipy", extra="3d", purpose="distances between meshes")
        from scipy.spatial import cKDTree

        return cKDTree(self.points.numpy())

    def there(self, solid: Solid) -> float:
        return float(solid.distance(self.points).abs().mean())

    def back(self, marks: Tensor) -> float:
        return float(self.tree.query(marks.numpy())[0].mean())


def has_surface(mesh: Mesh) -> bool:
    """Whether there are faces with an area, and every vertex is a finite place."""
    return len(mesh.faces) > 0 and bool(mesh.vertices.isfinite().all()) and float(mesh.areas.sum()) > 0


def _centred(mesh: Mesh) -> Mesh:
    """In float64 on the CPU, the centroid of its surface at the origin."""
    moved = Mesh(mesh.vertices.double().cpu(), mesh.faces.cpu())
    centre = (moved.triangles.mean(1) * moved.areas[:, None]).sum(0) / moved.areas.sum()
    return Mesh(moved.vertices - centre, moved.faces)


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means over meshes: distance, shares that look like the solid asked for and like its kind, and how many failed."""
    return {
        "chamfer": fmean(one.chamfer for one in verdicts),
        "kind_and_size": fmean(one.right for one in verdicts),
        "kind": fmean(one.right_kind for one in verdicts),
        "empty": sum(one.looks is None for one in verdicts),
    }


def by_kind(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """The same for each kind that was asked for."""
    ordered = sorted(verdicts, key=lambda one: one.asked[0])
    return {kind: summary(list(group)) for kind, group in groupby(ordered, key=lambda one: one.asked[0])}


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of each pair of filled grids, bool [B, R, R, R] -> float64 [B]; two empty ones agree."""
    both, either = (one & other).flatten(1).sum(1), (one | other).flatten(1).sum(1)
    return torch.where(either > 0, both.double() / either.clamp(min=1), 1.0)


def gap_closed(worst: float, value: float, best: float = 0.0) -> float | None:
    """The share of the way from worst to best; None where there is no way to go."""
    return (worst - value) / (worst - best) if worst != best else None
