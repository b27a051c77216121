"""The case table of dual marching cubes, generated from its rules: which active edges of a cube share a dual vertex.

Corner k of a cube stands at (k & 1, k >> 1 & 1, k >> 2): x fastest. A case is the sum of 2^k over the corners inside.
Rules (Nielson, "Dual marching cubes", 2004): on a face with two active edges these are joined; on an ambiguous face,
which has four, they are joined in the two pairs that meet at an inside corner. Connected groups are dual vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CORNERS = tuple((k & 1, k >> 1 & 1, k >> 2) for k in range(8))
# First and second corner of each edge. The four edges along y run from high to low y: with the order of the cubes
# around an edge this decides which way its quad is wound.
EDGES = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))


@dataclass(frozen=True)
class Table:
    """count [256]: dual vertices per case. group [256, 12]: the dual vertex of each edge, -1 where it is not active.

    problematic [256] (bool): one ambiguous face and one dual vertex. Two such cubes that share the ambiguous face
    would make an edge with four triangles. direction [256, 3]: outward normal of that face, zero elsewhere.
    """

    count: Tensor
    group: Tensor
    problematic: Tensor
    direction: Tensor


def faces() -> list[tuple[tuple[int, ...], list[int], list[int]]]:
    """Outward normal, the four corners and the four edges (by number) of each face of the cube."""
    found = []
    for axis in range(3):
        for side in range(2):
            normal = tuple((2 * side - 1) * (a == axis) for a in range(3))
            corners = [k for k in range(8) if CORNERS[k][axis] == side]
            edges = [e for e, ends in enumerate(EDGES) if set(ends) <= set(corners)]
            found.append((normal, corners, edges))
    return found


def _joined(inside: list[bool], edges: list[int], corners: list[int]) -> list[tuple[int, int]]:
    """Pairs of edges of one face that share a dual vertex; two pairs mean that the face is ambiguous."""
    active = [e for e in edges if inside[EDGES[e][0]] != inside[EDGES[e][1]]]
    if len(active) == 4:
        at = {corner: [e for e in active if corner in EDGES[e]] for corner in corners if inside[corner]}
        return [(pair[0], pair[1]) for pair in at.values()]
    return [(active[0], active[1])] if active else []


def _groups(active: list[int], pairs: list[tuple[int, int]]) -> dict[int, int]:
    """The number of the connected group of each active edge, counted in the order of the edges."""
    label = {e: e for e in active}
    for a, b in pairs:
        old, new = label[b], label[a]
        label = {e: new if v == old else v for e, v in label.items()}
    numbers = {v: i for i, v in enumerate(dict.fromkeys(label.values()))}
    return {e: numbers[v] for e, v in label.items()}


@cache
def table() -> Table:
    """All 256 cases, on the CPU."""
    count = torch.zeros(256, dtype=torch.long)
    group = torch.full((256, 12), -1, dtype=torch.long)
    problematic = torch.zeros(256, dtype=torch.bool)
    direction = torch.zeros(256, 3, dtype=torch.long)
    for case in range(256):
        inside = [bool(case >> k & 1) for k in range(8)]
        active = [e for e, (a, b) in enumerate(EDGES) if inside[a] != inside[b]]
        joined = [(normal, _joined(inside, edges, corners)) for normal, corners, edges in faces()]
        groups = _groups(active, [pair for _, pairs in joined for pair in pairs])
        for edge, number in groups.items():
            group[case, edge] = number
        count[case] = len(set(groups.values()))
        ambiguous = [normal for normal, pairs in joined if len(pairs) == 2]
        if len(ambiguous) == 1 and count[case] == 1:
            problematic[case] = True
            direction[case] = torch.tensor(ambiguous[0])
    return Table(count, group, problematic, direction)


def edge_axes() -> tuple[list[int], list[int]]:
    """The axis along which each edge lies, and its corner with the smaller coordinate there."""
    axes, low = [], []
    for a, b in EDGES:
        (axis,) = (i for i in range(3) if CORNERS[a][i] != CORNERS[b][i])
        axes.append(axis)
        low.append(min((a, b), key=lambda corner: CORNERS[corner][axis]))
    return axes, low
