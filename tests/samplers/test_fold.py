"""The fold rule: students told how far they step, run by stock diffusers, which has no such input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastgen.denoiser import Denoiser
from fastgen.errors import RunFailed, UserError
from fastgen.paths import RectifiedFlow
from fastgen.samplers import few_step
from fastgen.samplers.export import make
from fastgen.samplers.export.make import export
from fastgen.samplers.fold import alone, constant_gap, fold_gap
from fastgen.samplers.replay import refuse_unreplayable, replay
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import read_denoiser
from fastgen.teachers import unet
from fastgen.trainers.meanflow import MeanFlow
from tests import tiny
from tests.commands import call
from tests.samplers import exports

LIMIT = 2e-3
RF = RectifiedFlow()


def net(path: str = "RectifiedFlow") -> Denoiser:
    """A small unconditional U-Net."""
    torch.manual_seed(0)
    config = unet.UNetConfig(path=path, block_out_channels=(16, 32), layers_per_block=1)
    denoiser = unet.build(config, (3, 8, 8), None)
    nn.init.normal_(denoiser.net.conv_out.weight, std=0.2)
    return denoiser


def taught(denoiser: Denoiser, steps: tuple[int, ...] = (1, 2, 4)) -> tuple[Denoiser, SamplerSpec]:
    """The network as MeanFlow leaves it: what it adds for the length of a step is no longer zero."""
    method = MeanFlow(MeanFlow.Config(velocity="data", steps=steps, drop_label=0.0), denoiser)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.extra.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return denoiser.eval(), method.sampler()


def saved(folder: Path, denoiser: Denoiser, spec: SamplerSpec, **facts: str) -> Path:
    Student(denoiser, spec, {"method": "meanflow", **facts}).save(folder / "student")
    return folder / "student"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_length_of_every_step_is_one_number_on_a_rectified_flow(steps):
    denoiser, spec = taught(net())
    assert constant_gap(denoiser, alone(spec, steps)) == pytest.approx(1 / steps, abs=1e-9)


def test_a_folded_network_needs_no_second_time():
    denoiser, spec = taught(net())
    z = torch.randn(2, 3, 8, 8)
    for steps in (1, 2):
        plain, _ = taught(net())
        fold_gap(plain, constant_gap(plain, alone(spec, steps)))
        del plain.extra["gap"]
        one_time = replace(spec, two_time=False)
        expected = few_step.sample(denoiser, spec, z, steps)
        torch.testing.assert_close(few_step.sample(plain, one_time, z, steps), expected, rtol=1e-5, atol=1e-5)
        other = few_step.sample(plain, one_time, z, 3 - steps)  # the fold is for one number of steps
        assert (other - few_step.sample(denoiser, spec, z, 3 - steps)).abs().max() > 0.01


def test_each_number_of_steps_is_a_folder(tmp_path):
    student = saved(tmp_path, *taught(net()))
    for n in (1, 2, 4):
        made = export(student, "diffusers", tmp_path / f"out-{n}", steps=n)
        assert f"num_inference_steps={n}" in made.line and made.error < 1e-4
        card = (made.folder / "README.md").read_text()
        assert f"for runs of {n} step(s) and no other" in card and f"Steps: {n};" in card


@pytest.mark.slow
def test_pixel_students_without_fastgen(tmp_path):
    student = saved(tmp_path, *taught(net()))
    lines = {str(n): export(student, "diffusers", tmp_path / f"out-{n}", steps=n).line for n in (1, 2, 4)}
    images = exports.stock(lines, tmp_path)
    for n, image in images.items():
        ours = exports.own(student, int(n)).numpy()
        assert ours.std() > 0.02 and np.abs(image - ours).max() < LIMIT
    assert np.abs(images["1"] - images["2"]).max() > 10 * LIMIT


@pytest.mark.slow
def test_stable_diffusion_in_one_step(tmp_path):
    teacher = tiny.stable_diffusion(tmp_path / "sd1")
    denoiser = read_denoiser(teacher)[0].requires_grad_(True)
    student = saved(tmp_path, *taught(denoiser, steps=(1,)), base_model=str(teacher))
    for kind in ("diffusers", "single-file"):
        made = export(student, kind, tmp_path / kind)
        image = exports.stock({"image": made.line}, tmp_path)["image"]
        ours = exports.own(student, 1).numpy()
        assert ours.std() > 0.02 and np.abs(image - ours).max() < LIMIT


def test_a_table_of_levels_is_run_in_one_step_by_the_scheduler_of_one_step_students(tmp_path):
    denoiser, spec = taught(net("VP"))
    made = export(saved(tmp_path, denoiser, spec), "diffusers", tmp_path / "out", steps=1)
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["scheduler"][1] == "LCMScheduler" and made.error < 1e-4
    entry = replay(denoiser, alone(spec, 1))
    assert entry.gap == pytest.approx(0.93595 - 0.02839, abs=1e-4)  # the table ends before pure noise and before data
    with pytest.raises(UserError, match=r"2 steps have the lengths 0.468, 0.4396"):
        export(tmp_path / "student", "diffusers", tmp_path / "two", steps=2)
    assert not (tmp_path / "two").exists()


def test_what_cannot_be_exported_is_known_before_training():
    denoiser, spec = taught(net("VP"))
    with pytest.raises(UserError, match=r"lengths .* one step can be exported"):
        refuse_unreplayable(denoiser, spec)
    refuse_unreplayable(denoiser, alone(spec, 1))
    refuse_unreplayable(*taught(net()))
    # A network whose time is in thousandths is never told a third of it.
    with pytest.raises(UserError, match="to the network; stock schedulers visit whole numbers"):
        refuse_unreplayable(*taught(net(), steps=(3,)))


@pytest.mark.parametrize(
    ("steps", "message"), [(None, "one folder for each number of steps; choose one of 1, 2, 4"), (3, "steps=3")]
)
def test_the_number_of_steps_is_asked_for(steps, message, tmp_path):
    student = saved(tmp_path, *taught(net()))
    with pytest.raises(UserError, match=message):
        export(student, "diffusers", tmp_path / "out", steps=steps)
    assert not (tmp_path / "out").exists()


def test_other_students_have_no_such_choice(tmp_path):
    denoiser = net()
    student = saved(tmp_path, denoiser, SamplerSpec(path=RF, times={n: RF.grid(n) for n in (1, 2)}, init=RF.init))
    with pytest.raises(UserError, match="--steps 1: this student's export serves all"):
        export(student, "diffusers", tmp_path / "out", steps=1)


def test_the_command_has_the_option(tmp_path):
    student = saved(tmp_path, *taught(net()))
    refused = call("export", student, "--to", "diffusers", tmp_path / "out", "--device", "cpu")
    assert refused.code == 2 and "--steps: the network is told how far it steps" in refused.message
    ended = call("export", student, "--to", "diffusers", tmp_path / "out", "--steps", "2", "--device", "cpu")
    assert ended.code == 0 and "num_inference_steps=2" in ended.out, ended.err


def test_a_fold_of_another_length_is_not_handed_over(tmp_path, monkeypatch):
    student = saved(tmp_path, *taught(net()))
    fold = make.fold_gap
    monkeypatch.setattr(make, "fold_gap", lambda denoiser, gap: fold(denoiser, 2 * gap))
    with pytest.raises(RunFailed, match="nothing was written"):
        export(student, "diffusers", tmp_path / "out", steps=2)
    assert not (tmp_path / "out").exists()
