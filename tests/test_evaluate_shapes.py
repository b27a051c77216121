"""`fastgen evaluate` on meshes: what two files and two folders are told, floors, views, and every mistake."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastgen import evaluate_shapes as app
from fastgen.errors import UserError
from fastgen.eval.extractors import RandomConv
from fastgen.eval.inception import InceptionExtractor
from fastgen.eval.metrics import Result
from fastgen.evaluate_shapes import Ask, evaluate, framed, holds_meshes, pictures
from fastgen.geometry.export import save_mesh
from tests.commands import call
from tests.geometry import shapes

pytest.importorskip("trimesh", reason="trimesh is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
BALL, SMALLER, CUBE = shapes.icosphere(0.45, 2), shapes.icosphere(0.40, 2), shapes.cube(0.35)
OPENED = replace(CUBE, faces=CUBE.faces[1:])
FEW = ("--points", "2000", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(app, "SIDE", 16)


def put(folder, **meshes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, mesh in meshes.items():
        stem, _, ending = name.partition("_")
        save_mesh(folder / f"{stem}.{ending or 'ply'}", mesh)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """good/ and truth/ (ball, cube), worse/ (a smaller ball, an open cube), and alone.glb."""
    root = tmp_path_factory.mktemp("meshes")
    put(root / "truth", ball_glb=BALL, cube=CUBE)
    put(root / "good", ball=BALL, cube_obj=CUBE)
    put(root / "worse", ball=SMALLER, cube=OPENED, stranger=BALL)
    put(root, alone_glb=SMALLER)
    return root


def rows(meshes, reference, **fields):
    report = evaluate(Ask(meshes=str(meshes), reference=str(reference), points=2000, device="cpu", **fields))
    return {row.metric: row for row in report.results}, report


def mistake(*words):
    ended = call("evaluate", *words, "--device", "cpu")
    assert ended.code == 2 and not ended.out and "Traceback" not in ended.err, ended
    return ended.message.removeprefix("fastgen: ")


def test_two_files_by_closed_forms(folder):
    """Balls of 0.40 and 0.45: everything is 0.05 away, and normals agree."""
    found, report = rows(folder / "alone.glb", folder / "truth" / "ball.glb")
    assert list(report.shapes) == ["alone"]
    assert found["CD-L1"].value == pytest.approx(0.052, abs=0.004) and found["CD-L1"].floor < 0.02
    assert found["CD-L2"].value == pytest.approx(2 * 0.052**2, rel=0.2)
    assert found["F@0.01"].value == found["F@0.02"].value == 0 and found["F@0.05"].floor > 0.99
    assert found["normal consistency"].value > 0.98
    assert {name: found[name].value for name in ("watertight", "Euler number", "components")} == {
        "watertight": 1,
        "Euler number": 2,
        "components": 1,
    }
    assert not any(name.startswith(("FD", "KD")) for name in found)
    assert all(len(row.reference_sha256) == 64 for row in found.values())


def test_an_open_mesh_and_its_reference(folder):
    found, _ = rows(folder / "worse" / "cube.ply", folder / "truth" / "cube.ply")
    assert (found["watertight"].value, found["watertight"].floor) == (0, 1)
    assert (found["Euler number"].value, found["Euler number"].floor) == (1, 2)


def test_folders_are_matched_by_name(folder, caplog):
    with caplog.at_level("WARNING", logger="fastgen"):
        found, report = rows(folder / "worse", folder / "truth")
    assert list(report.shapes) == ["ball", "cube"] and "1 without a counterpart are left out: stranger" in caplog.text
    each = [{row.metric: row for row in part} for part in report.shapes.values()]
    for name in ("CD-L1", "CD-L2", "F@0.05", "normal consistency"):
        assert found[name].value == pytest.approx(sum(part[name].value for part in each) / 2)
        assert found[name].floor == pytest.approx(sum(part[name].floor for part in each) / 2)
    assert (found["watertight"].value, found["watertight"].floor, found["watertight"].n_gen) == (0.5, 1, 2)
    assert found["same Euler number"].value == 0.5 and found["same components"].value == 1
    assert "Euler number" not in found


def test_views_of_the_same_shapes_are_nearer_than_of_others(folder):
    good, _ = rows(folder / "good", folder / "truth")
    worse, _ = rows(folder / "worse", folder / "truth", extractor="random-conv")
    for name in ("FD-random-conv", "KD-random-conv"):
        assert good[name].value < worse[name].value
        assert good[name].floor == worse[name].floor is not None  # of the reference alone
    fd = good["FD-random-conv"]
    assert fd.value < 1e-3 < worse["FD-random-conv"].value
    assert (fd.n_gen, fd.n_ref, fd.extractor) == (2 * app.VIEWS, 2 * app.VIEWS, "random-conv")
    assert fd.reference_sha256 == worse["FD-random-conv"].reference_sha256 and fd.reference_sha256


def test_no_distance_of_views_is_called_fid(monkeypatch):
    """Not even in the space of the weights that define it."""
    see = RandomConv(3)

    class Public(InceptionExtractor):
        dim, public, sha256, resize = 256, True, see.sha256, "tf"

        def __init__(self):
            pass

        def __call__(self, images):
            return see(images)

        def probabilities(self, features):
            return features.double().softmax(1)

    pixels = app._Views(app._extractor(Ask(meshes="a", reference="b", extractor="pooled-pixels")), "cpu")
    pixels.add(CUBE, BALL)
    with pytest.warns(UserWarning, match="rank-deficient"):
        found = pixels.results("0" * 64)
    assert [row.metric for row in found] == ["FD-pooled-pixels", "KD-pooled-pixels"]
    monkeypatch.setattr(app, "SIZE", 16)
    views = app._Views(Public(), "cpu")
    views.add(CUBE, BALL)
    with pytest.warns(UserWarning, match="rank-deficient"):
        found = views.results("0" * 64)
    assert [row.metric for row in found] == ["FD-inception", "KD-inception"]


def test_pictures_stand_upright_and_differ_by_side():
    """Files have y up: a tall box stands in every view, and the views go once around."""
    tall = replace(CUBE, vertices=CUBE.vertices * torch.tensor([0.3, 1.2, 0.6]))
    seen = pictures(tall, 32)
    assert seen.shape == (app.VIEWS, 3, 32, 32) and seen.min() >= -1 and seen.max() == 1
    drawn = (seen < 0.99).any(1)
    heights, widths = drawn.any(2).sum(1), drawn.any(1).sum(1)
    assert (heights > 1.3 * widths).all() and widths.max() > widths.min()


def test_the_frame_is_the_references(caplog):
    """One map for both; none where the reference lies in the cube as it should."""
    assert framed(SMALLER, BALL, "a") == (SMALLER, BALL)
    large = replace(BALL, vertices=BALL.vertices * 100 + 7)
    with caplog.at_level("INFO", logger="fastgen"):
        mesh, reference = framed(replace(SMALLER, vertices=SMALLER.vertices * 100 + 7), large, "a")
    assert "a: moved and scaled with its reference" in caplog.text
    torch.testing.assert_close(reference.vertices, BALL.vertices / 0.9, atol=1e-4, rtol=0)
    torch.testing.assert_close(mesh.vertices, SMALLER.vertices / 0.9, atol=1e-4, rtol=0)
    tiny = framed(BALL, replace(BALL, vertices=BALL.vertices * 0.01), "a")[0]
    assert float(tiny.vertices.abs().max()) == pytest.approx(50, rel=1e-3)
    with pytest.raises(UserError, match="a: all vertices of its reference lie in one point"):
        framed(BALL, replace(BALL, vertices=BALL.vertices * 0), "a")


def test_few_points_are_told_once_for_all(folder, caplog):
    with caplog.at_level("WARNING", logger="fastgen"):
        rows(folder / "good", folder / "truth")
    told = [record.message for record in caplog.records if "below twice the sampling floor" in record.message]
    assert len(told) == 1 and told[0].startswith("2 of 2 shapes, ball first: tau=0.01")


def test_one_json_object(folder):
    ended = call("evaluate", folder / "good", "--reference", folder / "truth", "--json", *FEW)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert set(told) == {"results", "shapes"} and [shape["name"] for shape in told["shapes"]] == ["ball", "cube"]
    assert {"CD-L1", "FD-random-conv", "same Euler number"} <= {row["metric"] for row in told["results"]}
    assert all(set(row) == set(Result.__dataclass_fields__) for row in told["results"])


def test_lines_for_people_and_the_seed(folder):
    words = ("evaluate", folder / "alone.glb", "--reference", folder / "truth" / "ball.glb", *FEW)
    first = call(*words)
    assert first.code == 0 and first.out.startswith("CD-L1 0.05") and "components 1" in first.out
    assert call(*words).out == first.out != call(*words, "--seed", "1").out


def test_what_holds_meshes(folder, tmp_path):
    assert holds_meshes(str(folder / "good")) and holds_meshes("gone.GLB")
    assert not any(map(holds_meshes, (None, "digits", "zoo:unet", "owner/name", str(tmp_path), "a.safetensors")))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["good", "--reference", "elsewhere"], "no name is in both (ball, cube here, x, y, z, ... there)"),
        (["gone.ply", "--reference", "truth"], "gone.ply: no such file or folder"),
        (["alone.glb", "--reference", "truth"], "one is a folder and one a file"),
        (["good", "--reference", "empty"], "empty: no mesh there; give a .glb, .obj, .ply file"),
        (["good"], "good: give the meshes it is held against as --reference"),
        (["--reference", "truth"], "give the meshes to be measured before it"),
        (["broken.ply", "--reference", "alone.glb"], "broken.ply: not readable as a mesh"),
        (["points.obj", "--reference", "alone.glb"], "points.obj: a mesh with no faces"),
        (["nan.obj", "--reference", "alone.glb"], "nan.obj: 1 of 3 vertices are NaN or infinite"),
        (["twins", "--reference", "truth"], "a.glb and a.ply have one name"),
        (["alone.glb", "--reference", "alone.glb", "--extractor", "random-conv"], "--extractor random-conv: for the"),
        (["good", "--reference", "truth", "--extractor", "classifier"], "views are seen by none of that name"),
        (["good", "--reference", "truth", "--fid", "tf", "--extractor", "pooled-pixels"], "leave one out"),
        (["good", "--reference", "truth", "--steps", "3"], "--steps 3: of images; meshes take --reference"),
        (["good", "--reference", "truth", "--backend", "torchmetrics"], "--backend torchmetrics: of images"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, words, expected):
    for name in ("good", "truth", "alone.glb"):
        (tmp_path / name).symlink_to(folder / name)
    put(tmp_path / "elsewhere", w=CUBE, x=CUBE, y=CUBE, z=CUBE).joinpath("w.ply").unlink()
    put(tmp_path / "elsewhere", zz=CUBE)
    put(tmp_path / "twins", a=CUBE, a_glb=CUBE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.ply").write_bytes(b"no mesh at all")
    (tmp_path / "points.obj").write_text("v 0 0 0\nv 1 0 0\n")
    (tmp_path / "nan.obj").write_text("v 0 0 0\nv 1 nan 0\nv 0 1 0\nf 1 2 3\n")
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(*words)


def test_points_are_of_meshes(tmp_path):
    assert mistake("digits", "--reference", "digits", "--points", "500") == "--points 500: of meshes; leave it out"
