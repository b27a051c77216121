"""Procedural solids: five kinds in three sizes, told by texts such as "a large torus", somewhere in [-0.5, 0.5]^3.

Kind and size decide a solid up to its pose, which the text does not tell: the axis it points along and a shift of its
centre. Distances are in the units of the cube; every solid keeps a voxel of the 16^3 grid clear of its walls, and
nothing of it is thinner than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d, normalize

from fastgen import noise
from fastgen.geometry import flexicubes
from fastgen.geometry.mesh import Mesh

KINDS = ("sphere", "box", "torus", "capsule", "union")
SIZES = ("small", "medium", "large")
STEP = 1.35  # from one size to the next
SHIFT = 0.06  # of the centre along each axis, at most
FINER = 4  # cubes along a voxel that the mesh decoder extracts from
# The large ones, pointing along z. Box: half edges. Torus: radii of ring and tube. Capsule: half its core, and radius.
SPHERE = 0.33
BOX = (0.18, 0.26, 0.36)
TORUS = (0.26, 0.105)
CAPSULE = (0.22, 0.14)
# Union: a ball of this radius and height sunk into a slab of these half edges below it.
BALL, BALL_HEIGHT = 0.24, 0.1
SLAB, SLAB_HEIGHT = (0.26, 0.26, 0.14), -0.2
COLOURS = {
    "sphere": (0.85, 0.35, 0.30),
    "box": (0.30, 0.55, 0.85),
    "torus": (0.90, 0.70, 0.25),
    "capsule": (0.40, 0.70, 0.40),
    "union": (0.60, 0.45, 0.75),
}


@dataclass(frozen=True)
class Solid:
    """kind of KINDS, size of SIZES; axis 0..2 that it points along (a box: its longest edge); where its centre lies."""

    kind: str
    size: str
    axis: int = 2
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def text(self) -> str:
        return f"a {self.size} {self.kind}"

    @property
    def colour(self) -> tuple[float, float, float]:
        """Red, green and blue in 0..1."""
        return COLOURS[self.kind]

    @property
    def scale(self) -> float:
        """Of the large solid of this kind."""
        return STEP ** (SIZES.index(self.size) - len(SIZES) + 1)

    def distance(self, points: Tensor) -> Tensor:
        """Signed distances [...] of points [..., 3], negative inside.

        Exact, but within a union: the lesser of its two parts' there is a bound, and exact in sign.
        """
        local = (points - points.new_tensor(self.centre))[..., self._order] / self.scale
        return _distance(self.kind, local) * self.scale

    def points(self, n: int, *, seed: int = 0, draw: int = 0) -> Tensor:
        """n points of the surface, uniform by area, float32 [n, 3]; other draws are independent."""
        local = _points(self.kind, torch.arange(n), seed, draw)
        return local[:, torch.tensor(self._order).argsort()] * self.scale + torch.tensor(self.centre)

    @property
    def centroid(self) -> tuple[float, float, float]:
        """The mean of the surface's points, by area: for all but the union its centre."""
        found = list(self.centre)
        if self.kind == "union":
            found[self.axis] += _union_height() * self.scale
        return found[0], found[1], found[2]

    @property
    def _order(self) -> list[int]:
        """Which coordinates of the world are x, y and z of the solid: a rotation, for they change in a circle."""
        return [(self.axis + 1) % 3, (self.axis + 2) % 3, self.axis]


def conditions() -> list[tuple[str, str]]:
    """Every (kind, size)."""
    return [(kind, size) for kind in KINDS for size in SIZES]


def solids(rows: Tensor, *, seed: int) -> list[Solid]:
    """The solids of these rows, int64 [N]: each a function of its row and the seed."""
    kinds = noise.integers(seed, "solid/kind", rows, len(KINDS)).tolist()
    sizes = noise.integers(seed, "solid/size", rows, len(SIZES)).tolist()
    axes = noise.integers(seed, "solid/axis", rows, 3).tolist()
    centres = ((2 * noise.uniform(seed, "solid/centre", rows, (3,)) - 1) * SHIFT).tolist()
    told = zip(kinds, sizes, axes, centres, strict=True)
    return [Solid(KINDS[kind], SIZES[size], axis, (x, y, z)) for kind, size, axis, (x, y, z) in told]


def corners(solid: Solid, resolution: int) -> Tensor:
    """Distances at the corners i / resolution - 0.5 of the grid, float32 [resolution + 1] * 3 (x, y, z)."""
    line = torch.arange(resolution + 1) / resolution - 0.5
    return solid.distance(torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1))


def surface(solid: Solid, resolution: int) -> Tensor:
    """Voxels [N, 3] (x, y, z; int32, ascending) that the surface passes through.

    Seen at the corners of 4^3 finer cubes in each voxel, some inside and some outside: a mesh extracted from these
    voxels at four times their resolution is closed, where a bulge between a voxel's own corners would be cut open.
    """
    inside = (corners(solid, resolution * FINER) < 0).float()[None]
    most, least = max_pool3d(inside, FINER + 1, FINER), -max_pool3d(-inside, FINER + 1, FINER)
    return (most > least)[0].nonzero().int()


def mesh(solid: Solid, resolution: int = 64) -> Mesh:
    """The surface as triangles in the solid's colour, by FlexiCubes from the distances."""
    made = flexicubes.from_sdf(corners(solid, resolution))
    return Mesh(made.vertices, made.faces, torch.tensor(solid.colour).expand(len(made.vertices), 3))


