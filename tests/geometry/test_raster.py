"""The rasteriser against an analytic sphere and a ray-traced cube; cameras; pictures and GIFs."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.errors import RunFailed, UserError
from fastgen.geometry import cameras, raster, views
from fastgen.geometry.cameras import Camera
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes


def rays(camera: Camera) -> torch.Tensor:
    """Directions through the pixels' centres whose part along the axis is 1, [S, S, 3], float64."""
    right, down, forward = camera.axes
    place = (torch.arange(camera.size, dtype=torch.float64) + 0.5 - camera.size / 2) / camera.focal
    return forward + place[None, :, None] * right + place[:, None, None] * down


def test_a_camera_sees_up_above_and_right_on_the_right():
    camera = Camera(eye=(0, -2, 0), fov=90, size=100)
    seen = camera.project(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1], [1, -1, 0], [0, -3, 0]]))
    expected = [[50, 50, 2], [75, 50, 2], [50, 25, 2], [100, 50, 1]]
    assert torch.allclose(seen[:4], torch.tensor(expected).double()) and seen[4, 2] < 0
    from_above = Camera(eye=(0, 0, 2), fov=90, size=100).project(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert torch.allclose(from_above, torch.tensor([[75.0, 50, 2], [50, 25, 2]]).double())
    axes = cameras.looking_in(0.7, 0.4).axes
    assert torch.allclose(axes @ axes.T, torch.eye(3).double()) and torch.linalg.det(axes) == pytest.approx(1)


def test_cameras_stand_around_and_all_over():
    ring = cameras.orbit(4, pitch=0.0)
    assert torch.allclose(torch.tensor([c.eye for c in ring[:2]]), torch.tensor([[0.0, -2, 0], [2, 0, 0]]), atol=1e-6)
    assert [cameras.radical_inverse(i, 2) for i in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]
    eyes = torch.tensor([c.eye for c in cameras.sphere(400, offset=(0.5, 0.3))])
    assert torch.allclose(eyes.norm(dim=1), torch.full((400,), 2.0)) and eyes.mean(0).abs().max() < 0.02
    assert torch.allclose(eyes.T @ eyes / 400, 4 / 3 * torch.eye(3), atol=0.05)
    first = cameras.sphere(4)[0]
    assert first.eye[2] == pytest.approx(-2)


def test_a_sphere_has_its_analytic_depth_and_normals():
    radius, camera = 0.5, cameras.looking_in(0.6, 0.5, size=96)
    mesh = shapes.icosphere(radius, 5)
    found = raster.rasterise(mesh, camera)
    direction, eye = rays(camera), torch.tensor(camera.eye, dtype=torch.float64)
    a, b, c = direction.square().sum(-1), direction @ eye, eye @ eye - radius**2
    square = b * b - a * c
    hit = square > 0
    clear = (square / (b * b)).abs() > 4e-3  # at the very edge the facets fall short of the sphere
    assert torch.equal(found.covered[clear], hit[clear]) and hit.double().mean() > 0.2
    both = found.covered & hit & clear
    depth = (-b - square.clamp(min=0).sqrt()) / a
    assert (found.depth[both] - depth[both]).abs().max() < 4e-3
    point = eye + depth[..., None] * direction
    normal = found.interpolate(mesh.faces, mesh.vertex_normals)
    assert ((normal * point / radius).sum(-1)[both] > 0.999).all()
    assert torch.isinf(found.depth[~found.covered]).all() and (found.face[~found.covered] == -1).all()


@pytest.mark.parametrize(("yaw", "pitch", "radius"), [(0.3, 0.4, 2.0), (2.0, -0.9, 1.0), (0.0, 0.0, 1.2)])
def test_a_cube_is_what_rays_find(yaw, pitch, radius):
    """Depth, face, and colours that are linear in space: so the interpolation is perspective-correct."""
    half, camera = 0.3, cameras.looking_in(yaw, pitch, radius=radius, size=64)
    mesh = shapes.cube(half)
    found = raster.rasterise(mesh, camera)
    direction, eye = rays(camera), torch.tensor(camera.eye, dtype=torch.float64)
    # Slabs: a ray enters the cube at the latest of its three entries.
    planes = (torch.tensor([-half, half]).double()[:, None, None, None] - eye) / direction
    enter, leave = planes.amin(0), planes.amax(0)
    depth, axis = enter.max(-1)
    margin = leave.amin(-1) - depth
    clear = margin.abs() > 1e-9
    assert torch.equal(found.covered[clear], (margin > 0)[clear])
    both = found.covered & (margin > 1e-9)
    assert both.sum() > 100 and torch.allclose(found.depth[both].double(), depth[both], atol=1e-6)
    normals = torch.nn.functional.normalize(mesh.face_normals, dim=1)[found.face[both]].abs()
    second = enter.sort(-1).values[..., 1][both]
    apart = depth[both] - second > 1e-6  # on an edge either face will do
    assert torch.equal(normals.argmax(1)[apart], axis[both][apart])
    place = found.interpolate(mesh.faces, mesh.vertices)[both]
    assert torch.allclose(place.double(), (eye + depth[..., None] * direction)[both], atol=1e-6)
    assert torch.allclose(found.weights[both].sum(-1), torch.ones(int(both.sum())))


def test_the_nearest_triangle_wins_and_nothing_shows_between_neighbours():
    """Pixel centres exactly on common edges and corners; a larger square behind."""
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9)).double()
    quads = torch.tensor([(i, i + 1, i + 10, i + 9) for i in range(80) if i % 9 < 8 and i < 72])
    faces = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    near = torch.cat([grid + 0.5, torch.ones(81, 1)], 1)
    far = torch.tensor([[-5.0, -5, 2], [50, -5, 2], [-5, 50, 2]]).double()
    found = raster.cover(torch.cat([near, far]), torch.cat([torch.tensor([[81, 82, 83]]), faces]), 12, 12)
    assert (found.face[:9, :9] > 0).all() and (found.face[10:, 10:] == 0).all()
    assert (found.depth[:9, :9] == 1).all() and (found.depth[10:, 10:] == 2).all()


