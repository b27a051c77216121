"""Kind `flexicubes` of the group `trellis`, and the comparison of two surfaces with differently numbered vertices."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.geometry import flexicubes as cubes
from fastgen.geometry.flexicubes_table import CORNERS
from tests.goldens.case import Case


def triangles(faces: Tensor) -> set[tuple[int, ...]]:
    """Faces as a set, each beginning with its smallest vertex and keeping its direction."""
    turned = faces.gather(1, (faces.argmin(1, keepdim=True) + torch.arange(3)) % 3)
    return set(map(tuple, turned.tolist()))


def same_surface(
    case: Case, found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor], what: str
) -> None:
    """(vertices, attributes, faces) twice: vertices one to one within the tolerance, and the same set of triangles."""
    vertices, attributes, faces = found
    assert vertices.shape == expected[0].shape, f"{what}: {len(vertices)} vertices, not {len(expected[0])}"
    # Vertices of two cubes may coincide; their colours then tell them apart.
    key, other = torch.cat([vertices, attributes], 1).double(), torch.cat(expected[:2], 1).double()
    match = torch.cdist(key, other).argmin(1)
    assert len(match.unique()) == len(match), f"{what}: two vertices stand for one"
    case.close(vertices, expected[0][match], f"{what}: vertices")
    case.close(attributes, expected[1][match], f"{what}: attributes")
    assert len(faces) == len(expected[2]), f"{what}: {len(faces)} faces, not {len(expected[2])}"
    assert triangles(match[faces]) == triangles(expected[2].long()), f"{what}: other triangles"


def dense_grid(case: Case, resolution: int) -> cubes.Grid:
    """All cubes of the case's grid, with weights or without (then as if the network had given zeros)."""
    size, scale = resolution + 1, case.data["args"]["weight_scale"]
    axis = torch.arange(size)
    vertices = torch.cartesian_prod(axis, axis, axis)
    index = torch.cartesian_prod(axis[:-1], axis[:-1], axis[:-1])
    x, y, z = (index[:, None] + torch.tensor(CORNERS)).unbind(-1)
    raw = {"beta": (12,), "alpha": (8,), "gamma": ()}
    given = [
        case[f"in.{name}"] if case.data["args"]["weights"] else torch.zeros(len(index), *shape)
        for name, shape in raw.items()
    ]
    return cubes.Grid(
        resolution,
        index,
        (x * size + y) * size + z,
        case["in.sdf"],
        cubes.deformed(vertices, case["in.deform"], resolution),
        case["in.colors_logits"].sigmoid(),
        *cubes.activate(*given, scale=scale),
    )


def flexicubes(case: Case) -> None:
    """The surface of a dense grid, and the regulariser, whose rows come in another order."""
    arguments = case.data["args"]
    surface = cubes.extract(dense_grid(case, arguments["res"]), centres=arguments["training"])
    assert surface.attributes is not None
    found = (surface.vertices, surface.attributes, surface.faces)
    same_surface(case, found, (case["out.vertices"], case["out.colors"], case["out.faces"]), "surface")
    case.close(surface.deviation.sort().values, case["out.L_dev"].sort().values, "deviation")
    case.close(surface.deviation.mean(), case.data["stats"]["L_dev_mean"], "mean deviation")
