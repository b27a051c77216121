"""Pictures of Gaussian splats in torch alone; gsplat by name.

Each Gaussian is seen as one in the picture's plane, by the projection's derivative at its centre (EWA splatting,
Zwicker et al., 2001; 3D Gaussian Splatting, Kerbl et al., 2023), widened by a small kernel and dimmed as much
(Mip-Splatting, 2311.16493), and laid over those behind it.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.errors import UserError
from fastgen.geometry.boxes import box_pairs
from fastgen.geometry.cameras import Camera, orbit
from fastgen.geometry.gaussian_ply import Splats

Backend = Literal["torch", "gsplat"]
PAIRS = 1 << 20  # Gaussian-pixel pairs in one go
KERNEL = 0.1  # variance in square pixels: `2d_filter_kernel_size` of the official decoder
NEAR = 0.01
FAINT, DENSE = 1 / 255, 0.999  # what is left out, and the most that one Gaussian covers
HARMONIC = 0.5 / math.sqrt(math.pi)  # the constant one


@dataclass(frozen=True)
class Cloud:
    """Splats as renderers take them: means, scales, colours [G, 3], quaternions [G, 4] (w, x, y, z), opacities [G]."""

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    colours: Tensor

    @classmethod
    def of(cls, splats: Splats) -> Cloud:
        """Activated, float32."""
        count = len(splats.xyz)
        return cls(
            splats.xyz.float(),
            splats.log_scales.float().exp(),
            normalize(splats.unnormalised_rotation.float(), dim=1),
            splats.opacity_logit.float().reshape(count).sigmoid(),
            (0.5 + HARMONIC * splats.features_dc.float().reshape(count, 3)).clamp(min=0),
        )


def render(
    splats: Splats, camera: Camera, *, kernel: float = KERNEL, backend: Backend = "torch"
) -> tuple[Tensor, Tensor]:
    """What a camera sees: colour on black [H, W, 3], and alpha [H, W] in 0..1; float32."""
    cloud = Cloud.of(splats)
    if backend == "gsplat":
        if not cloud.means.is_cuda:
            raise UserError("gsplat renders on a CUDA device only; move the splats there, or take the torch renderer")
        return _by_gsplat(cloud, camera, kernel)
    return _composed(cloud, camera, kernel)


def turntable(splats: Splats, *, frames: int = 36, size: int = 256, backend: Backend = "torch") -> Tensor:
    """Pictures on white from once around the object, uint8 [frames, size, size, 3]; `views.save_gif` writes them."""
    seen = (render(splats, camera, backend=backend) for camera in orbit(frames, size=size))
    pictures = [colour + (1 - alpha[..., None]) for colour, alpha in seen]
    return torch.stack([(picture * 255).round().clamp(0, 255).to(torch.uint8).cpu() for picture in pictures])


def _composed(cloud: Cloud, camera: Camera, kernel: float) -> tuple[Tensor, Tensor]:
    """Front to back, some pairs at a time: what shows through so far is all that one lot needs of those before it."""
    size, device = camera.size, cloud.means.device
    place = camera.project(cloud.means)
    order = place[:, 2].argsort(stable=True)
    order = order[place[order, 2] > NEAR]
    place, colours = place[order], cloud.colours[order].double()
    matrix, opacity = _flat(cloud, order, camera, kernel)
    reach = (2 * (opacity / FAINT).clamp(min=1).log()).sqrt()
    extent = reach[:, None] * torch.stack([matrix[:, 0, 0], matrix[:, 1, 1]], 1).sqrt()
    low = (place[:, :2] - extent - 0.5).ceil().clamp(min=0, max=size).long()
    high = (place[:, :2] + extent - 0.5).floor().clamp(min=-1, max=size - 1).long()
    inverse = torch.linalg.inv(matrix)
    colour = torch.zeros(size * size, 3, dtype=torch.float64, device=device)
    through = torch.ones(size * size, dtype=torch.float64, device=device)
    for row, pixel in box_pairs(low, high, PAIRS):
        away = pixel + 0.5 - place[row, :2]
        power = torch.einsum("mi,mij,mj->m", away, inverse[row], away)
        alpha = (opacity[row] * (-power / 2).exp()).clamp(max=DENSE)
        kept = alpha >= FAINT
        row, alpha, where = row[kept], alpha[kept], (pixel[:, 1] * size + pixel[:, 0])[kept]
        where, sorting = where.sort(stable=True)
        row, alpha = row[sorting], alpha[sorting]
        left = through[where] * _before(where, alpha)
        colour.index_add_(0, where, (left * alpha)[:, None] * colours[row])
        through.scatter_reduce_(0, where, 1 - alpha, "prod")
    return colour.float().reshape(size, size, 3), (1 - through).float().reshape(size, size)


def _flat(cloud: Cloud, order: Tensor, camera: Camera, kernel: float) -> tuple[Tensor, Tensor]:
    """Covariances [G, 2, 2] in square pixels and opacities [G] in the picture, float64."""
    axes = camera.axes.to(cloud.means.device)
    eye = torch.tensor(camera.eye, dtype=torch.float64, device=axes.device)
    x, y, z = ((cloud.means[order].double() - eye) @ axes.T).unbind(1)
    most = 1.3 * math.tan(math.radians(camera.fov) / 2)  # beyond, the derivative says nothing of the whole Gaussian
    x, y = ((v / z).clamp(-most, most) for v in (x, y))
    zero = torch.zeros_like(z)
    slope = torch.stack([1 / z, zero, -x / z, zero, 1 / z, -y / z], 1).reshape(-1, 2, 3) * camera.focal
    wide = rotations(cloud.quaternions[order].double()) * cloud.scales[order].double()[:, None]
    half = slope @ axes @ wide
    bare = half @ half.mT
    matrix = bare + kernel * torch.eye(2, dtype=torch.float64, device=axes.device)
    dimmed = (torch.linalg.det(bare).clamp(min=0) / torch.linalg.det(matrix)).sqrt()
    return matrix, cloud.opacities[order].double() * dimmed


def _before(where: Tensor, alpha: Tensor) -> Tensor:
    """The product of 1 - alpha over the earlier entries of the same pixel, entries sorted by pixel."""
    logs = torch.log1p(-alpha)
    total = logs.cumsum(0) - logs
    first = torch.searchsorted(where, where)  # of each pixel's entries
    return (total - total[first]).exp()


def rotations(quaternions: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) [G, 4] as matrices [G, 3, 3]."""
    w, x, y, z = quaternions.unbind(1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def _by_gsplat(cloud: Cloud, camera: Camera, kernel: float) -> tuple[Tensor, Tensor]:
    """The same by gsplat, on a CUDA device."""
    device, axes, half = cloud.means.device, camera.axes.float(), camera.size / 2
    view, lens = torch.eye(4), torch.tensor([[camera.focal, 0, half], [0, camera.focal, half], [0, 0, 1]])
    view[:3, :3], view[:3, 3] = axes, -axes @ torch.tensor(camera.eye)
    colour, alpha, _ = _gsplat().rasterization(
        cloud.means,
        cloud.quaternions,
        cloud.scales,
        cloud.opacities,
        cloud.colours,
        view[None].to(device),
        lens[None].to(device),
        camera.size,
        camera.size,
        near_plane=NEAR,
        eps2d=kernel,
        rasterize_mode="antialiased",
    )
    return colour[0], alpha[0, ..., 0]


def _gsplat() -> ModuleType:
    """No extra brings it: it is built against one's own CUDA."""
    try:
        return importlib.import_module("gsplat")
    except ImportError as error:
        raise UserError(
            "rendering by gsplat needs the package 'gsplat' (pip install gsplat, built against your CUDA); the torch "
            "renderer needs nothing"
        ) from error
