"""Meshes to latents: the recipe against analytic cameras and the encoders alone, and the command."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgen import files, latents
from fastgen.data.shapes import LatentShapes, file_of
from fastgen.errors import UserError
from fastgen.geometry import voxelise
from fastgen.geometry.cameras import Camera, looking_in
from fastgen.geometry.export import save_mesh
from fastgen.geometry.mesh import Mesh
from fastgen.latents import Encoders
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.flows import TEXT
from fastgen.teachers.trellis.folder import TrellisFolder
from fastgen.zoo import trellis
from tests.commands import call, tree_bytes
from tests.geometry import shapes

pytest.importorskip("trimesh", reason="trimesh is not installed")
FEW = {"views": 2, "size": 24}
GRID = torch.cartesian_prod(*[torch.arange(16)] * 3).int()


def slab():
    """Of other lengths along each axis."""
    cube = shapes.cube()
    return Mesh(cube.vertices * torch.tensor([1.0, 0.6, 0.2]), cube.faces)


@pytest.fixture(scope="module")
def folder(image_folder):
    return image_folder


@pytest.fixture(scope="module")
def encoders(folder):
    return Encoders.load(TrellisFolder.read(folder))


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Three meshes, one of them in a folder, and things that are none."""
    root = tmp_path_factory.mktemp("meshes")
    (root / "more").mkdir()
    (root / ".hidden").mkdir()
    save_mesh(root / "slab.obj", slab())
    save_mesh(root / "more" / "ball.ply", shapes.icosphere(3.0))
    save_mesh(root / "cube.GLB", shapes.cube())
    save_mesh(root / ".hidden" / "cube.glb", shapes.cube())
    (root / "slab.txt").write_text("a slab")
    return root


@pytest.fixture(scope="module")
def made(encoders, meshes, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "latents"
    assert latents.make(encoders, meshes, out, **FEW) == {}
    return out


class Stub:
    """Encoders whose patch tokens are given."""

    resolution, device = 16, torch.device("cpu")

    def __init__(self, tokens):
        self.tokens = tokens

    def patches(self, pictures):
        assert pictures.shape[1:] == (3, 518, 518)
        return self.tokens.expand(len(pictures), -1, -1, -1)


def one_hot(row, column):
    tokens = torch.zeros(1, 37, 37)
    tokens[0, row, column] = 1
    return tokens


def tent(points, yaw, row, column):
    """How much of token (row, column) a point gets from a camera on the horizon, by hand."""
    right, forward = (-math.sin(yaw), math.cos(yaw), 0.0), (-math.cos(yaw), -math.sin(yaw), 0.0)
    depth = 2 + points @ torch.tensor(forward)
    focal = 37 / (2 * math.tan(math.radians(20)))
    across = 18.5 + focal * (points @ torch.tensor(right)) / depth
    down = 18.5 - focal * points[:, 2] / depth
    return (1 - (across - column - 0.5).abs()).clamp(min=0) * (1 - (down - row - 0.5).abs()).clamp(min=0)


@pytest.mark.parametrize(("row", "column"), [(18, 18), (9, 25), (27, 7)])
@pytest.mark.parametrize("yaw", [-math.pi / 2, 0.3])
def test_a_one_hot_token_lands_on_the_voxels_behind_it(row, column, yaw):
    points = voxelise.voxel_centres(GRID, 16)
    found = latents.at_points(one_hot(row, column), looking_in(yaw, 0.0, size=64), points)[:, 0]
    expected = tent(points, yaw, row, column)
    assert 3 < (expected > 0.01).sum() < 200  # hidden ones too: a whole ray of voxels
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_features_are_the_mean_over_views():
    yaws, ball = (-math.pi / 2, 0.3, 2.0), shapes.icosphere(0.5)
    coords = voxelise.surface_voxels(ball, 16)
    stub = Stub(one_hot(20, 16))
    found = latents.features(stub, ball, coords, [looking_in(yaw, 0.0, size=16) for yaw in yaws])
    points = voxelise.voxel_centres(coords, 16)
    expected = sum(tent(points, yaw, 20, 16) for yaw in yaws) / 3
    assert found.dtype == torch.float16 and expected.max() > 0.1
    torch.testing.assert_close(found[:, 0].float(), expected, atol=1e-3, rtol=0)


def test_flat_tokens_give_every_voxel_the_same_and_outside_there_are_zeros():
    ball, flat = shapes.icosphere(0.4, 2), torch.tensor([0.75, -2.0])
    coords = voxelise.surface_voxels(ball, 16)
    cameras = [looking_in(yaw, 0.4, size=16) for yaw in range(latents.TOGETHER + 2)]  # more than go in at once
    seen = []
    found = latents.features(Stub(flat[:, None, None].expand(2, 37, 37)), ball, coords, cameras, advance=seen.append)
    assert torch.equal(found, flat.half().expand(len(coords), 2)) and seen == [8, 10]
    outside = latents.at_points(torch.ones(1, 37, 37), cameras[0], torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]))
    assert outside[:, 0].tolist() == [0, 1]


