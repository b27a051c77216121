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

import fastgen
from fastgen import shapes as app
from fastgen.errors import RunFailed, UserError
from fastgen.geometry.mesh import Mesh
from fastgen.inspection import inspect
from fastgen.layout import normal_like
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.shapes import Shapes
from fastgen.sparse import Voxels
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import Teacher, read_denoiser
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
    assert shapes.settings("latent") == FlowEuler(steps=25, rescale_t=3, cfg_strength=5, cfg_interval=(0.5, 1))
    assert shapes.settings("latent", steps=2, cfg_strength=None).steps == 2
    with pytest.raises(UserError, match="cfg_strenth"):
        shapes.settings("latent", cfg_strenth=1)


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
    from fastgen.geometry import splats, views

    monkeypatch.setattr(views, "turntable", partial(views.turntable, frames=5, size=24))
    out = tmp_path / "a.gif"
    assert call("generate", text_folder, "a pot", "--steps", "1", "--device", "cpu", "--out", out).code == 0
    with Image.open(out) as picture:
        assert picture.format == "GIF" and picture.n_frames == 5
    monkeypatch.setattr(splats, "turntable", partial(splats.turntable, frames=3, size=24))
    asked = ("generate", text_folder, "a pot", "--steps", "1", "--device", "cpu", "--gaussians", "--out", out)
    assert call(*asked).code == 0
    with Image.open(out) as picture:
        assert picture.n_frames == 3


@pytest.mark.parametrize("stem", ["ss_flow_img_dit_L_16l8_fp16", "slat_flow_img_dit_L_64l8p2_fp16"])
def test_broken_weights_are_told_as_what_they_are(stem, image_folder, ball, tmp_path):
    broken = shutil.copytree(image_folder, tmp_path / "broken")
    file = broken / "ckpts" / f"{stem}.safetensors"
    stored = load_file(file)
    save_file(stored | {"out_layer.bias": torch.full_like(stored["out_layer.bias"], torch.nan)}, file)
    shapes = Shapes(TrellisFolder.read(broken))
    cond, cell = shapes.condition([ball]), torch.zeros(1, 4, dtype=torch.int32)
    part = "structure" if stem.startswith("ss") else "latent"
    with pytest.raises(RunFailed, match=f"the {part} flow gave numbers that are not finite"):
        shapes.structure(cond, **FEW) if part == "structure" else shapes.latents(cond, cell, **FEW)


def test_a_missing_decoder_is_told_before_anything_runs(image_folder, ball_file, tmp_path, monkeypatch):
    torn = shutil.copytree(image_folder, tmp_path / "torn")
    file = next((torn / "ckpts").glob("slat_dec_mesh*.safetensors"))
    file.unlink()
    monkeypatch.setattr(Shapes, "condition", lambda *asked: pytest.fail("the encoder was read"))
    ended = call("generate", torn, "--image", ball_file, "--device", "cpu", "--out", tmp_path / "a.glb")
    assert ended.code == 2 and f"{file}: missing, and its .json is there" in ended.message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label", "3"], "--label: TRELLIS takes --image"),
        (["--solver", "heun"], "--solver: TRELLIS takes"),
        (["--out", "a.png"], "--out a.png: give a .glb, .obj, .ply, .gif file, or a folder"),
        (["--out", "a.glb", "--gaussians"], "Gaussians are written as .ply, or turned as .gif"),
        (["--out", "a.glb", "--num", "2"], "2 shapes need a folder"),
        (["--guidance", "0.5"], "--guidance 0.5: at least 1"),
        (["a chair"], "from images: give --image FILE, and no prompt"),
        ([], "from images: give --image FILE"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["--image", __file__], "not a whole picture"),
        (["--image", __file__, "--out", f"{__file__}/x/a.glb"], "a file stands where a folder is needed"),
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


# --- folders whose flows are students


