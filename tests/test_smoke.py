"""`--smoke`: every shipped config runs from end to end in seconds, on made-up data or the user's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from fastgen.listing import config_names
from tests.commands import call

# Each method runs on points and on small images (of lcm, which is for texts: tests/trainers/test_contract.py). What is
# on networks of the real classes, or differs by its sizes alone, waits for `pytest -m slow`.
QUICK = ("quickstart", "flow_matching/default", "imitate/default", "prepare/default")


def quick(name):
    return name in QUICK or name.endswith(("/mixture", "-mixture", "/digits"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if quick(name) else pytest.mark.slow) for name in config_names()]
)
def test_every_shipped_config_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    ended = call("distill", name, "--smoke", "threads=1", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    stages = [inner["name"] for stage in config["stages"] for inner in stage.get("stages", [stage])]
    made = [line.removeprefix("made ") for line in ended.err.splitlines() if line.startswith("made ")]
    records = {name: json.loads((tmp_path / "run" / name / "stage.json").read_text()) for name in stages}
    assert made == [str(tmp_path / "run" / name / record["output"]) for name, record in records.items()]


def test_the_users_own_data_are_used(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 12, 12, 3), np.uint8)
    for i, pixels in enumerate(noise):
        folder = tmp_path / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    words = ["distill", "reflow/cifar10", "--smoke", "stages.teacher.net={family: mlp, width: 8}"]
    ended = call(*words, f"out={tmp_path / 'run'}", f"data={{path: {tmp_path / 'pictures'}}}")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "run" / "evaluate" / "evaluate.json").read_text())
    assert report["data"] == "pictures/train" and report["n_ref"] == 80