def _distance(kind: str, x: Tensor) -> Tensor:
    """Of the large solid at the origin, pointing along z."""
    if kind == "sphere":
        return x.norm(dim=-1) - SPHERE
    if kind == "box":
        return _to_box(x, BOX)
    if kind == "torus":
        ring, tube = TORUS
        return torch.hypot(x[..., :2].norm(dim=-1) - ring, x[..., 2]) - tube
    if kind == "capsule":
        half, radius = CAPSULE
        beyond = x[..., 2] - x[..., 2].clamp(-half, half)
        return torch.hypot(x[..., :2].norm(dim=-1), beyond) - radius
    return torch.minimum(_to_ball(x), _to_slab(x))


def _to_ball(x: Tensor) -> Tensor:
    return (x - x.new_tensor((0, 0, BALL_HEIGHT))).norm(dim=-1) - BALL


def _to_slab(x: Tensor) -> Tensor:
    return _to_box(x - x.new_tensor((0, 0, SLAB_HEIGHT)), SLAB)


def _to_box(x: Tensor, half: tuple[float, float, float]) -> Tensor:
    over = x.abs() - x.new_tensor(half)
    return over.clamp(min=0).norm(dim=-1) + over.amax(-1).clamp(max=0)


def _union_height() -> float:
    """Mean height of the union's surface: of the ball what rises from the slab, of the slab all but the ball's foot."""
    top = SLAB_HEIGHT + SLAB[2]
    cut = top - BALL_HEIGHT
    x, y, z = SLAB
    ball, foot, wall = 2 * math.pi * BALL * (BALL - cut), math.pi * (BALL**2 - cut**2), 8 * (x + y) * z
    low = SLAB_HEIGHT - z
    moments = ball * (BALL_HEIGHT + (BALL + cut) / 2), 4 * x * y * low, (4 * x * y - foot) * top, wall * SLAB_HEIGHT
    return sum(moments) / (ball + 8 * x * y - foot + wall)


def _points(kind: str, rows: Tensor, seed: int, draw: int) -> Tensor:
    """On the surface of the large solid at the origin, [len(rows), 3]."""
    tag, n = f"solid/{kind}", len(rows)
    if kind == "sphere":
        return SPHERE * _directions(tag, rows, seed, draw)
    if kind == "box":
        return _on_box(tag, rows, seed, draw, BOX)
    if kind == "torus":
        return _on_torus(tag, rows, seed, draw)
    if kind == "capsule":
        half, radius = CAPSULE
        pick, along = noise.uniform(seed, tag, rows, (2,), draw).unbind(1)
        out = _directions(tag, rows, seed, draw)
        round_about = normalize(out * out.new_tensor((1, 1, 0)), dim=1)
        straight = pick * (half + radius) < half  # areas 4 pi r half of the wall, 4 pi r^2 of both caps
        height = torch.where(straight, (2 * along - 1) * half, half * out[:, 2].sign())
        points = radius * torch.where(straight[:, None], round_about, out)
        return torch.cat([points[:, :2], points[:, 2:] + height[:, None]], 1)
    # More of both parts than are needed, for some lie within the other part.
    more = torch.arange(4 * n + 64)
    ball = BALL * _directions(f"{tag}/ball", more, seed, draw) + torch.tensor((0, 0, BALL_HEIGHT))
    slab = _on_box(f"{tag}/slab", more, seed, draw, SLAB) + torch.tensor((0, 0, SLAB_HEIGHT))
    areas = 4 * math.pi * BALL**2, 8 * sum(SLAB[i] * SLAB[i - 1] for i in range(3))
    from_ball = noise.uniform(seed, f"{tag}/part", more, (), draw) * sum(areas) < areas[0]
    shown = torch.where(from_ball, _to_slab(ball), _to_ball(slab)) >= 0
    return torch.where(from_ball[:, None], ball, slab)[shown][:n]


def _directions(tag: str, rows: Tensor, seed: int, draw: int) -> Tensor:
    return normalize(noise.normal(seed, f"{tag}/out", rows, (3,), draw), dim=1)


def _on_box(tag: str, rows: Tensor, seed: int, draw: int, half: tuple[float, float, float]) -> Tensor:
    sides = torch.tensor(half)
    pick, *place = noise.uniform(seed, f"{tag}/face", rows, (4,), draw).unbind(1)
    points = (2 * torch.stack(place, 1) - 1) * sides
    shares = (sides.prod() / sides).cumsum(0)
    face = torch.searchsorted(shares, pick * shares[-1]).clamp(max=2)[:, None]
    # Which of the two faces: by the side the point was drawn on.
    return points.scatter(1, face, points.gather(1, face).sign() * sides[face])


def _on_torus(tag: str, rows: Tensor, seed: int, draw: int) -> Tensor:
    ring, tube = TORUS
    around, share = (2 * math.pi * noise.uniform(seed, tag, rows, (2,), draw)).unbind(1)
    # The area up to the angle a of the tube goes as a + tube / ring sin(a): Newton's method turns a share into a.
    angle = share.clone()
    for _ in range(12):
        angle -= (angle + tube / ring * angle.sin() - share) / (1 + tube / ring * angle.cos())
    reach = ring + tube * angle.cos()
    return torch.stack([reach * around.cos(), reach * around.sin(), tube * angle.sin()], 1)
