"""Procedural solids through the way every shape takes here: distances on a grid, FlexiCubes, the software rasteriser.

    python benchmarks/shapes_picture.py [docs]

shapes.png     one column a solid; rows: shaded, normals, depth
turntable.gif  the bitten box from once around
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from fastgen.geometry import flexicubes
from fastgen.geometry.cameras import orbit
from fastgen.geometry.views import render, save_gif, turntable
from fastgen.images import save_png

RESOLUTION, SIDE = 64, 160


def points() -> Tensor:
    axis = torch.arange(RESOLUTION + 1) / RESOLUTION - 0.5
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def ball(x: Tensor, radius: float = 0.36) -> Tensor:
    return x.norm(dim=-1) - radius


def torus(x: Tensor, radius: float = 0.29, tube: float = 0.12) -> Tensor:
    return torch.hypot(x[..., :2].norm(dim=-1) - radius, x[..., 2]) - tube


def box(x: Tensor, half: tuple[float, float, float] = (0.3, 0.22, 0.34)) -> Tensor:
    over = x.abs() - torch.tensor(half)
    return over.clamp(min=0).norm(dim=-1) + over.amax(-1).clamp(max=0)


def capsule(x: Tensor, half: float = 0.22, radius: float = 0.2) -> Tensor:
    along = x[..., 2:].clamp(-half, half)
    return torch.cat([x[..., :2], x[..., 2:] - along], -1).norm(dim=-1) - radius


def main() -> None:
    x = points()
    bitten = torch.maximum(box(x), -ball(x - torch.tensor([0.3, -0.22, 0.34]), 0.3))
    ringed = torch.minimum(ball(x, 0.24), torus(x, 0.38, 0.06))
    meshes = [flexicubes.from_sdf(solid) for solid in (ball(x), torus(x), capsule(x), bitten, ringed)]
    columns = []
    for mesh in meshes:
        view = render(mesh, orbit(8, size=SIDE)[1])
        columns.append(torch.cat([view.picture(kind) for kind in ("shaded", "normal", "depth")]))
    picture = torch.cat(columns, 1).movedim(-1, 0)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    save_png(folder / "shapes.png", picture * 2 - 1)
    save_gif(folder / "turntable.gif", turntable(meshes[3], frames=24, size=SIDE))


if __name__ == "__main__":
    main()
