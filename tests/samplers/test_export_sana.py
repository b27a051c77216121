"""SANA students by SCM's schedule: which are replayed, which refused, and what stock diffusers makes of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler

from fastgen.errors import UserError
from fastgen.paths import RectifiedFlow, TrigFlow
from fastgen.samplers import scm
from fastgen.samplers.export.make import export
from fastgen.samplers.replay import refuse_unreplayable, replay
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import read_denoiser
from fastgen.teachers.sana import SanaDenoiser
from tests import tiny
from tests.samplers import exports

SPEC = SamplerSpec(path=scm.PATH, times={n: scm.times(n) for n in (1, 2, 4)}, renoise=True, guidance=4.5)
LIMIT = 2e-3


def made(folder: Path, spec: SamplerSpec = SPEC, **config: Any) -> Path:
    """A student folder as sCM makes it of a prepared teacher; `config` of its transformer."""
    if config:
        torch.manual_seed(0)
        tiny.sana_transformer(**config).save_pretrained(tiny.sana(folder / "teacher") / "transformer")
    denoiser: Any = read_denoiser(folder / "teacher" if config else tiny.sana(folder / "teacher"))[0]
    denoiser.prepare(qk_norm=True)
    denoiser.add_guidance()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    facts = {"method": "scm", "method_config": {"guidance": [4.0, 4.5, 5.0]}, "license": "nsclv1"}
    Student(denoiser, spec, facts).save(folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    return export(student, "diffusers", tmp_path_factory.mktemp("exports") / "out")


def sprint() -> SanaDenoiser:
    return denoiser_of(guidance_embeds=True, timestep_scale=0.001)


def denoiser_of(**config: Any) -> SanaDenoiser:
    from fastgen.paths import Prediction

    net: Any = tiny.sana_transformer(**config)
    scale = 1000 * net.config.timestep_scale
    return SanaDenoiser(net, RectifiedFlow(), Prediction(kind="flow"), shape=(4, 2, 2), time_scale=scale)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_the_times_are_those_of_the_stock_scheduler(n):
    scheduler = SCMScheduler(**scm.CONFIG)
    scheduler.set_timesteps(n, **({} if n == 2 else {"intermediate_timesteps": None}))
    assert np.allclose(scheduler.timesteps[:-1].numpy(), scm.times(n), atol=scm.NEAR)
    if n != 2:
        with pytest.raises(ValueError, match="Intermediate timesteps"):
            scheduler.set_timesteps(n)  # so the card's line must say more


def test_a_student_of_that_form_is_replayed_whatever_its_own_path_is_called():
    found = replay(sprint(), SPEC)
    assert (found.scheduler, found.steps) == ("SCMScheduler", (1, 2, 4)) and found.make().config.sigma_data == 0.5
    half = TrigFlow(sd=0.5)  # the same levels under another name
    angles = half.time(*scm.PATH.levels(torch.tensor(scm.times(2), dtype=torch.float64))).tolist()
    refuse_unreplayable(sprint(), replace(SPEC, path=half, times={2: tuple(angles)}))


FLOW = {2: (1.0, 0.5)}


@pytest.mark.parametrize(
    ("config", "spec", "told"),
    [
        ({"guidance_embeds": True}, SPEC, r"counts time to 1000, SanaSprintPipeline to 1: prepare the teacher first"),
        ({"timestep_scale": 0.001}, SPEC, r"no input for the guidance weight.*method\.guidance=\[4,4\.5,5\]"),
        ({}, replace(SPEC, guidance=None), r"no guidance weight, .* set method\.guidance"),
        ({}, replace(SPEC, renoise=False), r"fresh noise between its steps"),
        ({}, replace(SPEC, path=RectifiedFlow(), times=FLOW), r"2 step\(s\) at the angles 1\.571, 0\.7854; .* 1\.3"),
        ({}, replace(SPEC, times={2: (TrigFlow.start, 1.0)}), r"at the angles 1\.571, 1; SanaSprintPipeline visits"),
        ({}, replace(SPEC, times={1: (1.5645,)}), r"1 step\(s\) at the angles 1\.565; .* visits 1\.571"),
    ],
)
def test_others_are_refused_at_the_start_in_one_line(config, spec, told):
    denoiser = denoiser_of(**config) if config else sprint()
    with pytest.raises(UserError, match=told) as caught:
        refuse_unreplayable(denoiser, spec)
    assert "\n" not in str(caught.value)


def test_a_network_that_is_told_two_times_is_refused():
    denoiser = sprint()
    denoiser.add_gap()
    with pytest.raises(UserError, match="tells one time"):
        replay(denoiser, SPEC)


@pytest.mark.parametrize("kind", ["lora", "single-file"])
def test_layouts_of_stable_diffusion_are_refused(student, tmp_path, kind):
    with pytest.raises(UserError, match=f"--to {kind}: a layout of Stable Diffusion; this sana goes --to diffusers"):
        export(student, kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_a_sprint_pipelines(exported):
    folder = exported.folder
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert {name for name, value in index.items() if isinstance(value, list)} == {
        *("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert {key: scheduler[key] for key in ("_class_name", "prediction_type", "sigma_data")} == {
        "_class_name": "SCMScheduler",
        "prediction_type": "trigflow",
        "sigma_data": 0.5,
    }
    config = json.loads((folder / "transformer/config.json").read_text())
    assert config["guidance_embeds"] and config["qk_norm"] == "rms_norm_across_heads"
    assert config["timestep_scale"] == 0.001 and config["guidance_embeds_scale"] == 0.1
    assert exported.error < 1e-4


def test_the_line_and_the_card_say_what_the_pipeline_must_be_told(exported, student):
    card = (exported.folder / "README.md").read_text()
    assert "intermediate_timesteps=None" in exported.line and "num_inference_steps=1" in exported.line
    assert "must be told `intermediate_timesteps=None`" in card and "license: nsclv1" in card
    assert "`guidance_scale` is 4.5 above, 4, 4.5, 5 were trained" in card and "(`guidance_embeds`)" in card


def lines(folder: Path, line: str) -> dict[str, str]:
    """The printed line for each number of steps; two steps are the plain call."""
    found = {str(n): line.replace("num_inference_steps=1", f"num_inference_steps={n}") for n in (1, 2, 4)}
    found["2"] = found["2"].replace(", intermediate_timesteps=None", "")
    return found


@pytest.mark.slow
def test_stock_diffusers_makes_the_students_images(exported, student, tmp_path):
    """In a process that cannot import fastgen, at every number of steps."""
    found = exports.stock(lines(exported.folder, exported.line), tmp_path)
    for n in (1, 2, 4):
        ours = exports.own(student, n).numpy()
        assert ours.std() > 0.02 and np.abs(found[str(n)] - ours).max() < LIMIT


@pytest.mark.slow
def test_at_its_own_size_two_steps_are_the_plain_call(tmp_path):
    """1024 pixels and two steps are what the pipeline does when told a prompt and nothing else."""
    student = made(tmp_path, replace(SPEC, times={2: scm.times(2)}), sample_size=32)
    result = export(student, "diffusers", tmp_path / "out")
    assert "height" not in result.line and "timesteps" not in result.line
    load = f'pipe = DiffusionPipeline.from_pretrained("{result.folder}")'
    call = f'image = pipe("{exports.PROMPT}", generator=torch.Generator().manual_seed(0)).images[0]'
    plain = f"import torch; from diffusers import DiffusionPipeline; {load}; {call}"
    found = exports.stock({"plain": plain}, tmp_path)["plain"]
    assert found.shape == (1024, 1024, 3) and np.abs(found - exports.own(student, 2).numpy()).max() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_stored_as_a_variant_and_its_error_told(student, tmp_path, dtype):
    result = export(student, "diffusers", tmp_path / "out", dtype=dtype)
    assert f'variant="{dtype}"' in result.line and 1e-5 < result.error < 0.2
    assert (tmp_path / "out/transformer" / f"diffusion_pytorch_model.{dtype}.safetensors").exists()


@pytest.mark.slow
def test_another_usual_weight_is_told(tmp_path):
    student = made(tmp_path, replace(SPEC, times={1: scm.times(1)}, guidance=3.0))
    assert "guidance_scale=3.0" in export(student, "diffusers", tmp_path / "out").line
