"""Triangles to pixels in torch alone: for each pixel the nearest triangle and where in it. nvdiffrast by name.

A pixel is covered if its centre lies in the triangle's picture, edges included; both sides of a triangle are seen.
Neighbours compute their common edge by the same products with the sign turned, so nothing shows through between them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.geometry.boxes import box_pairs
from fastgen.geometry.cameras import Camera
from fastgen.geometry.mesh import Mesh

Backend = Literal["torch", "nvdiffrast"]
PAIRS = 1 << 20  # candidate pixels in one go
NEAR, FAR = 1e-3, 1e3


@dataclass(frozen=True)
class Fragments:
    """face [H, W] long, -1 where there is none; weights [H, W, 3] of its corners, perspective-correct; depth [H, W].

    Depth runs along the camera's axis and is infinite where there is no face.
    """

    face: Tensor
    weights: Tensor
    depth: Tensor

    @property
    def covered(self) -> Tensor:
        return self.face >= 0

    def interpolate(self, faces: Tensor, values: Tensor) -> Tensor:
        """Values per vertex [V, C] -> [H, W, C]; zero where there is no face."""
        corners = values[faces[self.face.clamp(min=0)]]
        return (corners * self.weights[..., None].to(values)).sum(2) * self.covered[..., None]


def rasterise(mesh: Mesh, camera: Camera, *, backend: Backend = "torch") -> Fragments:
    """What a camera sees of a mesh. Triangles that reach behind the camera are left out."""
    projected = camera.project(mesh.vertices)
    number = (projected[:, 2] > NEAR)[mesh.faces].all(1).nonzero()[:, 0]
    faces = mesh.faces[number]
    if backend == "nvdiffrast":
        if not projected.is_cuda:
            raise UserError("nvdiffrast renders on a CUDA device only; move the mesh there, or take the torch one")
        found = _by_nvdiffrast(projected, faces, camera.size)
    else:
        found = cover(projected, faces, camera.size, camera.size)
    if len(number) == 0:
        return found
    return Fragments(torch.where(found.covered, number[found.face.clamp(min=0)], -1), found.weights, found.depth)


def cover(projected: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """Fragments of vertices at (column, row, depth > 0) [V, 3]: of several faces the nearest, then the first."""
    corners = projected.double()[faces]
    plane, last = corners[..., :2], torch.tensor([width, height], device=faces.device) - 1
    low = (plane.amin(1) - 0.5).ceil().clamp(min=0).long()
    high = torch.minimum((plane.amax(1) - 0.5).floor().clamp(min=-1).long(), last)
    # Depth (a positive float32, whose bits are in its own order) and number in one integer: the least one wins.
    best = torch.full((height * width,), torch.iinfo(torch.int64).max, device=faces.device)
    for face, pixel in box_pairs(low, high, PAIRS):
        weights, depth, hit = _at(corners[face], pixel + 0.5)
        key = (depth.float().view(torch.int32).long() << 32) | face
        best.scatter_reduce_(0, (pixel[:, 1] * width + pixel[:, 0])[hit], key[hit], "amin")
    covered = best < torch.iinfo(torch.int64).max
    face = torch.where(covered, best & 0xFFFFFFFF, -1)
    weights = torch.zeros(height * width, 3, dtype=torch.float64, device=faces.device)
    depth = torch.full((height * width,), torch.inf, dtype=torch.float64, device=faces.device)
    place = covered.nonzero()[:, 0]
    pixel = torch.stack([place % width, place // width], 1)
    weights[place], depth[place], _ = _at(corners[face[place]], pixel + 0.5)
    shape = (height, width)
    return Fragments(face.reshape(shape), weights.float().reshape(*shape, 3), depth.float().reshape(shape))


def _at(corners: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [M, 3], depth [M] and whether it is hit [M], of triangles [M, 3, 3] at points [M, 2] of the picture."""
    to = corners[..., :2] - points[:, None]

    def edge(a: int, b: int) -> Tensor:
        return to[:, a, 0] * to[:, b, 1] - to[:, a, 1] * to[:, b, 0]

    signed = torch.stack([edge(1, 2), edge(2, 0), edge(0, 1)], 1)
    area = signed.sum(1, keepdim=True)
    hit = ((signed >= 0).all(1) | (signed <= 0).all(1)) & (area[:, 0] != 0)
    # In the picture 1 / depth is linear, and so is everything divided by the depth.
    shares = signed / torch.where(area == 0, 1.0, area) / corners[..., 2]
    depth = 1 / shares.sum(1)
    return shares * depth[:, None], depth, hit


def _by_nvdiffrast(projected: Tensor, faces: Tensor, size: int) -> Fragments:
    """The same by nvdiffrast, on a CUDA device."""
    dr = _nvdiffrast()
    depth = projected[:, 2:]
    place = (2 * projected[:, :2] / size - 1) * depth  # its first row is y = -1: the top, as our rows run downwards
    beyond = (FAR + NEAR) / (FAR - NEAR) * depth - 2 * FAR * NEAR / (FAR - NEAR)
    clip = torch.cat([place, beyond, depth], 1).float()[None].contiguous()
    found = dr.rasterize(dr.RasterizeCudaContext(), clip, faces.int().contiguous(), [size, size])[0][0]
    face = found[..., 3].long() - 1
    weights = torch.stack([found[..., 0], found[..., 1], 1 - found[..., 0] - found[..., 1]], -1)
    away = (projected[:, 2].float()[faces[face.clamp(min=0)]] * weights).sum(-1)
    covered = face >= 0
    return Fragments(face, weights * covered[..., None], torch.where(covered, away, torch.inf))


def _nvdiffrast() -> ModuleType:
    """No extra brings it: it is built against one's own CUDA."""
    try:
        return importlib.import_module("nvdiffrast.torch")
    except ImportError as error:
        raise UserError(
            "rendering by nvdiffrast needs the package 'nvdiffrast' (github.com/NVlabs/nvdiffrast, built against your "
            "CUDA); the torch rasteriser needs nothing"
        ) from error
