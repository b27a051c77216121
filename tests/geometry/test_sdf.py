"""A mesh's distances on a grid: exact near the surface, with the right sign, and what has no inside is refused."""

from __future__ import annotations

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval.meshes import compare
from fastgen.geometry import sdf
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes


def test_distance_from_a_triangle_against_many_points_of_it():
    generator = torch.Generator().manual_seed(0)
    triangles, points = torch.randn(60, 3, 3, generator=generator), 2 * torch.randn(60, 3, generator=generator)
    triangles[:3, 2] = triangles[:3, 1]  # degenerate: an edge
    triangles[3] = triangles[3, :1]  # and a point
    steps = torch.linspace(0, 1, 101)
    u, v = torch.cartesian_prod(steps, steps).T
    u, v = u[u + v <= 1.0001], v[u + v <= 1.0001]
    a, b, c = (triangles[:, i, None] for i in range(3))
    there = a + u[:, None] * (b - a) + v[:, None] * (c - a)
    brute = (there - points[:, None]).norm(dim=-1).amin(1)
    found = sdf.point_triangle_distance(points, triangles)
    assert (found <= brute + 1e-5).all() and (brute - found < 0.06).all()
    assert torch.allclose(found[3], (points[3] - triangles[3, 0]).norm())


def test_distances_are_exact_in_the_band_and_cut_off_beyond():
    mesh, at = shapes.cube(0.3), shapes.corners(16)
    truth = shapes.box(at, (0.3, 0.3, 0.3))
    found = sdf.signed_distance(mesh, 16, band=2.5)
    assert torch.allclose(found, truth.clamp(-2.5 / 16, 2.5 / 16), atol=1e-6)
    assert found.dtype == torch.float32 and found.shape == (17, 17, 17)


def test_chunks_change_nothing(monkeypatch):
    mesh = shapes.icosphere(0.33, 2)
    whole = sdf.signed_distance(mesh, 12)
    monkeypatch.setattr(sdf, "PAIRS", 1000)
    assert torch.equal(sdf.signed_distance(mesh, 12), whole)


def test_a_winding_number_counts_the_surfaces_around_a_point():
    sphere = shapes.icosphere(0.4, 2)
    inner = shapes.icosphere(0.2, 2)
    twice = Mesh(torch.cat([sphere.vertices, inner.vertices]), torch.cat([sphere.faces, inner.faces + 66]))
    assert len(sphere.vertices) == 66
    points = torch.tensor([[0.0, 0.05, 0.02], [0.3, 0, 0.01], [0.45, 0, 0.3]])
    assert torch.allclose(sdf.winding_number(twice, points), torch.tensor([2.0, 1.0, 0.0]).double(), atol=1e-9)
    half = sphere.subset(sphere.triangles.mean(1)[:, 2] > 0)
    assert sdf.winding_number(half, torch.zeros(1, 3)).item() == pytest.approx(0.5, abs=1e-6)
    assert len(sdf.winding_number(sphere, torch.zeros(0, 3))) == 0


@pytest.mark.parametrize("solid", ["torus", "box", "cavity", "inside out"])
def test_signs_are_those_of_every_point_by_itself(solid):
    """Groups of points that share a winding number, against the winding number of each point."""
    if solid in ("torus", "box"):
        mesh = shapes.surface(getattr(shapes, solid)(shapes.corners(10)))
    else:
        outer, inner = shapes.icosphere(0.41, 2), shapes.icosphere(0.23, 2)
        mesh = Mesh(torch.cat([outer.vertices, inner.vertices]), torch.cat([outer.faces, inner.faces.flip(1) + 66]))
        mesh = mesh if solid == "cavity" else Mesh(mesh.vertices, mesh.faces.flip(1))
    found = sdf.signed_distance(mesh, 11)
    alone = sdf.winding_number(mesh, shapes.corners(11).reshape(-1, 3)).abs() > 0.5
    assert 0.02 < alone.double().mean() < 0.6
    assert torch.equal(found.flatten() < 0, alone)


def test_what_has_no_inside_is_refused_in_one_line_or_becomes_a_shell():
    sphere = shapes.icosphere(0.35, 3)
    bowl = sphere.subset(sphere.triangles.mean(1)[:, 2] < 0.1)
    with pytest.raises(UserError, match=r"not closed .* edges have no counterpart") as error:
        sdf.signed_distance(bowl, 16)
    assert "\n" not in str(error.value)
    shell = shapes.surface(sdf.signed_distance(bowl, 24, open_surface="shell"))
    assert shapes.watertight(shell) and shapes.euler(shell) == 2
    assert shell.volume == pytest.approx(2 * float(bowl.areas.sum()) / 24, rel=0.2)
    closed = sdf.signed_distance(sphere, 16, open_surface="shell")  # what has an inside keeps it
    assert torch.equal(closed, sdf.signed_distance(sphere, 16))


def test_bad_meshes_are_told_in_one_line():
    cube = shapes.cube(0.6)
    with pytest.raises(UserError, match="reaches beyond"):
        sdf.signed_distance(cube, 8)
    with pytest.raises(UserError, match="no faces"):
        sdf.signed_distance(Mesh(cube.vertices, cube.faces[:0]), 8)
    with pytest.raises(UserError, match="NaN"):
        sdf.signed_distance(Mesh(cube.vertices * torch.nan, cube.faces), 8)


@pytest.mark.parametrize("solid", ["sphere", "box", "torus"])
def test_solids_come_back_through_flexicubes(solid):
    """Mesh -> distances -> mesh: within 0.35 voxel above the sampling floor, same holes."""
    resolution = 20
    fine = shapes.surface(getattr(shapes, solid)(shapes.corners(30)))
    back = shapes.surface(sdf.signed_distance(fine, resolution))
    rows = compare(back, fine, points=8000, taus=())
    chamfer = rows["CD-L1"]
    assert (chamfer.value - chamfer.floor) * resolution <= 0.35
    assert rows["normal consistency"].value >= 0.95
    assert shapes.watertight(back) and shapes.euler(back) == shapes.euler(fine) == (0 if solid == "torus" else 2)
