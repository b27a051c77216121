"""Mesh: reading, checking, welding, parts, holes, simplification."""

from __future__ import annotations

import pytest
import torch

from fastgen.errors import UserError
from fastgen.geometry import mesh as meshes
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes


def without(mesh: Mesh, *faces: int) -> Mesh:
    return mesh.subset(torch.tensor([f for f in range(len(mesh.faces)) if f not in faces]))


def joined(one: Mesh, other: Mesh) -> Mesh:
    return Mesh(torch.cat([one.vertices, other.vertices]), torch.cat([one.faces, other.faces + len(one.vertices)]))


def test_what_is_broken_is_told_in_one_line():
    good = shapes.cube()
    assert meshes.check(good) is good
    bad = good.vertices.clone()
    bad[5, 1] = torch.nan
    for broken, message in (
        (Mesh(good.vertices, good.faces[:0]), r"chair: a mesh with no faces \(8 vertices\)"),
        (Mesh(bad, good.faces), r"chair: 1 of 8 vertices are NaN or infinite \(the first is number 5\)"),
        (Mesh(good.vertices, good.faces + 1), "chair: a face names a vertex beyond the 8"),
        (Mesh(good.vertices, good.faces - 1), "chair: a face names a vertex beyond the 8"),
    ):
        with pytest.raises(UserError, match=message) as error:
            meshes.check(broken, "chair")
        assert "\n" not in str(error.value)


def test_areas_normals_and_volume_of_a_cube():
    mesh = shapes.cube(0.5)
    assert mesh.areas.sum() == pytest.approx(6) and mesh.volume == pytest.approx(1)
    assert Mesh(mesh.vertices, mesh.faces.flip(1)).volume == pytest.approx(-1)
    outward = (mesh.vertex_normals * mesh.vertices).sum(1)
    assert (outward > 0.7).all() and torch.allclose(mesh.vertex_normals.norm(dim=1), torch.ones(8))


def test_a_file_is_read_with_its_seams_welded(tmp_path):
    pytest.importorskip("trimesh")
    mesh, path = shapes.cube(), tmp_path / "cube.obj"
    corners = mesh.vertices[mesh.faces.flatten()].tolist()  # three vertices of its own for every face
    lines = [f"v {x} {y} {z} {x + 0.5:.3f} 0.25 1.0" for x, y, z in corners]
    lines += [f"f {i} {i + 1} {i + 2}" for i in range(1, len(corners), 3)]
    path.write_text("\n".join(lines))
    found = meshes.load(path)
    assert found.vertices.shape == (8, 3) and found.faces.shape == (12, 3) and meshes.is_closed(found)
    assert found.volume == pytest.approx(mesh.volume, rel=1e-6)
    assert found.colours is not None
    expected = torch.stack([found.vertices[:, 0] + 0.5, torch.full((8,), 0.25), torch.ones(8)], 1)
    assert torch.allclose(found.colours, expected, atol=0.6 / 255)


def test_files_that_hold_no_mesh_are_told_in_one_line(tmp_path):
    pytest.importorskip("trimesh")
    texts = {
        "points.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no faces"),
        "nan.obj": ("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
        "broken.glb": ("not a mesh", "not readable as a mesh"),
        "text.xyz1": ("hello", "not readable as a mesh"),
    }
    for name, (text, message) in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as error:
            meshes.load(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        meshes.load(tmp_path / "absent.obj")


def test_welding_joins_equal_places_and_drops_what_collapses():
    vertices = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [-0.0, 0, 0], [1, 1, 0]])
    mesh = Mesh(vertices, torch.tensor([[0, 1, 2], [3, 4, 2], [0, 3, 1]]), vertices.abs() / 2)
    welded = meshes.weld(mesh)
    assert welded.vertices.shape == (4, 3) and welded.faces.shape == (2, 3)
    assert welded.colours is not None and torch.equal(welded.colours, welded.vertices.abs() / 2)
    assert torch.allclose(welded.triangles, mesh.triangles[:2])