@pytest.fixture(scope="module")
def flow_folders(text_folder, tmp_path_factory):
    """A student of each part of the text folder: the teacher's own weights, for 1 and 2 steps."""
    root = tmp_path_factory.mktemp("flows")
    for part in ("structure", "latent"):
        denoiser = read_denoiser(text_folder, part)[0]
        times = {n: FlowEuler(steps=n, rescale_t=3).times() for n in (1, 2)}
        Student(denoiser, SamplerSpec(path=denoiser.path, times=times), {"method": "mdt"}).save(root / part)
    return root


def assembled(base, root, out, **stage):
    stage = {"name": "made", "stage": "assemble", "base": str(base), **stage}
    config = root / f"{out}.yaml"
    config.write_text(json.dumps({"threads": 1, "stages": [stage]}))
    ended = call("distill", config, f"out={root / out}", "device=cpu")
    assert ended.code == 0, ended.err
    return root / out / "made/model"


@pytest.fixture(scope="module")
def student_folder(text_folder, flow_folders):
    flows = {part: str(flow_folders / part) for part in ("structure", "latent")}
    return assembled(text_folder, flow_folders, "student", **flows)


@pytest.fixture(scope="module")
def half_student_folder(text_folder, flow_folders):
    return assembled(text_folder, flow_folders, "half", structure=str(flow_folders / "structure"), sampler="renoise")


@pytest.mark.parametrize("part", ["structure", "latent"])
def test_a_student_is_stepped_as_published_or_with_fresh_noise(student_folder, part):
    """x <- x - (t - t') phi(x, t), or x0 = x - t phi and x' = (1 - t') x0 + sigma(t') z' (to sigma_min = 1e-5)."""
    folder = TrellisFolder.read(student_folder)
    model, settings = Teacher(folder.flow(part)), Shapes(folder).settings(part, steps=2)
    cond = {"text": torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))}
    like = torch.zeros(2, *model.shape)
    if part == "latent":
        coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [1, 5, 5, 5]], dtype=torch.int32)
        like = Voxels(torch.zeros(3, 8), coords, 2)

    def fresh(draw):
        return normal_like(like, 5, "x", torch.arange(2), draw)

    def phi(x, t):
        return model.denoiser.net(x, torch.full((2,), 1000 * t), cond["text"])

    assert settings.times() == (1.0, 0.75) and settings.guided == 0
    with torch.no_grad():
        z = fresh(0)
        x = z - 0.25 * phi(z, 1.0)
        euler = x - 0.75 * phi(x, 0.75)
        x = 0.25 * (z - phi(z, 1.0)) + 0.75 * fresh(1)
        renoised = x - 0.75 * phi(x, 0.75)
    for rule, expected in (("euler", euler), ("renoise", renoised)):
        found = app._sampled(model, fresh, settings, rule, cond)
        torch.testing.assert_close(*(getattr(v, "feats", v) for v in (found, expected)), atol=2e-4, rtol=0)


def test_a_students_shape_depends_on_the_seed_and_its_number_alone(student_folder):
    shapes = Shapes(TrellisFolder.read(student_folder), keep=True)
    cond = shapes.condition(["a chair", "a pot"])
    second = {"text": cond["text"][1:], "empty": cond["empty"]}
    few = {"seed": 3, "steps": 2, "sampler": "renoise"}
    both, alone = shapes.structure(cond, **few), shapes.structure(second, first=1, **few)
    assert torch.equal(both[both[:, 0] == 1][:, 1:], alone[:, 1:])
    latents, single = shapes.latents(cond, both, **few), shapes.latents(second, alone, first=1, **few)
    torch.testing.assert_close(latents.feats[both[:, 0] == 1], single.feats, atol=1e-4, rtol=0)
    euler = shapes.latents(cond, both, **{**few, "sampler": "euler"})
    assert not torch.allclose(latents.feats, euler.feats, atol=1e-2)
    one, other = (shapes.latents(cond, both, seed=3, sampler=rule).feats for rule in ("euler", "renoise"))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # of one step, the default, the rules are the same


