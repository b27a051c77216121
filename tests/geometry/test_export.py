"""Meshes and splats as files: opened again by others with the same counts, colours and axes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from fastgen.errors import UserError
from fastgen.geometry import export, gaussian_ply, texture
from fastgen.geometry import mesh as meshes
from fastgen.geometry.gaussian_ply import ReadSplats
from fastgen.geometry.mesh import Mesh
from tests.geometry import shapes

trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")


def coloured(subdivisions: int = 2) -> Mesh:
    sphere = shapes.icosphere(0.4, subdivisions)
    return Mesh(sphere.vertices * torch.tensor([1.0, 0.8, 0.6]), sphere.faces, sphere.vertices + 0.5)


def test_y_up_turns_without_mirroring():
    axes = export.y_up(torch.eye(3))
    assert axes.tolist() == [[1, 0, 0], [0, 0, -1], [0, 1, 0]] and torch.linalg.det(axes) == 1
    assert torch.equal(export.z_up(export.y_up(torch.tensor([[1.0, 2, 3]]))), torch.tensor([[1.0, 2, 3]]))


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_a_mesh_opens_elsewhere_as_it_was(tmp_path, suffix):
    mesh, path = coloured(), tmp_path / f"chair.{suffix}"
    export.save_mesh(path, mesh)
    found = trimesh.load(path, force="mesh", process=False)
    assert found.vertices.shape == mesh.vertices.shape and found.faces.shape == mesh.faces.shape
    assert torch.equal(torch.tensor(found.faces), mesh.faces)
    assert torch.allclose(torch.tensor(found.vertices).float(), export.y_up(mesh.vertices), atol=1e-6)
    assert found.visual.kind == "vertex" and mesh.colours is not None
    colours = torch.tensor(found.visual.vertex_colors[:, :3]).float() / 255
    assert (colours - mesh.colours).abs().max() <= 1 / 255
    assert found.is_watertight and found.volume == pytest.approx(mesh.volume, rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_mesh_without_colours_has_none(tmp_path):
    export.save_mesh(tmp_path / "cube.glb", shapes.cube())
    assert meshes.load(tmp_path / "cube.glb").colours is None


def test_an_unwritable_mesh_leaves_the_old_file(tmp_path):
    path = tmp_path / "cube.glb"
    export.save_mesh(path, shapes.cube())
    before, cube = path.read_bytes(), shapes.cube()
    for broken, message in (
        (Mesh(cube.vertices, cube.faces[:0]), "cube.glb: a mesh with no faces"),
        (Mesh(cube.vertices * torch.nan, cube.faces), "cube.glb: 8 of 8 vertices are NaN"),
    ):
        with pytest.raises(UserError, match=message):
            export.save_mesh(path, broken)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"'\.gbl'; did you mean 'glb'"):
        export.save_mesh(tmp_path / "cube.gbl", cube)
    with pytest.raises(UserError, match="colours per vertex and no texture"):
        export.save_mesh(tmp_path / "cube.ply", cube, texture=64)


# --- textures


def sampled(uv: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Colours at uv, by bilinear filtering as a viewer does it."""
    place = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1)[None, None]
    picture = image.float().movedim(-1, 0)[None] / 255
    return torch.nn.functional.grid_sample(picture, place, align_corners=False, padding_mode="border")[0, :, 0].T


def test_a_texture_shows_the_vertices_colours():
    pytest.importorskip("xatlas")
    mesh = coloured(3)
    baked = texture.bake(mesh, 256)
    assert baked.mesh.faces.shape == mesh.faces.shape and torch.allclose(baked.mesh.triangles, mesh.triangles)
    assert baked.uv.min() >= 0 and baked.uv.max() <= 1 and baked.image.shape == (256, 256, 3)
    assert baked.mesh.colours is not None
    corners = sampled(baked.uv, baked.image)
    assert (corners - baked.mesh.colours).abs().max() < 0.04
    # And within the faces.
    middle = sampled(baked.uv[baked.mesh.faces].mean(1), baked.image)
    assert (middle - baked.mesh.colours[baked.mesh.faces].mean(1)).abs().max() < 0.03