def test_patches_are_the_last_blocks_tokens_without_any_norm(folder, encoders):
    from transformers import Dinov2WithRegistersModel

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (518, 518, 3), np.uint8)).convert("RGBA")
    found = encoders.patches(latents.pixels(picture)[None])
    whole = Dinov2WithRegistersModel.from_pretrained(folder / "encoder").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (torch.from_numpy(np.asarray(picture)[..., :3].copy()) / 255 - mean) / std
    with torch.no_grad():
        hidden = whole(inputs.movedim(-1, 0)[None], output_hidden_states=True).hidden_states[-1]
    assert found.shape == (1, 32, 37, 37)
    torch.testing.assert_close(found[0, :, 3, 11], hidden[0, 5 + 3 * 37 + 11], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.flatten(2).mT, encoders.image.tokens([picture])[:, 5:], atol=1e-4, rtol=0)


def test_a_view_lies_on_black_unrounded():
    seen = latents.pixels(Image.new("RGBA", (24, 24), (200, 100, 50, 128)))
    expected = torch.tensor([200.0, 100.0, 50.0]) * 128 / 255 / 255
    torch.testing.assert_close(seen[:, 9, 9], expected, atol=2e-3, rtol=0)
    assert ((seen[:, 9, 9] * 255) % 1).min() > 0.01
    assert latents.pixels(Image.new("RGBA", (24, 24), (200, 100, 50, 0))).eq(0).all()


def test_a_picture_has_the_views_colour_and_alpha():
    orange = replace(shapes.icosphere(0.4), colours=torch.tensor([1.0, 0.5, 0.0]).expand(258, 3))
    picture = latents.picture(orange, Camera(eye=(0, -2, 0), size=32))
    values = np.asarray(picture).astype(int)
    assert picture.mode == "RGBA" and picture.size == (32, 32)
    assert values[0, 0].tolist() == [0, 0, 0, 0] and np.abs(values[16, 16] - [255, 128, 0, 255]).max() <= 4
    assert ((values[..., 3] > 0) & (values[..., 3] < 255)).any()  # at the edges


def test_encoding_is_the_networks_means_normalised(encoders):
    coords = voxelise.surface_voxels(slab(), 16)
    feats = torch.randn(len(coords), 32, generator=torch.Generator().manual_seed(0)).half()
    found = encoders.encode(coords, feats)
    sites = torch.cat([torch.zeros(len(coords), 1, dtype=torch.int32), coords], 1)
    with torch.no_grad():
        mean, _ = encoders.latent(Voxels(feats.float(), sites, 1))
        occupancy = torch.zeros(1, 1, 16, 16, 16)
        for x, y, z in coords.tolist():
            occupancy[0, 0, x, y, z] = 1
        structure, _ = encoders.structure(occupancy)
    back = found["latent"] * torch.tensor(trellis.STD) + torch.tensor(trellis.MEAN)
    torch.testing.assert_close(back, mean.feats, atol=1e-5, rtol=0)
    assert (found["latent"] - mean.feats).abs().max() > 0.5
    torch.testing.assert_close(found["structure"], structure[0], atol=1e-6, rtol=0)
    assert torch.equal(found["coords"].int(), coords)


def test_a_folder_of_meshes_becomes_a_set(made, encoders):
    data = LatentShapes(made, mean=encoders.mean, std=encoders.std)
    assert data.names == ["cube.GLB", "more/ball.ply", "slab.obj"]
    batch = data.get([2, 0])
    cube = batch["latent"][1].coords[:, 1:]
    assert len(cube) == data.counts[0] == 16**3 - 14**3  # its shell
    assert batch["structure"].shape == (2, 8, 4, 4, 4) and batch["structure"].isfinite().all()
    assert all(feats.std() > 0.01 and feats.isfinite().all() for feats in batch["latent"].parts())
    told = (made / "README.md").read_text()
    assert "NOT rendered by the original's renderer" in told and "Views: 2 of 24 x 24" in told and "has 150" in told
    assert data.manifest.views == 2 and len(data.manifest.image_encoder) == 64


def test_z_points_up_in_latents(made, encoders, meshes, tmp_path):
    """The slab is flat along z; its file, as every file of ours, has y up."""
    coords = load_file(file_of(made, "slab.obj"))["coords"]
    extent = (coords.amax(0) - coords.amin(0) + 1).tolist()
    assert extent[0] == 16 and 8 <= extent[1] <= 10 and extent[2] <= 4
    assert latents.read(meshes / "slab.obj", "z").vertices.abs().amax(0).tolist() == pytest.approx([0.5, 0.1, 0.3])


