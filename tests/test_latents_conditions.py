"""What latents of meshes are told: pictures and captions as the flows will see them, and how they are made again."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from fastgen import latents
from fastgen.data import shape_conditions, shapes
from fastgen.data.mesh_captions import captions_of
from fastgen.data.shape_conditions import Captions, Pictures, picture_cameras
from fastgen.data.shape_rows import ShapeRows
from fastgen.data.shapes import LatentShapes
from fastgen.errors import UserError
from fastgen.geometry.export import save_mesh
from fastgen.geometry.mesh import Mesh
from fastgen.latents import Encoders
from fastgen.teacher import read_denoiser
from fastgen.teachers.trellis.conditions import ImageEncoder, TextEncoder
from fastgen.teachers.trellis.folder import TrellisFolder
from tests.commands import call, tree_bytes
from tests.geometry import shapes as solids

pytest.importorskip("trimesh", reason="trimesh is not installed")
FEW = {"views": 1, "size": 32}
DIGEST = "5" * 64


@pytest.fixture(scope="module")
def encoders(image_folder):
    return Encoders.load(TrellisFolder.read(image_folder))


@pytest.fixture(scope="module")
def text_encoder(text_folder):
    return TextEncoder(TrellisFolder.read(text_folder).encoder)


@pytest.fixture
def meshes(tmp_path):
    root = tmp_path / "meshes"
    (root / "more").mkdir(parents=True)
    save_mesh(root / "cube.glb", solids.cube())
    save_mesh(root / "more" / "ball.ply", solids.icosphere(3.0))
    (root / "cube.txt").write_text("a cube\n\n  a box of six squares \n")
    (root / "captions.jsonl").write_text(
        '{"file": "more/ball.ply", "text": "a ball"}\n{"file": "gone.glb", "text": "x"}'
    )
    return root


@pytest.fixture(scope="module")
def manifest(encoders):
    return encoders.manifest(**FEW, up="y", seed=0)


def pictures(encoders, count, **options):
    return Pictures(encoders.image, encoders.hashes["image_encoder"], count, **options)


def texts(text_encoder, meshes):
    return Captions(text_encoder, captions_of(meshes, latents.mesh_files(meshes)))


def opened(out, told):
    return LatentShapes(out, mean=told.mean, std=told.std)


def test_cameras_hold_the_ball_round_the_cube_and_vary_in_perspective(manifest):
    cameras = picture_cameras(200, manifest, DIGEST)
    sines = torch.tensor([math.sin(math.radians(camera.fov / 2)) for camera in cameras])
    distances = torch.tensor([math.hypot(*camera.eye) for camera in cameras])
    torch.testing.assert_close(distances * sines, torch.full((200,), math.sqrt(3) / 2))
    assert all(10 <= camera.fov <= 70 and camera.size == 64 for camera in cameras)
    low, high = math.sin(math.radians(5)) ** 2, math.sin(math.radians(35)) ** 2
    spread = ((sines**2 - low) / (high - low)).sort().values  # uniform in 1 / distance^2
    assert (spread - torch.linspace(0, 1, 200)).abs().max() < 0.115  # Kolmogorov and Smirnov's at 1 %
    eyes = torch.tensor([camera.eye for camera in cameras]) / distances[:, None]
    assert eyes.mean(0).norm() < 0.1 and (eyes.T @ eyes / 200 - torch.eye(3) / 3).abs().max() < 0.03  # all around
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    for camera in cameras[:20]:
        seen = camera.project(corners)
        assert seen[:, :2].min() >= -1e-6 and seen[:, :2].max() <= 64 + 1e-6 and seen[:, 2].min() > 0


def test_cameras_belong_to_the_seed_the_mesh_and_the_attempt(manifest):
    first = picture_cameras(2, manifest, DIGEST)
    assert first == picture_cameras(2, manifest, DIGEST)
    other = manifest.model_copy(update={"seed": 1})
    for cameras in (
        picture_cameras(2, manifest, "6" * 64),
        picture_cameras(2, other, DIGEST),
        picture_cameras(2, manifest, DIGEST, 1),
    ):
        assert cameras[0] != first[0]


def test_conditions_of_pictures_are_what_generate_would_tell_the_flow(encoders, image_folder, manifest):
    mesh = solids.icosphere(0.4, 2)
    found = pictures(encoders, 2).encode("ball", mesh, DIGEST, manifest)
    seen = [shape_conditions.picture(mesh, camera) for camera in picture_cameras(2, manifest, DIGEST)]
    expected = ImageEncoder(str(image_folder / "encoder")).encode(seen)
    assert found.shape == (2, 1 + 4 + 37 * 37, 32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 1374), atol=1e-5, rtol=0)  # normed
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_direction_without_a_subject_is_replaced_by_another(encoders, manifest, monkeypatch):
    seen = []

    def encode(images):
        seen.append(images[0])
        if len(seen) in (1, 3):
            raise UserError("this image shows no subject")
        return torch.full((1, 5, 4), float(len(seen)))

    monkeypatch.setattr(shape_conditions, "picture", lambda mesh, camera: camera)
    advanced = []
    told = Pictures(SimpleNamespace(encode=encode), "x", 3, advance=lambda *done: advanced.append(done))
    assert told.encode("thin", None, DIGEST, manifest)[:, 0, 0].tolist() == [2, 4, 5]
    first, second = (picture_cameras(3, manifest, DIGEST, attempt) for attempt in (0, 1))
    assert seen == [*first, *second[:2]] and advanced == [("thin", 1), ("thin", 2), ("thin", 3)]


def test_a_mesh_that_cannot_be_seen_is_named_or_left_out(encoders, meshes, tmp_path):
    needle = Mesh(solids.cube().vertices * torch.tensor([1.0, 1e-4, 1e-4]), solids.cube().faces)
    save_mesh(meshes / "needle.obj", needle)
    told = pictures(encoders, 1)
    with pytest.raises(UserError, match=r"needle\.obj: 4 of 4 pictures of it show no subject, it is too thin"):
        latents.make(encoders, meshes, tmp_path / "out", conditions=told, **FEW)
    skipped = latents.make(encoders, meshes, tmp_path / "out", conditions=told, skip_bad=True, **FEW)
    assert list(skipped) == ["needle.obj"]
    assert opened(tmp_path / "out", encoders).names == ["cube.glb", "more/ball.ply"]


def test_stored_pictures_are_half_precision_of_the_meshs_own(encoders, meshes, tmp_path):
    told, out = pictures(encoders, 2), tmp_path / "out"
    latents.make(encoders, meshes, out, conditions=told, **FEW)
    data = opened(out, encoders)
    found = meshes / data.names[1]
    expected = told.encode("", latents.read(found, "y"), latents.files.sha256(found), data.manifest)
    assert torch.equal(data.condition([1, 1], [0, 1]), expected.half().float())
    assert shapes.conditions_of(out, "cube.glb").stat().st_size == pytest.approx(told.bytes, abs=600)
    card = (out / "README.md").read_text()
    assert "2 pictures of each mesh, where the published data have 24" in card and "NOT the original's renders" in card
    assert data.manifest.condition_encoder == data.manifest.image_encoder and data.empty is None


def test_a_run_stopped_among_pictures_goes_on_to_the_same_files(encoders, meshes, tmp_path):
    whole, out, seen = tmp_path / "whole", tmp_path / "out", []
    latents.make(encoders, meshes, whole, conditions=pictures(encoders, 1), **FEW)

    def stop(name, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.make(encoders, meshes, out, conditions=pictures(encoders, 1, advance=stop), **FEW)
    assert shapes.file_of(out, "cube.glb").exists() and not shapes.conditions_of(out, "cube.glb").exists()
    latents.make(
        encoders, meshes, out, conditions=pictures(encoders, 1), advance=lambda name, _: seen.append(name), **FEW
    )
    assert seen == ["more/ball.ply"] and tree_bytes(out) == tree_bytes(whole)  # the cube's latents were kept
    with pytest.raises(UserError, match="made with conditions=1, asked for is 2"):
        latents.make(encoders, meshes, out, conditions=pictures(encoders, 2), **FEW)


def test_conditions_of_captions_are_clips(encoders, text_encoder, meshes, tmp_path):
    told, out = texts(text_encoder, meshes), tmp_path / "out"
    latents.make(encoders, meshes, out, conditions=told, **FEW)
    data = opened(out, encoders)
    expected = text_encoder.encode(["a cube", "a box of six squares", "a ball"]).half().float()
    found = data.condition([0, 0, 1, 1], [0, 1, 0, 1])
    torch.testing.assert_close(found, expected[[0, 1, 2, 2]], atol=2e-3, rtol=0)  # the ball's only one twice
    assert (found[0] - found[1]).abs().max() > 0.1
    torch.testing.assert_close(data.empty, text_encoder.encode([""]).half().float(), atol=2e-3, rtol=0)
    card = (out / "README.md").read_text()
    assert "2 captions of each mesh, as CLIP's tokens; meshes with fewer, at least 1, repeat theirs" in card
    assert f"encoder of the conditions: sha256 `{told.sha256}`" in card


def test_a_changed_caption_remakes_its_meshs_conditions_and_no_latents(encoders, text_encoder, meshes, tmp_path):
    out, seen = tmp_path / "out", []
    options = {**FEW, "advance": lambda name, views: seen.append(name)}
    latents.make(encoders, meshes, out, conditions=texts(text_encoder, meshes), **options)
    files = [shapes.conditions_of(out, name) for name in ("cube.glb", "more/ball.ply")]
    before = [file.stat().st_mtime_ns for file in files]
    seen.clear()
    (meshes / "cube.txt").write_text("a cube\na die")
    latents.make(encoders, meshes, out, conditions=texts(text_encoder, meshes), **options)
    assert not seen and [file.stat().st_mtime_ns == time for file, time in zip(files, before, strict=True)] == [0, 1]
    found = opened(out, encoders).condition([0], [1])
    torch.testing.assert_close(found, text_encoder.encode(["a die"]).half().float(), atol=2e-3, rtol=0)
    (meshes / "cube.txt").write_text("a cube\na die\na box")  # another number of them: all are made again
    latents.make(encoders, meshes, out, conditions=texts(text_encoder, meshes), **options)
    assert not seen and opened(out, encoders).condition([1], [2]).shape == (1, 77, 32)


def test_other_weights_or_words_are_another_encoder(text_encoder, text_folder, tmp_path):
    captions, folder = {"a": ["x"]}, text_folder / "encoder"
    told = Captions(text_encoder, captions)
    assert told.sha256 == Captions(TextEncoder(str(folder)), captions).sha256
    other = TextEncoder(str(folder))
    next(other.parts[1].parameters()).data[0] += 1
    words = shutil.copytree(folder, tmp_path / "words") / "vocab.json"
    vocabulary = json.loads(words.read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    words.write_text(json.dumps(vocabulary))
    for changed in (other, TextEncoder(str(words.parent))):
        assert Captions(changed, captions).sha256 != told.sha256


def ended(*words, on="cpu"):
    return call("latents", *words, "--views", "1", "--size", "16", "--device", on)


def test_a_text_folder_by_command_then_its_flow_reads_the_rows(image_folder, text_folder, meshes, tmp_path):
    out = tmp_path / "out"
    result = ended(text_folder, meshes, out, "--encoder", image_folder / "encoder")
    assert result.code == 0, result.err
    told = call("inspect", out)
    assert told.code == 0 and "conditions_of_a_shape" in told.out and "text" in told.out
    trellis = TrellisFolder.read(text_folder)
    for part in ("structure", "latent"):
        rows = ShapeRows(opened(out, trellis), part, trellis.condition)
        flow, _ = read_denoiser(text_folder, part=part)
        flow.empty = rows.empty
        batch = rows.get(torch.tensor([0, 3]))
        assert rows.shape == flow.shape and len(rows) == 4 and flow.has_null
        with torch.no_grad():
            seen = flow(batch["x0"], torch.tensor([0.3, 0.7]), {"text": batch["cond.text"]}).x0
        assert (seen.feats if part == "latent" else seen).isfinite().all()


def test_pictures_by_command_say_what_they_take(image_folder, meshes, tmp_path):
    result = ended(image_folder, meshes, tmp_path / "out", "--pictures", "2")
    assert (
        result.code == 0 and "2 pictures a mesh as conditions: 0.176 MB on disk, 0.000352 GB for 2 meshes" in result.err
    )
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (found["condition"], found["conditions"]) == ("image", 2)
    result = ended(image_folder, meshes, tmp_path / "none", "--no-conditions")
    assert result.code == 0 and not (tmp_path / "none" / "conditions").exists()
    assert "Conditions: none" in (tmp_path / "none" / "README.md").read_text()


@pytest.mark.parametrize(
    ("folder", "options", "files", "expected"),
    [
        ("image_folder", ["--pictures", "0"], {}, "--pictures"),
        ("image_folder", ["--pictures", "2", "--no-conditions"], {}, "with --no-conditions: give one of the two"),
        ("text_folder", ["--pictures", "2"], {}, "are told texts; leave it out"),
        ("text_folder", [], {"captions.jsonl": None}, "more/ball.ply: no caption, and the flows read texts (1 of 2"),
        ("text_folder", [], {"cube.txt": b" \n"}, "cube.glb: no caption, and the flows read texts (1 of 2 meshes"),
        ("text_folder", [], {"cube.txt": b"\xff\xfe"}, "cube.txt: the caption is not UTF-8"),
        ("text_folder", [], {"more/ball.txt": b"a ball"}, "ball.txt: ball.ply has captions in captions.jsonl as well"),
        ("text_folder", [], {"captions.jsonl": b"{}"}, "captions.jsonl line 1: no file name under 'file'"),
        ("text_folder", [], {"captions.jsonl": b"\n[1]"}, "captions.jsonl line 2: not a JSON object"),
        ("text_folder", [], {"captions.jsonl": b'{"file": "a"}'}, "line 1: no text under 'text' or 'caption'"),
        ("text_folder", ["--text-encoder", "MESHES"], {}, "no text encoder of CLIP"),
    ],
)
def test_mistakes(request, meshes, tmp_path, folder, options, files, expected):
    for name, data in files.items():
        (meshes / name).unlink() if data is None else (meshes / name).write_bytes(data)
    encoder = request.getfixturevalue("image_folder") / "encoder"
    options = [meshes if word == "MESHES" else word for word in options]
    result = ended(request.getfixturevalue(folder), meshes, tmp_path / "out", "--encoder", encoder, *options)
    assert result.code == 2 and expected in result.message and not (tmp_path / "out").exists(), result.err
