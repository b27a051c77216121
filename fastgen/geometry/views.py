"""Pictures of a mesh: colour, normal and depth views, shaded turntables, GIFs. No GPU and no CUDA package is needed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from fastgen.errors import RunFailed
from fastgen.files import write_atomic
from fastgen.geometry.cameras import Camera, orbit
from fastgen.geometry.mesh import Mesh, check
from fastgen.geometry.raster import Backend, rasterise

GREY = 0.75  # of a mesh without colours
AMBIENT = 0.35
Kind = Literal["shaded", "colour", "normal", "depth"]


@dataclass(frozen=True)
class View:
    """colour and shaded [H, W, 3] in 0..1, normal [H, W, 3] (unit, world), depth [H, W], alpha [H, W] in 0..1.

    Where alpha is 0 the depth is infinite and the others are zero; at the edges they are means over what is covered.
    """

    colour: Tensor
    shaded: Tensor
    normal: Tensor
    depth: Tensor
    alpha: Tensor

    def picture(self, kind: Kind, background: float = 1.0) -> Tensor:
        """One of the views as RGB [H, W, 3] in 0..1 over a grey background; depth from white (near) to black (far)."""
        if kind == "depth":
            seen = self.depth[self.depth.isfinite()]
            near, far = (seen.min(), seen.max()) if len(seen) else (0.0, 1.0)
            grey = ((far - self.depth) / (far - near + 1e-9)).clamp(0, 1)
            picture = grey[..., None].expand(-1, -1, 3)
        else:
            picture = (self.normal + 1) / 2 if kind == "normal" else getattr(self, kind)
        return picture * self.alpha[..., None] + background * (1 - self.alpha[..., None])


def render(mesh: Mesh, camera: Camera, *, smooth: bool = True, finer: int = 2, backend: Backend = "torch") -> View:
    """What a camera sees, averaged over finer x finer samples per pixel.

    smooth: normals interpolated between the vertices', else each triangle's own. The light comes from the camera.
    """
    fragments = rasterise(mesh, replace(camera, size=camera.size * finer), backend=backend)
    alpha = fragments.covered.float()
    if smooth:
        normal = fragments.interpolate(mesh.faces, mesh.vertex_normals.float())
    else:
        normal = mesh.face_normals.float()[fragments.face.clamp(min=0)] * alpha[..., None]
    normal = normalize(normal, dim=-1)
    colours = torch.full_like(mesh.vertices, GREY) if mesh.colours is None else mesh.colours
    colour = fragments.interpolate(mesh.faces, colours.float())
    towards = -camera.axes[2].to(normal)
    # The side that faces away is lit as well: an open surface is seen from both.
    light = AMBIENT + (1 - AMBIENT) * (normal @ towards).abs()
    near = torch.where(fragments.covered, fragments.depth, 0.0)

    def mean(values: Tensor) -> Tensor:
        """Over the covered samples of each pixel: [h, w, C] -> [H, W, C]."""
        parts = torch.cat([values * alpha[..., None], alpha[..., None]], -1).movedim(-1, 0)
        pooled = avg_pool2d(parts[None], finer)[0].movedim(0, -1)
        return pooled[..., :-1] / pooled[..., -1:].clamp(min=1e-9)

    pooled = mean(torch.cat([colour, colour * light[..., None], normal, near[..., None]], -1))
    alpha = avg_pool2d(alpha[None, None], finer)[0, 0]
    depth = torch.where(alpha > 0, pooled[..., 9], torch.inf)
    return View(pooled[..., :3], pooled[..., 3:6], normalize(pooled[..., 6:9], dim=-1), depth, alpha)


def turntable(
    mesh: Mesh, *, frames: int = 36, size: int = 256, kind: Kind = "shaded", backend: Backend = "torch"
) -> Tensor:
    """Pictures from once around the object, uint8 [frames, size, size, 3]."""
    check(mesh)
    views = (render(mesh, camera, backend=backend) for camera in orbit(frames, size=size))
    return torch.stack([(view.picture(kind) * 255).round().clamp(0, 255).to(torch.uint8).cpu() for view in views])


def save_gif(path: str | Path, pictures: Tensor | Sequence[Tensor], milliseconds: int = 80) -> None:
    """Write uint8 [T, H, W, 3] as an endless GIF, whole or not at all."""
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    if not images:
        raise RunFailed(f"{path}: no pictures to write")
    stream = io.BytesIO()
    # One palette for all pictures: with its own each would flicker.
    strip = Image.fromarray(torch.cat(list(pictures), 1).numpy())
    palette = strip.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_atomic(path, stream.getvalue())