def test_fit_centres_and_keeps_the_proportions():
    mesh = shapes.cube(1.0)
    moved = meshes.fit(Mesh(mesh.vertices * torch.tensor([1.0, 2.0, 0.5]) + 7, mesh.faces), 0.45)
    assert torch.allclose(moved.vertices.amax(0), torch.tensor([0.225, 0.45, 0.1125]))
    assert torch.allclose(moved.vertices.amin(0), -torch.tensor([0.225, 0.45, 0.1125]))
    with pytest.raises(UserError, match="one point"):
        meshes.fit(Mesh(torch.ones(3, 3), torch.tensor([[0, 1, 2]])))


def test_closed_means_every_edge_has_its_counterpart():
    mesh = shapes.cube()
    assert meshes.is_closed(mesh) and not meshes.is_closed(without(mesh, 3))
    turned = mesh.faces.clone()
    turned[0] = turned[0].flip(0)
    assert not meshes.is_closed(Mesh(mesh.vertices, turned))


def test_small_parts_go_and_the_largest_stays():
    mesh = joined(shapes.cube(0.4), shapes.icosphere(0.02, 1))
    labels = meshes.component_labels(mesh)
    assert labels.unique().tolist() == [0, 1] and len(labels[:12].unique()) == len(labels[12:].unique()) == 1
    assert len(meshes.drop_small_parts(mesh, 0.01).faces) == 12
    assert len(meshes.drop_small_parts(mesh, 1e-4).faces) == len(mesh.faces)
    assert len(meshes.drop_small_parts(mesh, 2.0).faces) == 12
    cleaned = meshes.clean(mesh, smallest_part=0.01)
    assert cleaned.vertices.shape == (8, 3)


def test_holes_are_filled_up_to_a_length():
    whole = shapes.icosphere(0.4, 2)
    around = (whole.faces == 2).any(1).nonzero()[:, 0].tolist()  # all faces at the pole: a rim of as many edges
    mesh = without(whole, *around, int((whole.faces == 5).any(1).nonzero()[0]))
    mesh = Mesh(mesh.vertices, mesh.faces, mesh.vertices + 0.5)
    assert sorted(map(len, meshes.boundary_loops(mesh))) == [3, len(around)]
    small = meshes.fill_holes(mesh, 3)
    assert not meshes.is_closed(small) and len(small.faces) == len(mesh.faces) + 3
    full = meshes.clean(mesh, largest_hole=len(around))
    assert shapes.watertight(full) and shapes.euler(full) == 2
    assert full.volume == pytest.approx(whole.volume, rel=0.02)
    assert full.colours is not None and torch.allclose(full.colours, full.vertices + 0.5)
    assert meshes.fill_holes(whole, 100) is whole


def test_rims_that_touch_in_a_vertex_are_left_alone():
    whole = shapes.icosphere(0.4, 1)
    at_pole = (whole.faces == 0).any(1).nonzero()[:, 0]
    middles = whole.triangles[at_pole].mean(1)
    opposite = (middles[0, 1:] @ middles[:, 1:].T).argmin()
    mesh = without(whole, int(at_pole[0]), int(at_pole[opposite]))
    assert not any(0 in loop for loop in meshes.boundary_loops(mesh))
    assert meshes.fill_holes(mesh, 10) is mesh


def test_simplification_keeps_shape_and_colours():
    pytest.importorskip("fast_simplification")
    whole = shapes.icosphere(0.4, 4)
    mesh = Mesh(whole.vertices, whole.faces, whole.vertices + 0.5)
    simple = meshes.clean(mesh, faces=500)
    assert 400 <= len(simple.faces) <= 520 and shapes.watertight(simple)
    assert simple.volume == pytest.approx(whole.volume, rel=0.03)
    assert simple.colours is not None and (simple.colours - simple.vertices - 0.5).abs().max() < 0.05
    assert meshes.simplify(mesh, 10**6) is mesh
    with pytest.raises(UserError, match="no solid has fewer than 4"):
        meshes.simplify(mesh, 3)