def test_an_interrupted_run_goes_on_to_the_same_files(made, encoders, meshes, tmp_path):
    out = tmp_path / "latents"

    def stop(name, views):
        if name == "slab.obj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.make(encoders, meshes, out, advance=stop, **FEW)
    with pytest.raises(UserError, match="not finished"):
        LatentShapes(out, mean=encoders.mean, std=encoders.std)
    seen = []
    latents.make(encoders, meshes, out, advance=lambda name, views: seen.append(name), **FEW)
    assert set(seen) == {"slab.obj"} and tree_bytes(out) == tree_bytes(made)
    with pytest.raises(UserError, match="made with views=2, asked for is 3"):
        latents.make(encoders, meshes, out, views=3, size=24)


@pytest.fixture
def bad(meshes, tmp_path):
    root = tmp_path / "bad"
    root.mkdir()
    shutil.copy(meshes / "slab.obj", root / "good.obj")
    (root / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    (root / "b.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (root / "c.glb").write_bytes(b"no mesh at all")
    return root


def test_bad_meshes_are_refused_before_anything_is_made(folder, bad, tmp_path):
    ended = call("latents", folder, bad, tmp_path / "out", "--views", "1", "--size", "16", "--device", "cpu")
    assert ended.code == 2 and not ended.out and not (tmp_path / "out").exists()
    assert "a.obj: a mesh with no faces" in ended.message and "(3 of 4 meshes are bad)" in ended.message
    assert "--on-bad skip" in ended.message
    lines = ended.err.splitlines()
    assert sum("b.obj: " in line and "NaN" in line for line in lines) == 1
    assert sum("c.glb: not readable as a mesh" in line for line in lines) == 1


def test_bad_meshes_can_be_left_out_and_are_listed(folder, bad, tmp_path):
    out = tmp_path / "out"
    words = ("latents", folder, bad, out, "--views", "1", "--size", "16", "--device", "cpu", "--on-bad", "skip")
    ended = call(*words)
    assert ended.code == 0 and "3 meshes left out" in ended.message
    told = json.loads((out / "index.json").read_text())
    assert [entry["name"] for entry in told["shapes"]] == ["good.obj"]
    assert sorted(told["skipped"]) == ["a.obj", "b.obj", "c.glb"]
    assert (out / "README.md").read_text().count("no faces") == 1
    (bad / "good.obj").unlink()
    ended = call(*words)
    assert ended.code == 2 and "none of its 3 meshes can be used" in ended.message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["TRELLIS", "EMPTY", "out"], "no meshes in it (.glb"),
        (["TRELLIS", "nowhere", "out"], "no such folder of meshes"),
        (["EMPTY", "MESHES", "out"], "no TRELLIS folder"),
        (["TRELLIS", "MESHES", "out", "--views", "0"], "--views"),
        (["TRELLIS", "MESHES", "out", "--up", "x"], "--up"),
        (["TRELLIS", "MESHES", "out", "--on-bad", "maybe"], "--on-bad"),
        (["TRELLIS", "MESHES", "out", "--encoder", "EMPTY"], "no transformers folder of DINOv2"),
        (["TRELLIS", "MESHES", "out", "--latent-encoder", "ckpts/none"], "--latent-encoder names another stem"),
        (
            ["TRELLIS", "MESHES", "out", "--structure-encoder", "ckpts/slat_enc_swin8_B_64l8_fp16"],
            "describes a SLatEncoder; a SparseStructureEncoder is needed",
        ),
    ],
)
def test_mistakes(folder, meshes, words, expected, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"TRELLIS": folder, "MESHES": meshes, "EMPTY": tmp_path / "empty"}
    ended = call("latents", *(places.get(word, word) for word in words), "--device", "cpu")
    assert ended.code == 2 and expected in ended.message and not ended.out
    assert not (tmp_path / "out").exists()


def test_encoders_that_do_not_fit(folder, tmp_path):
    told = TrellisFolder.read(folder)
    with pytest.raises(UserError, match="slat_normalization has 2 means for latents of 8 channels"):
        Encoders.load(replace(told, mean=(0.0, 0.0), std=(1.0, 1.0)))
    wide = shutil.copytree(folder, tmp_path / "wide")
    stem = wide / latents.LATENT_ENCODER
    described = files.read_json(stem.with_name(f"{stem.name}.json"))
    described["args"]["in_channels"] = 40
    trellis.save_file(
        {
            key: v.contiguous()
            for key, v in trellis.make(described["name"], described["args"], "x").state_dict().items()
        },
        stem.with_name(f"{stem.name}.safetensors"),
    )
    files.write_json(stem.with_name(f"{stem.name}.json"), described)
    with pytest.raises(UserError, match="has 32 channels and the latent encoder takes 40"):
        Encoders.load(TrellisFolder.read(wide))


def test_a_text_folder_takes_dinov2_all_the_same(folder):
    """Its own encoder reads texts."""
    told = replace(TrellisFolder.read(folder), condition=TEXT, encoder="openai/clip-vit-large-patch14")
    assert Encoders.load(told, image=folder / "encoder").image.name == "dinov2_vitl14_reg"
