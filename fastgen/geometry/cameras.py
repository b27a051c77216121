"""Pinhole cameras around an object at the origin. The world's z points up; a picture's rows run downwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UP = (0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """eye and target in the world; fov in degrees, over `size`, the side of a square picture in pixels."""

    eye: tuple[float, float, float]
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fov: float = 40.0
    size: int = 512

    @property
    def axes(self) -> Tensor:
        """Rows: rightwards, downwards and forwards, [3, 3], float64."""
        forward = torch.tensor(self.target, dtype=torch.float64) - torch.tensor(self.eye, dtype=torch.float64)
        if not forward.any():
            raise ValueError("a camera cannot stand in its own target")
        forward = forward / forward.norm()
        right = torch.linalg.cross(forward, torch.tensor(UP, dtype=torch.float64))
        if float(right.norm()) < 1e-9:  # looking straight up or down: x stays on the right
            right = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        right = right / right.norm()
        return torch.stack([right, torch.linalg.cross(forward, right), forward])

    @property
    def focal(self) -> float:
        """Focal length in pixels."""
        return self.size / (2 * math.tan(math.radians(self.fov) / 2))

    def project(self, points: Tensor) -> Tensor:
        """World points [N, 3] -> (column, row, depth) [N, 3] in float64.

        A pixel's centre lies half a pixel beyond its number, as with `align_corners=False`. Depth runs along the axis;
        where it is not positive the point lies behind the camera and its column and row mean nothing.
        """
        device = points.device
        seen = (points.double() - torch.tensor(self.eye, dtype=torch.float64, device=device)) @ self.axes.T.to(device)
        depth = seen[:, 2:]
        return torch.cat([seen[:, :2] / depth * self.focal + self.size / 2, depth], 1)


def looking_in(yaw: float, pitch: float, *, radius: float = 2.0, fov: float = 40.0, size: int = 512) -> Camera:
    """A camera at yaw (radians from x towards y) and pitch (radians above the horizon), looking at the origin."""
    flat = radius * math.cos(pitch)
    eye = (flat * math.cos(yaw), flat * math.sin(yaw), radius * math.sin(pitch))
    return Camera(eye=eye, fov=fov, size=size)


def orbit(
    count: int, *, pitch: float = math.radians(20), radius: float = 2.0, fov: float = 40.0, size: int = 512
) -> list[Camera]:
    """Cameras once around the object; the first looks along +y, at the object's front."""
    turns = (2 * math.pi * i / count - math.pi / 2 for i in range(count))
    return [looking_in(yaw, pitch, radius=radius, fov=fov, size=size) for yaw in turns]


def sphere(
    count: int, *, offset: tuple[float, float] = (0.0, 0.0), radius: float = 2.0, fov: float = 40.0, size: int = 512
) -> list[Camera]:
    """Cameras all over a sphere: a Hammersley sequence in cos(polar angle) and yaw, shifted by `offset` in [0, 1)^2."""
    cameras = []
    for i in range(count):
        u, v = (i + offset[0]) / count, radical_inverse(i, 2) + offset[1]
        pitch = math.acos(1 - 2 * u) - math.pi / 2
        cameras.append(looking_in(2 * math.pi * v, pitch, radius=radius, fov=fov, size=size))
    return cameras


def radical_inverse(i: int, base: int) -> float:
    """The digits of i mirrored at the point: 1, 2, 3 -> 0.5, 0.25, 0.75 in base 2."""
    value, step = 0.0, 1.0 / base
    while i:
        value += step * (i % base)
        i, step = i // base, step / base
    return value
