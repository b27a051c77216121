"""`fastgen inspect`: every kind of path is told apart, and what is damaged is named."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from fastgen import files
from fastgen.errors import UserError
from fastgen.inspection import inspect
from tests.commands import IMAGES, PAIRS, call, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    assert call("distill", write_config(folder / "c.yaml", IMAGES), f"out={folder / 'run'}").code == 0
    return folder / "run"


def test_a_run_is_told_by_its_stages(run, tmp_path):
    told = inspect(run)
    assert told["kind"] == "run" and list(told["stages"]) == ["teacher", "pairs", "reflow"]
    assert told["stages"]["pairs"]["stage"] == "pairs" and told["stages"]["pairs"]["done"] is True
    shutil.copytree(run, tmp_path / "cut")
    (tmp_path / "cut" / "reflow" / "stage.json").unlink()
    (tmp_path / "cut" / "reflow" / "checkpoints" / "step-00000008" / "COMPLETE").unlink()
    told = inspect(tmp_path / "cut")
    assert told["stages"]["reflow"] == {"done": False, "checkpoint": "step-00000006"}
    assert inspect(tmp_path / "cut" / "reflow") == {"kind": "stage", "done": False, "checkpoint": "step-00000006"}
    (tmp_path / "cut" / "pairs" / "stage.json").write_text("{}")
    with pytest.raises(UserError, match=r"pairs/stage.json: damaged"):
        inspect(tmp_path / "cut")


def test_models_are_told_by_their_facts(run):
    teacher, student = inspect(run / "teacher" / "model"), inspect(run / "reflow" / "model")
    assert (teacher["kind"], student["kind"]) == ("teacher", "student")
    assert student["steps"] == [1, 2] and "steps" not in teacher
    for told in (teacher, student):
        assert (told["family"], told["shape"], told["num_classes"]) == ("mlp", [1, 8, 8], 4)
        assert told["bytes"] == 4 * told["parameters"] > 0
    assert student["sha256"] == files.sha256(run / "reflow" / "model") and student["facts"]["method"] == "reflow"


def test_pairs_are_told_by_their_manifest(run, tmp_path):
    told = inspect(run / "pairs" / "shards")
    assert (told["kind"], told["shards"], told["total"]) == ("pairs", "3 of 3", PAIRS["num"])
    shutil.copytree(run / "pairs" / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "shard-000000.safetensors").unlink()
    assert inspect(tmp_path / "shards")["shards"] == "2 of 3"


def test_data_are_read_to_the_last_image(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (6, 5)).save(tmp_path / "images" / f"{i}.png")
    told = inspect(tmp_path / "images")
    assert told == {"kind": "data", "name": "images", "images": 3, "shape": [3, 5, 6], "classes": None}
    (tmp_path / "images" / "2.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(UserError, match=r"2.png: not a readable image"):
        inspect(tmp_path / "images")


@pytest.mark.parametrize("name", ["nowhere", "empty", "file.txt"])
def test_what_is_nothing_known_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=name):
        inspect(tmp_path / name)
