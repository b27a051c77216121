"""Gaussian splats as a .ply in the layout of "3D Gaussian Splatting" (Kerbl et al., 2023), which viewers read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.errors import UserError
from fastgen.files import write_atomic

PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *(f"f_dc_{i}" for i in range(3)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
# Quarter of a turn about x: (x, y, z) -> (x, -z, y), as the original writes its splats.
QUARTER = (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0)


class Splats(Protocol):
    """What is written of G Gaussians: the numbers of the file themselves, for a logit survives where a probability
    rounds to 1.

    xyz [G, 3] in the world; features_dc, the constant harmonic's coefficients, [G, 3] or [G, 1, 3]; opacity_logit [G]
    or [G, 1]; log_scales [G, 3]; unnormalised_rotation [G, 4] (w, x, y, z).
    """

    @property
    def xyz(self) -> Tensor: ...
    @property
    def features_dc(self) -> Tensor: ...
    @property
    def opacity_logit(self) -> Tensor: ...
    @property
    def log_scales(self) -> Tensor: ...
    @property
    def unnormalised_rotation(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ReadSplats:
    """Splats as a file holds them: xyz [G, 3], features_dc [G, 3], opacity_logit [G], log_scales [G, 3],
    unnormalised_rotation [G, 4]."""

    xyz: Tensor
    features_dc: Tensor
    opacity_logit: Tensor
    log_scales: Tensor
    unnormalised_rotation: Tensor


def save_gaussians(path: str | Path, splats: Splats, *, turned: bool = True) -> None:
    """Write float32, little-endian, whole or not at all.

    turned: y up instead of z, positions and rotations alike; the quaternions are then of unit length.
    """
    positions, rotations = splats.xyz.detach().float().cpu(), splats.unnormalised_rotation.detach().float().cpu()
    if turned:
        x, y, z = positions.unbind(1)
        positions = torch.stack([x, -z, y], 1)
        rotations = quaternion_product(torch.tensor(QUARTER), normalize(rotations, dim=1))
    count, normals = len(positions), torch.zeros_like(positions)
    if not count:
        raise UserError(f"{path}: no splats to write")
    others = (v.detach().float().cpu().reshape(count, -1) for v in (splats.features_dc, splats.opacity_logit))
    rows = torch.cat([positions, normals, *others, splats.log_scales.detach().float().cpu(), rotations], 1)
    if rows.shape[1] != len(PROPERTIES):
        raise ValueError(f"{rows.shape[1]} numbers per splat, not the {len(PROPERTIES)} of {', '.join(PROPERTIES)}")
    bad = int((~torch.isfinite(rows).all(1)).sum())
    if bad:
        raise UserError(f"{path}: {bad} of {count} splats are NaN, infinite or of no size; nothing was written")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property float {name}" for name in PROPERTIES] + ["end_header"]
    write_atomic(path, ("\n".join(header) + "\n").encode() + rows.numpy().astype("<f4").tobytes())


def load_gaussians(path: str | Path) -> ReadSplats:
    """Read what `save_gaussians` wrote, in the axes it lies in; higher harmonics of other writers are left out."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    head, mark, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode("ascii", "replace").splitlines()
    names = [line.split()[-1] for line in lines if line.startswith("property float ")]
    count = next((int(line.split()[-1]) for line in lines if line.startswith("element vertex ")), None)
    plain = "format binary_little_endian 1.0" in lines and not any(line.startswith("property list") for line in lines)
    if not mark or not plain or count is None or not set(PROPERTIES) <= set(names) | {"nx", "ny", "nz"}:
        raise UserError(f"{path}: not a .ply of Gaussian splats (float32, little-endian, {', '.join(PROPERTIES)})")
    if len(body) != 4 * count * len(names):
        raise UserError(f"{path}: {len(body)} bytes for {count} splats of {len(names)} numbers; fetch or make it again")
    rows = torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32).reshape(count, len(names)))

    def columns(prefix: str) -> Tensor:
        return rows[:, [names.index(name) for name in PROPERTIES if name.startswith(prefix)]]

    position, opacity = rows[:, [names.index(axis) for axis in "xyz"]], columns("opacity")[:, 0]
    return ReadSplats(position, columns("f_dc_"), opacity, columns("scale_"), columns("rot_"))


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Quaternions (w, x, y, z): first the rotation b, then a; [..., 4]."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )
