"""`--smoke`: every shipped config runs from end to end in seconds, on made-up data or the user's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from fastgen.listing import config_names
from tests.commands import call

# A run on Stable Diffusion, a U-Net or TRELLIS builds and imports as much as ten others: a few stand for all.
QUICK = ("reflow/sd15-24gb", "consistency/tcm-cifar10", "meanflow/cifar10", "mdt/trellis-image-large")
LONG = ("/sd", "cifar10", "toy3d", "trellis")
SLOW = [name for name in config_names() if any(part in name for part in LONG) and name not in QUICK]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in config_names()]
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
