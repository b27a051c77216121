"""Distances between meshes, each with its sampling floor, and what may be wrong with one mesh.

Both meshes must lie in one frame: nothing is moved or scaled here. Points are drawn uniformly by area; two drawings of
one surface are not at distance zero, and that floor stands beside every number (about 0.5 sqrt(area / n) for a
distance).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.errors import require
from fastgen.eval.metrics import Result
from fastgen.geometry.mesh import Mesh, check, component_labels, edge_counts
from fastgen.noise import uniform

POINTS = 20_000
TAUS = (0.01, 0.02, 0.05)  # on the scale of a unit cube


@dataclass(frozen=True)
class Soundness:
    """watertight: each edge has exactly two faces; wound: and these run along it in opposite directions.

    euler: vertices in use - edges + faces, 2 - 2 genus summed over the closed parts. degenerate: faces of no area.
    volume: of a watertight, wound mesh, negative where it is inside out; None for others, which enclose none.
    """

    watertight: bool
    wound: bool
    euler: int
    parts: int
    degenerate: int
    volume: float | None


def soundness(mesh: Mesh) -> Soundness:
    """What a mesh's faces alone tell."""
    check(mesh)
    edges, counts, balance = edge_counts(mesh.faces)
    watertight, wound = bool((counts == 2).all()), bool((balance.abs() <= 2 - counts).all())
    return Soundness(
        watertight=watertight,
        wound=wound,
        euler=len(torch.unique(mesh.faces)) - len(edges) + len(mesh.faces),
        parts=int(component_labels(mesh).max()) + 1,
        degenerate=int((mesh.areas == 0).sum()),
        volume=mesh.volume if watertight and wound else None,
    )


def sample(mesh: Mesh, n: int, *, seed: int = 0, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Points [n, 3] uniform by area, and their faces' unit normals [n, 3], float64; other draws are independent."""
    total = mesh.areas.double().cumsum(0)
    pick, u, v = uniform(seed, "surface", torch.arange(n), (3,), draw).double().unbind(1)
    face = torch.searchsorted(total, (pick * total[-1]).to(total)).clamp(max=len(total) - 1)
    root = u.sqrt()
    weights = torch.stack([1 - root, root * (1 - v), root * v], 1).to(total)
    points = (mesh.triangles.double()[face] * weights[..., None]).sum(1)
    return points, normalize(mesh.face_normals.double()[face], dim=1)


@dataclass(frozen=True)
class _Distances:
    """Nearest neighbours between two drawings, one way and back: distances and |cos| between normals."""

    there: Tensor
    back: Tensor
    cosine_there: Tensor
    cosine_back: Tensor

    @classmethod
    def between(cls, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> _Distances:
        require("scipy", extra="3d", purpose="distances between meshes")
        from scipy.spatial import cKDTree

        (p, pn), (q, qn) = ([v.cpu() for v in side] for side in (one, other))
        there, to = (torch.from_numpy(v) for v in cKDTree(q.numpy()).query(p.numpy()))
        back, fro = (torch.from_numpy(v) for v in cKDTree(p.numpy()).query(q.numpy()))
        return cls(there, back, (pn * qn[to]).sum(1).abs(), (qn * pn[fro]).sum(1).abs())

    def numbers(self, taus: Sequence[float]) -> dict[str, float]:
        """CD-L1 = mean of both means; CD-L2 = sum of both mean squares; F = harmonic mean of both shares below tau."""
        found = {
            "CD-L1": float(self.there.mean() + self.back.mean()) / 2,
            "CD-L2": float(self.there.square().mean() + self.back.square().mean()),
            "normal consistency": float(self.cosine_there.mean() + self.cosine_back.mean()) / 2,
        }
        for tau in taus:
            precision, recall = (float((d < tau).double().mean()) for d in (self.there, self.back))
            both = precision + recall
            found[f"F@{tau:g}"] = 2 * precision * recall / both if both else 0.0
        return found


def compare(
    mesh: Mesh, reference: Mesh, *, points: int = POINTS, taus: Sequence[float] = TAUS, seed: int = 0
) -> dict[str, Result]:
    """CD-L1, CD-L2, F@tau and normal consistency by name; the floors compare two drawings of the reference."""
    check(mesh), check(reference, "reference")
    given, truth, again = (
        sample(mesh, points, seed=seed),
        *(sample(reference, points, seed=seed, draw=d) for d in (1, 2)),
    )
    floors = _Distances.between(truth, again).numbers(taus)
    if taus and min(taus) < 2 * floors["CD-L1"]:
        warnings.warn(
            f"tau={min(taus):g} is below twice the sampling floor {floors['CD-L1']:.2g}: its F-score measures the "
            "sampling; draw more points",
            stacklevel=2,
        )
    values = _Distances.between(given, truth).numbers(taus)
    return {
        name: Result(
            metric=name,
            value=value,
            n_gen=points,
            n_ref=points,
            extractor=None,
            extractor_sha256=None,
            floor=floors[name],
            seed=seed,
        )
        for name, value in values.items()
    }
