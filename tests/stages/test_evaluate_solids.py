from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import save_file

from fastgen import files
from fastgen.errors import UserError
from fastgen.eval.solid_models import LATENTS, OFF, ROWS, STRUCTURES
from fastgen.eval.solids import Judge
from fastgen.stages import evaluate_solids
from fastgen.stages.config import kinds, load_run
from fastgen.stages.context import Context
from fastgen.stages.evaluate_solids import REBUILT, TRUE, floors, table
from fastgen.stages.machine import execute
from fastgen.teachers.trellis.folder import TrellisFolder
from fastgen.teachers.trellis.models import make
from fastgen.trainers.shapes.bodies import CHANNELS
from tests import solid_worlds


def go(out, **given):
    stage = {"stage": "evaluate_solids", "name": "evaluate", "n": 2, "points": 200, "frames": 2, **given}
    out.with_suffix(".yaml").write_text(json.dumps({"out": str(out), "device": "cpu", "stages": [stage]}))
    run, stages = load_run(out.with_suffix(".yaml"), [])
    execute(run, stages, Context(run, out, "cpu"), resume=False)
    return json.loads((out / "evaluate" / "evaluate.json").read_text())


@pytest.fixture(scope="module")
def world(text_folder, tmp_path_factory):
    return solid_worlds.write(text_folder, tmp_path_factory.mktemp("solids") / "world")


@pytest.fixture(scope="module")
def report(world):
    return world.parent / "run", go(world.parent / "run", teacher=str(world), student=str(world), cfg_strength=1.0)


def test_every_row_stands_there_and_the_record_holds_the_figures(report):
    out, told = report
    assert set(told["paired"]) == {OFF, STRUCTURES, LATENTS}
    names = [row.name for row in ROWS]
    assert list(told["unpaired"]) == [TRUE, *names]
    assert told["unpaired"][TRUE]["kind_and_size"] == 1 and told["unpaired"][TRUE]["chamfer"] < 0.03
    assert told["unpaired"]["teacher@1"]["gap_closed"] == 0 and told["unpaired"]["teacher@25"]["gap_closed"] == 1
    assert told["settings"]["n"] == 2 and told["settings"]["first"] == 1_000_000
    assert json.loads((out / "evaluate" / "stage.json").read_text())["figures"] == told
    lines = table(told)
    assert len(lines) == 2 + len(names) + 1 + len(names) + 1
    assert any(line.startswith("student@2 renoise r=3") and "%" in line for line in lines)


def test_pictures_turn(report):
    out, told = report
    rows, columns = told["pictures"]["rows"], told["pictures"]["columns"]
    assert rows[0] == TRUE and 1 <= len(columns) <= 2
    picture = Image.open(out / "evaluate" / "solids.png")
    assert picture.size == (96 * len(columns), 96 * len(rows))
    gif = Image.open(out / "evaluate" / "solids.gif")
    assert gif.n_frames == 2 and gif.size == picture.size
    assert len(picture.crop((0, 0, 96, 96)).getcolors(10_000)) > 10


def test_a_baseline_saves_the_teachers_rows(report, world, tmp_path):
    out, told = report
    given = {"teacher": str(world), "student": str(world), "baseline": str(out / "evaluate")}
    again = go(tmp_path / "again", **given, cfg_strength=1.0)
    assert {name: again["unpaired"][name] for name in told["unpaired"]} == told["unpaired"]
    assert again["paired"] == told["paired"]
    assert "teacher@25" not in again["pictures"]["rows"]
    with pytest.raises(UserError, match=r"baseline=.* has cfg_strength=1.0, here it is 2.0"):
        go(tmp_path / "other", **given, cfg_strength=2.0)


@pytest.mark.parametrize("figures", [None, "[]", "{}", '{"settings": {}, "unpaired": {"teacher@1": {}}}'])
def test_a_baseline_that_is_none_is_refused_before_anything_runs(figures, world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_solids, "Models", lambda *_, **__: pytest.fail("it ran"))
    if figures is not None:
        (tmp_path / "evaluate.json").write_text(figures)
    with pytest.raises(UserError, match=r"baseline=.*: no finished evaluation of solids"):
        go(tmp_path / "out", teacher=str(world), student=str(world), baseline=str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_numbers_that_no_solid_has_are_refused_at_once(world, tmp_path):
    with pytest.raises(UserError, match=r"first.* less than or equal to"):
        go(tmp_path / "out", teacher=str(world), student=str(world), first=2**63 - 1)


def test_a_student_is_no_standard(world, tmp_path):
    folder = shutil.copytree(world, tmp_path / "student")
    shapes = {"steps": [1, 2], "sampler": "euler", "parts": ["structure", "latent"]}
    files.write_json(folder / "fastgen.json", {"format": 1, "kind": "student", "shapes": shapes, "facts": {}})
    with pytest.raises(UserError, match=r"teacher=.* is a student's folder"):
        go(tmp_path / "out", teacher=str(folder), student=str(world))


def test_what_the_autoencoders_make_is_a_row_where_their_encoders_lie_in_the_folder(world, tmp_path):
    judge, which = Judge(points=200, marks=50), {"first": 5, "seed": 0}
    assert list(floors(TrellisFolder.read(world), 2, judge, **which)) == [TRUE]  # an encoder of other features
    shutil.copytree(world, tmp_path / "world")
    stem = tmp_path / "world" / "ckpts" / "slat_enc_swin8_B_64l8_fp16"
    described = json.loads(stem.with_suffix(".json").read_text())
    described["args"]["in_channels"] = CHANNELS
    files.write_json(stem.with_suffix(".json"), described)
    net = make(described["name"], described["args"], str(stem))
    save_file(
        {name: tensor.contiguous() for name, tensor in net.state_dict().items()}, stem.with_suffix(".safetensors")
    )
    found = floors(TrellisFolder.read(tmp_path / "world"), 2, judge, **which)
    assert list(found) == [TRUE, REBUILT]
    assert 0 < found[REBUILT][OFF] <= 1 and found[REBUILT]["chamfer"] > found[TRUE]["chamfer"]


def test_a_model_that_is_no_trellis_folder_is_refused_before_anything_runs(world, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"student=.* is no TRELLIS folder"):
        go(tmp_path / "run", teacher=str(world), student=str(tmp_path / "other"))
    assert kinds()["evaluate_solids"](stage="evaluate_solids", name="e", teacher="t", student="s").smoke().n == 2