def test_chunks_change_nothing(monkeypatch):
    mesh, camera = shapes.icosphere(0.4, 2), cameras.looking_in(0.1, 0.2, size=40)
    whole = raster.rasterise(mesh, camera)
    monkeypatch.setattr(raster, "PAIRS", 100)
    part = raster.rasterise(mesh, camera)
    assert torch.equal(whole.face, part.face) and torch.equal(whole.weights, part.weights)


def test_triangles_behind_the_camera_are_left_out():
    mesh = shapes.cube(0.3)
    behind = Mesh(
        torch.cat([mesh.vertices, mesh.vertices - torch.tensor([0.0, 4, 0])]), torch.cat([mesh.faces + 8, mesh.faces])
    )
    camera = Camera(eye=(0, -2, 0), size=32)
    alone, found = raster.rasterise(mesh, camera), raster.rasterise(behind, camera)
    assert torch.equal(found.depth, alone.depth) and (found.face[found.covered] >= 12).all()
    empty = raster.rasterise(Mesh(mesh.vertices - torch.tensor([0.0, 4, 0]), mesh.faces), camera)
    assert not empty.covered.any() and empty.face.shape == (32, 32)


def test_nvdiffrast_is_taken_by_name_and_refused_where_it_is_not(monkeypatch):
    mesh, camera = shapes.cube(0.3), cameras.looking_in(0.4, 0.3, size=48)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    with pytest.raises(UserError, match="CUDA device only"):
        raster.rasterise(mesh, camera, backend="nvdiffrast")
    projected = camera.project(mesh.vertices)
    with pytest.raises(UserError, match="needs the package 'nvdiffrast'"):
        raster._by_nvdiffrast(projected, mesh.faces, 48)

    def rasterize(context, clip, faces, size):
        """Its documented answer: weights of the first two corners, z / w, number + 1; row 0 at y = -1."""
        assert clip.dtype == torch.float32 and faces.dtype == torch.int32
        x, y, z, w = clip[0].double().unbind(1)
        assert (z.abs() <= w).all()
        place = torch.stack([(x / w + 1) / 2 * size[1], (y / w + 1) / 2 * size[0], w], 1)
        found = raster.cover(place, faces.long(), *size)
        return torch.stack([found.weights[..., 0], found.weights[..., 1], found.depth, found.face + 1.0], -1)[
            None
        ], None

    fake = SimpleNamespace(rasterize=rasterize, RasterizeCudaContext=lambda: None)
    monkeypatch.setitem(sys.modules, "nvdiffrast", SimpleNamespace(torch=fake))
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", fake)
    found, own = raster._by_nvdiffrast(projected, mesh.faces, 48), raster.rasterise(mesh, camera)
    assert (found.face == own.face).double().mean() > 0.999
    both = found.covered & own.covered & (found.face == own.face)
    assert torch.allclose(found.depth[both], own.depth[both], atol=1e-5)
    assert torch.allclose(found.weights[both], own.weights[both], atol=1e-4)
    assert torch.isinf(found.depth[~found.covered]).all()


