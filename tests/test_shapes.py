"""TRELLIS folders as makers of shapes, in Python and on the command line."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgen import shapes as app
from fastgen.errors import RunFailed, UserError
from fastgen.geometry.mesh import Mesh
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.shapes import Shapes
from fastgen.teachers.trellis.folder import TrellisFolder
from tests.commands import call

FEW = {"steps": 2}


@pytest.fixture(scope="module")
def ball():
    values = np.zeros((160, 200, 4), np.uint8)
    y, x = np.mgrid[:160, :200]
    values[(x - 100) ** 2 + (y - 80) ** 2 < 2500] = [200, 60, 40, 255]
    return Image.fromarray(values)


@pytest.fixture
def ball_file(ball, tmp_path):
    ball.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


def mistake(*said):
    ended = call("generate", *said)
    assert ended.code == 2 and not ended.out, ended
    assert ended.message.startswith("fastgen: ") and "Traceback" not in ended.err
    return ended.message


def test_image_to_mesh_and_to_gaussians(image_folder, ball):
    shapes = Shapes(TrellisFolder.read(image_folder))
    cond = shapes.condition([ball])
    coords = shapes.structure(cond, **FEW)
    assert coords.dtype == torch.int32 and coords.shape[1] == 4 and coords[:, 0].eq(0).all()
    assert coords[:, 1:].min() >= 0 and coords[:, 1:].max() < 16 and len(coords.unique(dim=0)) == len(coords) > 20
    latents = shapes.latents(cond, coords, **FEW)
    mesh, splats = shapes.meshes(latents)[0], shapes.gaussians(latents)[0]
    assert len(mesh.faces) > 100 and mesh.vertices.abs().max() <= 0.51 and mesh.colours is not None
    assert splats.xyz.shape == (32 * len(coords), 3) and splats.xyz.abs().max() < 0.6
    assert len(shapes._kept) == 1  # one network at a time


def test_a_shape_depends_on_the_seed_and_its_number_alone(text_folder):
    shapes = Shapes(TrellisFolder.read(text_folder), keep=True)
    cond = shapes.condition(["a chair", "a pot"])
    both = shapes.structure(cond, seed=3, **FEW)
    alone = shapes.structure({"text": cond["text"][1:], "empty": cond["empty"]}, seed=3, first=1, **FEW)
    assert torch.equal(both[both[:, 0] == 1][:, 1:], alone[:, 1:])
    latents = shapes.latents(cond, both, seed=3, **FEW)
    single = shapes.latents({"text": cond["text"][1:], "empty": cond["empty"]}, alone, seed=3, first=1, **FEW)
    torch.testing.assert_close(latents.feats[both[:, 0] == 1], single.feats, atol=1e-4, rtol=0)
    other = shapes.structure(cond, seed=4, **FEW)
    assert both.shape != other.shape or not torch.equal(both, other)
    assert len(shapes._kept) == 3


def test_latents_are_in_the_decoders_scale(image_folder, ball, monkeypatch):
    """Whatever the flow ends on, times std, plus mean."""
    folder = TrellisFolder.read(image_folder)
    shapes = Shapes(folder)
    cond = shapes.condition([ball])
    monkeypatch.setattr(app.flow_euler, "sample", lambda model, noise, settings, cond: noise)
    coords = torch.cartesian_prod(torch.zeros(1), *[torch.arange(12.0)] * 3).int()
    feats = shapes.latents(cond, coords).feats
    mean, std = torch.tensor(folder.mean), torch.tensor(folder.std)
    assert (feats.mean(0) - mean).abs().max() < 0.2 and (feats.std(0) / std - 1).abs().max() < 0.06


def test_settings_come_from_the_folder_and_can_be_changed(image_folder, text_folder):
    folder = TrellisFolder.read(image_folder)
    shapes = Shapes(folder)
    assert shapes.settings(folder.latent, "x") == FlowEuler(
        steps=25, rescale_t=3, cfg_strength=5, cfg_interval=(0.5, 1)
    )
    assert shapes.settings(folder.latent, "x", steps=2, cfg_strength=None).steps == 2
    with pytest.raises(UserError, match="cfg_strenth"):
        shapes.settings(folder.latent, "slat_sampler", cfg_strenth=1)


def test_an_empty_structure_says_so(image_folder, ball, tmp_path):
    empty = shutil.copytree(image_folder, tmp_path / "empty")
    file = empty / "ckpts" / "ss_dec_conv3d_16l8_fp16.safetensors"
    stored = load_file(file)
    save_file(stored | {"out_layer.2.bias": torch.full((1,), -1e4)}, file)
    shapes = Shapes(TrellisFolder.read(empty))
    with pytest.raises(RunFailed, match="shape 0: the structure stage filled no voxel; try another seed"):
        shapes.structure(shapes.condition([ball]), **FEW)
    with pytest.raises(UserError, match="no voxels"):
        shapes.latents(shapes.condition([ball]), torch.zeros(0, 4, dtype=torch.int32), **FEW)


def test_too_many_voxels_are_refused_before_they_are_decoded(image_folder, ball, monkeypatch):
    shapes = Shapes(TrellisFolder.read(image_folder))
    cond = shapes.condition([ball])
    latents = shapes.latents(cond, shapes.structure(cond, **FEW), **FEW)
    monkeypatch.setattr(app, "available_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"\d+ voxels: their mesh needs about"):
        shapes.meshes(latents)
    assert shapes.gaussians(latents)


def test_what_a_device_cannot_do(image_folder):
    folder = TrellisFolder.read(image_folder)
    with pytest.raises(UserError, match="not one of fp32, fp16, bf16"):
        Shapes(folder, torso="int8")
    with pytest.raises(UserError, match="dtype=fp16"):
        Shapes(folder, torso="fp16")


def test_generate_writes_meshes_pictures_and_splats(image_folder, text_folder, ball_file, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    asked = (image_folder, "--image", ball_file, "--steps", "2", "--device", "cpu", "--out")
    assert call("generate", *asked, tmp_path / "a.glb").code == 0
    mesh = next(iter(trimesh.load(tmp_path / "a.glb").geometry.values()))
    assert len(mesh.faces) > 100 and mesh.visual.kind == "vertex"
    assert call("generate", *asked, tmp_path / "b.glb").code == 0
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    assert call("generate", *asked, tmp_path / "a.ply", "--gaussians").code == 0
    assert b"f_dc_0" in (tmp_path / "a.ply").read_bytes()[:1000]
    asked = (text_folder, "a chair", "--steps", "1", "--device", "cpu", "--num", "2", "--out")
    assert call("generate", *asked, tmp_path / "many").code == 0
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == ["00000.glb", "00001.glb"]


def test_a_shape_without_a_surface_ends_the_run_and_writes_nothing(text_folder, tmp_path, monkeypatch):
    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long))
    monkeypatch.setattr(Shapes, "meshes", lambda self, latents: [nothing])
    out = tmp_path / "a.glb"
    ended = call("generate", text_folder, "a pot", "--steps", "1", "--device", "cpu", "--out", out)
    assert ended.code == 1 and "a.glb: this shape has no surface" in ended.message and not out.exists()


def test_a_turntable_is_a_gif(text_folder, tmp_path, monkeypatch):
    from fastgen.geometry import views

    monkeypatch.setattr(views, "turntable", partial(views.turntable, frames=5, size=24))
    out = tmp_path / "a.gif"
    assert call("generate", text_folder, "a pot", "--steps", "1", "--device", "cpu", "--out", out).code == 0
    with Image.open(out) as picture:
        assert picture.format == "GIF" and picture.n_frames == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label", "3"], "--label: TRELLIS takes --image"),
        (["--solver", "heun"], "--solver: TRELLIS takes"),
        (["--out", "a.png"], "--out a.png: give a .glb, .obj, .ply, .gif file, or a folder"),
        (["--out", "a.glb", "--gaussians"], "Gaussians are written as .ply"),
        (["--out", "a.glb", "--num", "2"], "2 shapes need a folder"),
        (["--guidance", "0.5"], "--guidance 0.5: at least 1"),
        (["a chair"], "from images: give --image FILE, and no prompt"),
        ([], "from images: give --image FILE"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["--image", __file__], "not a whole picture"),
    ],
)
def test_generate_mistakes(image_folder, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(image_folder, *words)
    assert not list(tmp_path.iterdir())


def test_generate_mistakes_of_texts(text_folder, ball_file, image_folder, tmp_path):
    assert "from texts: give a prompt, and no --image" in mistake(text_folder, "--image", ball_file)
    bare = shutil.copytree(image_folder, tmp_path / "bare")
    told = json.loads((bare / "pipeline.json").read_text())
    told["args"]["image_cond_model"] = "dinov2_vitl14_reg"
    (bare / "pipeline.json").write_text(json.dumps(told))
    message = mistake(bare, "--image", ball_file, "--out", tmp_path / "a.glb")
    assert "the encoder dinov2_vitl14_reg is not here" in message and "--encoder" in message
    done = call(
        "generate",
        bare,
        "--image",
        ball_file,
        "--out",
        tmp_path / "a.glb",
        "--encoder",
        image_folder / "encoder",
        "--steps",
        "1",
        "--device",
        "cpu",
    )
    assert done.code == 0


def test_options_of_shapes_are_refused_for_images(ball_file, tmp_path):
    assert "--image: of TRELLIS folders" in mistake(tmp_path, "--image", ball_file)
