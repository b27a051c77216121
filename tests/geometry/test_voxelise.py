"""Surface voxels against triangles clipped by each cube."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastgen.errors import UserError
from fastgen.geometry import voxelise
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes


def clipped(polygon: list[list[float]], low: list[float], size: float) -> list[list[float]]:
    """What is left of a polygon within a cube, by Sutherland and Hodgman."""
    for axis, sign in itertools.product(range(3), (-1, 1)):
        limit = low[axis] if sign < 0 else low[axis] + size
        out = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            dp, dq = sign * (p[axis] - limit), sign * (q[axis] - limit)
            if dp <= 0:
                out.append(p)
            if dp * dq < 0:
                out.append([a + (b - a) * dp / (dp - dq) for a, b in zip(p, q, strict=True)])
        polygon = out
    return polygon


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_cubes_in_which_something_of_the_triangle_is_left(seed):
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.4, 0.05):
        middle = 0.5 * torch.rand(8, 1, 3, generator=generator) - 0.25
        triangles = (middle + scale * torch.randn(8, 3, 3, generator=generator)).clamp(-0.49, 0.49)
        for triangle in triangles:
            found = voxelise.surface_voxels(Mesh(triangle, torch.tensor([[0, 1, 2]])), 4)
            cells = itertools.product(range(4), repeat=3)
            expected = [list(c) for c in cells if clipped(triangle.tolist(), [i / 4 - 0.5 for i in c], 0.25)]
            assert found.tolist() == expected


def test_a_triangle_in_the_plane_between_voxels_touches_both_sides():
    flat = torch.tensor([[-0.2, -0.2, 0.0], [-0.1, -0.2, 0.0], [-0.2, -0.1, 0.0]])
    assert voxelise.surface_voxels(Mesh(flat, torch.tensor([[0, 1, 2]])), 2).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_only_the_surface_and_all_of_it():
    """A cube within 8^3: two layers of voxels that its faces cross, nothing inside."""
    found = voxelise.surface_voxels(shapes.cube(0.3), 8)  # its faces lie in voxels 1 and 6
    inner = ((found > 1) & (found < 6)).all(1)
    assert len(found) == 6**3 - 4**3 and not inner.any() and found.dtype == torch.int32
    centres = voxelise.voxel_centres(found, 8)
    assert torch.allclose(centres.amin(0), torch.full((3,), -0.3125)) and centres.abs().max() < 0.5


def test_vertices_on_the_faces_of_the_unit_cube_are_kept_within():
    found = voxelise.surface_voxels(shapes.cube(0.5), 4)
    assert len(found) == 4**3 - 2**3 and found.min() == 0 and found.max() == 3


def test_bad_meshes_are_told_in_one_line():
    cube = shapes.cube(0.6)
    with pytest.raises(UserError, match="reaches beyond"):
        voxelise.surface_voxels(cube)
    with pytest.raises(UserError, match="no faces"):
        voxelise.surface_voxels(Mesh(cube.vertices, cube.faces[:0]))