def test_a_texture_may_come_from_a_finer_mesh():
    pytest.importorskip("xatlas")
    fine, coarse = shapes.icosphere(0.4, 4), shapes.icosphere(0.4, 2)
    # Stripes that the coarse mesh's vertices cannot hold.
    stripes = (torch.sin(40 * fine.vertices) + 1) / 2
    baked = texture.bake(coarse, 256, source=Mesh(fine.vertices, fine.faces, stripes))
    points = baked.mesh.triangles.mean(1)
    expected = (torch.sin(40 * points / points.norm(dim=1, keepdim=True) * 0.4) + 1) / 2
    assert (sampled(baked.uv[baked.mesh.faces].mean(1), baked.image) - expected).abs().mean() < 0.08


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_a_textured_file_opens_elsewhere(tmp_path, suffix):
    pytest.importorskip("xatlas")
    mesh, path = coloured(3), tmp_path / f"chair.{suffix}"
    export.save_mesh(path, mesh, texture=256)
    names = {"chair.glb"} if suffix == "glb" else {"chair.obj", "chair.mtl", "chair.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    found = meshes.load(path)
    assert found.vertices.shape == mesh.vertices.shape and found.colours is not None
    match = torch.cdist(export.y_up(mesh.vertices), found.vertices).argmin(1)
    assert mesh.colours is not None and (found.colours[match] - mesh.colours).abs().max() < 0.06


def test_textures_that_cannot_be_are_told_in_one_line():
    pytest.importorskip("xatlas")
    with pytest.raises(UserError, match="needs colours"):
        texture.bake(shapes.cube(), 64)


# --- Gaussian splats


def splats(n: int = 5) -> ReadSplats:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(n, *shape, generator=generator)

    return ReadSplats(draw(3), draw(3), 9 * draw(), draw(3) - 4, draw(4))


def matrix(q: torch.Tensor) -> torch.Tensor:
    """Quaternions (w, x, y, z) of unit length -> rotation matrices."""
    w, x, y, z = q.unbind(1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], 1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], 1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1),
    ]
    return torch.stack(rows, 1)


def test_splats_come_back(tmp_path):
    given, path = splats(), tmp_path / "chair.ply"
    gaussian_ply.save_gaussians(path, given, turned=False)
    found = gaussian_ply.load_gaussians(path)
    for field in dataclasses.fields(ReadSplats):
        assert torch.equal(getattr(found, field.name), getattr(given, field.name)), field.name
    shaped = dataclasses.replace(
        given, features_dc=given.features_dc[:, None], opacity_logit=given.opacity_logit[:, None]
    )
    before = path.read_bytes()
    gaussian_ply.save_gaussians(path, shaped, turned=False)
    assert path.read_bytes() == before


def test_splats_lie_in_the_common_layout(tmp_path):
    """Read by another program: names, order, and what is a logarithm or a logit."""
    given, path = splats(), tmp_path / "chair.ply"
    gaussian_ply.save_gaussians(path, given, turned=False)
    rows = trimesh.load(path).metadata["_ply_raw"]["vertex"]["data"]
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    assert " ".join(rows.dtype.names) == names
    values = {name: torch.tensor(rows[name].copy()) for name in rows.dtype.names}
    assert torch.equal(values["y"], given.xyz[:, 1]) and not values["nx"].any()
    assert torch.equal(values["f_dc_1"], given.features_dc[:, 1])
    assert torch.equal(values["opacity"], given.opacity_logit)
    assert torch.equal(values["scale_2"], given.log_scales[:, 2])
    assert torch.equal(values["rot_3"], given.unnormalised_rotation[:, 3])


def test_splats_are_turned_with_their_rotations(tmp_path):
    given, path = splats(), tmp_path / "chair.ply"
    gaussian_ply.save_gaussians(path, given)
    found = gaussian_ply.load_gaussians(path)
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert torch.allclose(found.xyz, given.xyz @ turn.T, atol=1e-6)
    before = matrix(torch.nn.functional.normalize(given.unnormalised_rotation, dim=1))
    assert torch.allclose(matrix(found.unnormalised_rotation), turn @ before, atol=1e-5)
    assert torch.equal(found.log_scales, given.log_scales)


def test_splats_that_are_broken_are_told_in_one_line(tmp_path):
    given, path = splats(), tmp_path / "chair.ply"
    for name, value in (("xyz", torch.nan), ("log_scales", -torch.inf)):
        broken = dataclasses.replace(given, **{name: torch.full_like(getattr(given, name), value)})
        with pytest.raises(UserError, match="5 of 5 splats are NaN, infinite or of no size; nothing was written"):
            gaussian_ply.save_gaussians(path, broken)
    with pytest.raises(UserError, match="no splats to write"):
        gaussian_ply.save_gaussians(path, splats(0))
    with pytest.raises(ValueError, match="18 numbers per splat"):
        gaussian_ply.save_gaussians(path, dataclasses.replace(given, features_dc=torch.zeros(5, 4)))
    assert not path.exists()
    gaussian_ply.save_gaussians(path, given)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="336 bytes for 5 splats of 17 numbers"):
        gaussian_ply.load_gaussians(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: not a \.ply of Gaussian splats"):
        gaussian_ply.load_gaussians(tmp_path / "x.png")
    with pytest.raises(UserError, match="no such file"):
        gaussian_ply.load_gaussians(tmp_path / "absent.ply")