def test_views_of_a_coloured_cube():
    mesh = shapes.cube(0.3)
    mesh = Mesh(mesh.vertices, mesh.faces, torch.tensor([[0.8, 0.4, 0.2]]).expand(8, 3))
    view = views.render(mesh, Camera(eye=(0, -2, 0), size=64), smooth=False)
    middle = (32, 32)
    assert torch.allclose(view.colour[middle], torch.tensor([0.8, 0.4, 0.2])) and view.alpha[middle] == 1
    assert torch.allclose(view.shaded[middle], view.colour[middle])  # the light comes from the camera
    assert torch.allclose(view.normal[middle], torch.tensor([0.0, -1, 0])) and view.depth[middle] == pytest.approx(1.7)
    assert view.alpha[0, 0] == 0 and torch.isinf(view.depth[0, 0])
    assert torch.equal(view.picture("colour")[0, 0], torch.ones(3))
    assert torch.allclose(view.picture("normal")[middle], torch.tensor([0.5, 0, 0.5]), atol=1e-6)
    depth = views.render(mesh, cameras.looking_in(0.8, 0.0, size=64)).picture("depth", background=0.5)
    column = depth[32, :, 0]
    assert column.max() == 1 and column.min() < 0.1 and column[0] == 0.5  # an edge in front, the sides further back
    grey = views.render(shapes.cube(0.3), Camera(eye=(0, -2, 0), size=16)).colour[8, 8]
    assert torch.allclose(grey, torch.full((3,), views.GREY))


def test_edges_are_averaged_over_samples():
    mesh, camera = shapes.icosphere(0.4, 4), cameras.looking_in(0.0, 0.0, size=32)
    view = views.render(mesh, camera, finer=4)
    # The picture of a sphere is a disc: tan of its angular radius times the focal length.
    disc = math.pi * (camera.focal * math.tan(math.asin(0.4 / 2))) ** 2
    assert float(view.alpha.sum()) == pytest.approx(disc, rel=0.005)
    partial = (view.alpha > 0) & (view.alpha < 1)
    assert partial.any() and torch.isfinite(view.depth[partial]).all()
    assert torch.allclose(view.colour[partial], torch.full((3,), views.GREY), atol=1e-5)


def test_a_turntable_is_a_gif_that_opens(tmp_path):
    mesh = shapes.cube(0.3)
    mesh = Mesh(mesh.vertices, mesh.faces, mesh.vertices / 0.6 + 0.5)
    pictures = views.turntable(mesh, frames=3, size=40)
    assert pictures.shape == (3, 40, 40, 3) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures[0], pictures[1]) and (pictures[:, 0, 0] == 255).all()
    views.save_gif(tmp_path / "turn.gif", pictures, milliseconds=50)
    with Image.open(tmp_path / "turn.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (40, 40) and gif.info["duration"] == 50 and gif.info["loop"] == 0
        gif.seek(1)
        shown = torch.frombuffer(bytearray(gif.convert("RGB").tobytes()), dtype=torch.uint8).reshape(40, 40, 3)
    assert (shown.int() - pictures[1].int()).abs().float().mean() < 4
    assert [p.name for p in tmp_path.iterdir()] == ["turn.gif"]
    with pytest.raises(RunFailed, match="no pictures"):
        views.save_gif(tmp_path / "none.gif", [])
    with pytest.raises(UserError, match="no faces"):
        views.turntable(Mesh(mesh.vertices, mesh.faces[:0]))