def test_generate_runs_students_at_their_steps(student_folder, half_student_folder, tmp_path):
    asked = ("a pot", "--device", "cpu", "--seed", "3", "--out")
    for name, words in {"a": [], "b": ["--steps", "1"], "c": ["--steps", "2", "--sampler", "renoise"]}.items():
        assert call("generate", student_folder, *asked, tmp_path / f"{name}.glb", *words).code == 0
    made = {name: (tmp_path / f"{name}.glb").read_bytes() for name in "abc"}
    assert made["a"] == made["b"] != made["c"]
    shapes = Shapes(TrellisFolder.read(half_student_folder))
    assert [shapes.rule(part) for part in ("structure", "latent")] == ["renoise", "euler"]
    assert [shapes.settings(part, steps=2).steps for part in ("structure", "latent")] == [2, 25]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "3"], "steps=3: this student was made for 1, 2; choose one of them"),
        (["--sampler", "eular"], "sampler=eular: no such sampler (did you mean 'euler'?)"),
        (["--guidance", "3"], "guidance: this student has it built in"),
    ],
)
def test_what_a_student_cannot_do(student_folder, tmp_path, words, expected):
    assert expected in mistake(student_folder, "a pot", "--device", "cpu", "--out", tmp_path / "a.glb", *words)
    assert not list(tmp_path.iterdir())


def test_samplers_are_of_students(text_folder, tmp_path):
    message = mistake(text_folder, "a pot", "--sampler", "euler", "--device", "cpu", "--out", tmp_path / "a.glb")
    assert "sampler=euler: for a student's folder; a teacher is stepped as its pipeline.json says" in message
    assert "--sampler: of TRELLIS folders" in mistake(tmp_path, "--sampler", "euler")


def test_inspect_tells_students(student_folder, half_student_folder, flow_folders, text_folder):
    told = inspect(student_folder)
    assert (told["kind"], told["steps"], told["sampler"]) == ("student", [1, 2], "euler")
    assert told["flows"] == {"structure": "student", "latent": "student"}
    assert told["facts"]["latent"]["method"] == "mdt" and len(told["networks"]) == 6
    assert inspect(half_student_folder)["flows"] == {"structure": "student", "latent": "teacher"}
    assert "steps" not in inspect(text_folder) and inspect(text_folder)["kind"] == "teacher"
    alone = inspect(flow_folders / "latent")
    assert (alone["kind"], alone["steps"], alone["part"]) == ("student", [1, 2], "latent")
    assert alone["sampler"]["renoise"] is False and alone["family"] == "trellis"


def test_what_makes_shapes_is_no_maker_of_images(student_folder, text_folder, flow_folders):
    for folder in (student_folder, text_folder):
        with pytest.raises(UserError, match=r"TRELLIS makes shapes: `fastgen generate`, or fastgen\.shapes"):
            fastgen.load(folder)
    for load in (fastgen.load, fastgen.load_student, fastgen.load_teacher):
        with pytest.raises(UserError, match="one flow of TRELLIS, which makes nothing by itself"):
            load(flow_folders / "latent")
    assert "shapes are made by a whole TRELLIS folder" in mistake(flow_folders / "latent", "a pot", "--out", "a.glb")


def test_a_spoiled_description_of_a_student(student_folder, tmp_path):
    copy = shutil.copytree(student_folder, tmp_path / "copy")
    good = json.loads((copy / "fastgen.json").read_text())
    for change, expected in (
        ({"format": 9}, "format 9, this fastgen reads 1"),
        ({"shapes": {"steps": [], "sampler": "euler"}}, "shapes.steps"),
        ({"shapes": {"steps": [1], "sampler": "heun"}}, "shapes.sampler"),
        ({"kind": "teacher"}, "kind"),
    ):
        (copy / "fastgen.json").write_text(json.dumps(good | change))
        assert expected in mistake(copy, "a pot", "--out", tmp_path / "a.glb")
