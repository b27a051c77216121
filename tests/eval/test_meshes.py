"""Mesh metrics: measured figures of two spheres, sampling floors, and the soundness of whole and broken meshes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval import meshes
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes

pytest.importorskip("scipy", reason="scipy is not installed")


def test_two_spheres_against_the_measured_figures():
    """Radii 0.50 and 0.51, 20,000 points: figures measured with trimesh and scipy on icospheres of 5,120 faces."""
    one, other = shapes.icosphere(0.50, 5), shapes.icosphere(0.51, 5)
    with pytest.warns(UserWarning, match=r"tau=0\.005 is below twice the sampling floor"):
        rows = meshes.compare(one, other, taus=(0.005, 0.02))
    assert rows["CD-L2"].value == pytest.approx(3.01e-4, rel=0.02)
    assert rows["CD-L1"].value == pytest.approx(0.0121, rel=0.02)
    assert rows["F@0.02"].value == pytest.approx(0.998, abs=0.003) and rows["F@0.005"].value == 0
    assert rows["normal consistency"].value == pytest.approx(0.9996, abs=2e-4)
    # Two drawings of one surface: 0.5 sqrt(area / n), and what comes of it.
    assert rows["CD-L1"].floor == pytest.approx(0.5 * math.sqrt(4 * math.pi * 0.51**2 / 20_000), rel=0.02)
    assert rows["CD-L2"].floor == pytest.approx(2 * 5.1e-5 * 0.51**2 / 0.5**2, rel=0.03)
    assert rows["F@0.005"].floor == pytest.approx(0.38, abs=0.02)


def test_the_distance_of_a_mesh_from_itself_is_its_floor():
    mesh = shapes.cube(0.4)
    rows = meshes.compare(mesh, mesh, points=4000, taus=(0.05,), seed=3)
    for row in rows.values():
        assert row.value == pytest.approx(row.floor, rel=0.05) and row.n_gen == row.n_ref == 4000 and row.seed == 3
    again = meshes.compare(mesh, mesh, points=4000, taus=(0.05,), seed=3)
    assert again == rows
    assert meshes.compare(mesh, mesh, points=4000, taus=(0.05,), seed=4) != rows


def test_a_missing_half_lowers_recall_alone():
    """One of two equal squares: precision 1, recall a half, so F = 2/3; the mean distances say which side is far."""
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    both = Mesh(torch.cat([square, square + torch.tensor([0, 0, 3.0])]), torch.cat([faces, faces + 4]))
    rows = meshes.compare(Mesh(square, faces), both, points=4000, taus=(0.2,))
    assert rows["F@0.2"].value == pytest.approx(2 / 3, abs=0.02)
    assert rows["CD-L1"].value == pytest.approx(0.75, abs=0.03) and rows["CD-L2"].value == pytest.approx(4.5, abs=0.15)
    assert rows["normal consistency"].value == pytest.approx(1)


def test_normal_consistency_sees_a_turned_surface_and_not_its_side():
    square = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) / 2
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    angle = math.radians(30)
    turn = torch.tensor([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    flat, tilted = Mesh(square, faces), Mesh(square @ turn.T, faces.flip(1))
    rows = meshes.compare(flat, tilted, points=1000, taus=())
    assert rows["normal consistency"].value == pytest.approx(math.cos(angle), abs=1e-5)


def test_points_are_uniform_by_area():
    """A thin and a wide triangle: shares by area, and within each the mean is its centre."""
    vertices = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 1, 0], [5, 0, 0], [6, 0, 0], [5, 1, 0]])
    points, normals = meshes.sample(Mesh(vertices, torch.tensor([[0, 1, 2], [3, 4, 5]])), 20_000)
    left = points[:, 0] < 4
    assert left.double().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.allclose(points[left].mean(0), torch.tensor([1, 1 / 3, 0]).double(), atol=0.02)
    assert (points[left, 0] / 3 + points[left, 1] <= 1 + 1e-9).all() and (points >= 0).all()
    assert torch.equal(normals, torch.tensor([0.0, 0, 1]).double().expand(20_000, 3))


def test_soundness_of_whole_meshes():
    sphere = meshes.soundness(shapes.icosphere(0.5, 5))
    assert (sphere.watertight, sphere.wound, sphere.euler, sphere.parts, sphere.degenerate) == (True, True, 2, 1, 0)
    assert sphere.volume == pytest.approx(0.52360, rel=0.004)
    assert float(shapes.icosphere(0.5, 5).areas.sum()) == pytest.approx(3.1378, rel=0.002)
    torus = meshes.soundness(shapes.surface(shapes.torus(shapes.corners(20))))
    assert torus.watertight and torus.wound and torus.euler == 0


def test_soundness_of_broken_meshes():
    cube = shapes.cube()
    opened = meshes.soundness(cube.subset(torch.arange(11)))
    assert not opened.watertight and opened.wound and opened.volume is None and opened.euler == 1
    turned = cube.faces.clone()
    turned[4] = turned[4].flip(0)
    badly = meshes.soundness(Mesh(cube.vertices, turned))
    assert badly.watertight and not badly.wound and badly.volume is None
    inside_out = meshes.soundness(Mesh(cube.vertices, cube.faces.flip(1)))
    assert inside_out.wound and inside_out.volume == pytest.approx(-(0.8**3))
    two = Mesh(torch.cat([cube.vertices, cube.vertices + 2]), torch.cat([cube.faces, cube.faces + 8]))
    assert (meshes.soundness(two).parts, meshes.soundness(two).euler) == (2, 4)
    flat = Mesh(torch.cat([cube.vertices, cube.vertices[:1]]), torch.cat([cube.faces, torch.tensor([[0, 8, 1]])]))
    assert meshes.soundness(flat).degenerate == 1 and not meshes.soundness(flat).watertight
    fin = Mesh(torch.cat([cube.vertices, torch.zeros(1, 3)]), torch.cat([cube.faces, torch.tensor([[0, 1, 8]])]))
    assert not meshes.soundness(fin).watertight and not meshes.soundness(fin).wound


def test_bad_meshes_are_told_in_one_line():
    cube = shapes.cube()
    with pytest.raises(UserError, match="reference: a mesh with no faces"), warnings.catch_warnings():
        meshes.compare(cube, Mesh(cube.vertices, cube.faces[:0]))
    with pytest.raises(UserError, match="NaN"):
        meshes.soundness(Mesh(cube.vertices * torch.nan, cube.faces))
