"""Consistency students in diffusers' ConsistencyModelPipeline: levels, images by stock code, and what it cannot do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, Prediction
from fastgen.samplers import cm
from fastgen.samplers.export.make import export
from fastgen.samplers.replay import replay
from fastgen.student import SamplerSpec, Student
from fastgen.teachers import unet
from tests.samplers import exports

NET = {"path": "EDM", "prediction": "cm", "block_out_channels": (16, 32), "layers_per_block": 1}
LIMIT = 2e-3


def spec(mid: float | None = 0.821, high: float = 80.0, **options: Any) -> SamplerSpec:
    times = {1: (high,)} if mid is None else {1: (high,), 2: (high, mid)}
    return SamplerSpec(path=EDM(), times=times, **{"renoise": True, **options})


def student(folder: Path, sampler: SamplerSpec, num_classes: int | None = None) -> Path:
    """A small U-Net with noise for weights."""
    torch.manual_seed(0)
    net = unet.build(unet.UNetConfig(**NET), (3, 8, 8), num_classes)
    torch.nn.init.normal_(net.net.conv_out.weight, std=0.2)
    Student(net, sampler, {"method": "consistency"}).save(folder / "student")
    return folder / "student"


@pytest.mark.parametrize("mid", [0.45, 0.821, 2.5, 30.0])
@pytest.mark.parametrize("high", [80.0, 20.0])
def test_the_plain_call_visits_the_students_levels(mid, high):
    if mid >= high:
        return
    net = Stand()
    entry = replay(net, spec(mid, high))
    assert entry.steps == (1, 2) and entry.guarded
    for steps, levels in ((1, (high,)), (2, (high, mid))):
        scheduler = entry.make()
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(levels, rel=1e-6)
        told = [float(net.time_input(torch.tensor(s, dtype=torch.float64))) for s in levels]
        assert scheduler.timesteps.tolist() == pytest.approx(told, abs=1e-6)
    assert scheduler.init_noise_sigma == pytest.approx(high)
    with pytest.raises(ValueError, match="cannot be larger than"):
        scheduler.set_timesteps(4)


class Stand(Denoiser):
    """A network of the kind that the pipeline runs, without weights."""

    family = "unet"

    def __init__(self, **options: Any) -> None:
        conventions = {"shape": (3, 8, 8), "time_scale": 1000.0, "log_time": True} | options
        super().__init__(None, EDM(), Prediction(kind="cm", sigma_min=0.002), **conventions)


@pytest.mark.parametrize(("num_classes", "mid"), [(None, 0.821), (3, 0.821), (None, None)])
def test_stock_code_makes_the_students_images(num_classes, mid, tmp_path):
    made = export(student(tmp_path, spec(mid), num_classes), "diffusers", tmp_path / "out")
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
    assert made.error < 1e-4  # every step count was replayed
    assert ("class_labels=0" in made.line) == (num_classes is not None)


def test_a_third_step_changes_nothing(tmp_path):
    """The card says so: at sigma_min the network answers with its input."""
    from diffusers import DiffusionPipeline

    made = export(student(tmp_path, spec()), "diffusers", tmp_path / "out")
    assert cm.NOTE in (made.folder / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(made.folder)
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(num_inference_steps=n, generator=torch.Generator().manual_seed(0), output_type="np").images
        for n in (1, 2, 3)
    ]
    assert np.abs(images[2] - images[1]).max() < 1e-5 < 1e-2 < np.abs(images[1] - images[0]).max()


@pytest.mark.slow
def test_without_fastgen(tmp_path):
    place = student(tmp_path, spec())
    made = export(place, "diffusers", tmp_path / "out")
    lines = {"1": made.line, "2": made.line.replace("num_inference_steps=1", "num_inference_steps=2")}
    for steps, image in exports.stock(lines, tmp_path).items():
        assert np.abs(image - exports.own(place, int(steps)).numpy()).max() < LIMIT


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (spec(0.3), rf"no place for a second step at 0.3: set mid above {math.sqrt(0.002 * 80):.3g}"),
        (spec(renoise=False), "makes one step, or two"),
        (replace(spec(), times={4: (80.0, 20.0, 5.0, 1.0)}), "makes one step, or two"),
        (spec(init="unit"), "begins with sigma_max times noise"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused(sampler, message):
    with pytest.raises(UserError, match=message):
        replay(Stand(), sampler)


@pytest.mark.parametrize("options", [{"time_scale": 1.0}, {"log_time": False}, {"shape": (3, 8, 4)}])
def test_networks_of_another_kind_are_not_for_it(options):
    with pytest.raises(UserError):
        replay(Stand(**options), spec())


def test_a_network_that_is_told_more_is_not_for_it():
    net = Stand()
    net.extra["guidance"] = torch.nn.Identity()
    with pytest.raises(UserError, match="no stock pipeline runs this unet network"):
        replay(net, spec())


def test_an_edm_network_is_no_cm_network():
    net = unet.build(unet.UNetConfig(**{**NET, "prediction": "edm"}), (3, 8, 8), None)
    assert net.time_scale == 1 and unet.build(unet.UNetConfig(**NET), (3, 8, 8), None).time_scale == 1000
    with pytest.raises(UserError, match="no stock pipeline runs this unet network"):
        replay(net, spec())
