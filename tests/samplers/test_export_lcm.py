"""Exports of students that are told their guidance weight, and of LCM-LoRAs: stock diffusers makes their images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgen.errors import UserError
from fastgen.nets.lora import LoraConfig, add_lora, lora_settings, lora_tensors, merged
from fastgen.samplers import few_step
from fastgen.samplers.export.make import Exported, export
from fastgen.student import Adapters, SamplerSpec, Student
from fastgen.teacher import read_denoiser
from tests import tiny
from tests.samplers import exports

LIMIT = 2e-3
TIMES = {
    1: (999.0,),
    2: (999.0, 499.0),
    4: (999.0, 759.0, 499.0, 259.0),
    8: (999.0, 879.0, 759.0, 639.0, 499.0, 379.0, 259.0, 139.0),
}
FACTS = {"method": "lcm", "method_config": {"name": "lcm", "w_min": 5.0, "w_max": 15.0}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def student(folder: Path, teacher: Path, *, lora: bool = False, guidance: float = 8.5) -> Path:
    """A student whose image depends on its weight of guidance, or a LoRA."""
    denoiser: Any = read_denoiser(teacher)[0]
    torch.manual_seed(1)
    adapters = None
    if lora:
        denoiser = add_lora(denoiser, LoraConfig(rank=4, alpha=8), seed=0)
        for tensor in lora_tensors(denoiser).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        adapters = Adapters(lora_tensors(denoiser), lora_settings(denoiser))
        denoiser = merged(denoiser)
    else:
        denoiser.add_guidance()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            torch.nn.init.normal_(denoiser.net.time_embedding.cond_proj.weight, std=0.3)
    spec = SamplerSpec(
        path=denoiser.path, times=TIMES, renoise=True, guidance=None if lora else guidance, init=denoiser.path.init
    )
    place = folder / f"{teacher.name}-{'lora' if lora else guidance}"
    Student(denoiser, spec, {**FACTS, "base_model": str(teacher)}, adapters).save(place)
    return place


def own(folder: Path, steps: int, guidance: float | None = None) -> np.ndarray:
    """The student's own image of `exports.PROMPT`, at another weight if asked."""
    if guidance is None:
        return exports.own(folder, steps).numpy()
    loaded, generator = Student.load(folder), torch.Generator().manual_seed(0)
    denoiser: Any = loaded.denoiser.eval()
    draw = lambda _: torch.randn(1, *denoiser.shape, generator=generator)  # noqa: E731
    cond = {**denoiser.codec.encode_prompts([exports.PROMPT]), "guidance": torch.tensor([guidance])}
    with torch.inference_mode():
        image = denoiser.codec.decode(few_step.sample(denoiser, loaded.sampler, draw(0), steps, cond, renoise=draw))
    return (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def at(made: Exported, steps: int, *more: str) -> str:
    """The printed line at another number of steps and with further arguments."""
    return made.line.replace("num_inference_steps=1", ", ".join([f"num_inference_steps={steps}", *more]))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("sd1")
    place = student(folder, tiny.stable_diffusion(folder / "sd1"))
    return place, export(place, "diffusers", folder / "out")


@pytest.fixture(scope="module")
def images(sd1, tmp_path_factory) -> dict[str, np.ndarray]:
    """What stock diffusers makes of the printed line, at another weight, with too many steps, and of a call with
    nothing but the prompt. (Every count was replayed by the export.)"""
    made = sd1[1]
    lines = {"1": made.line, "12": at(made, 2, "guidance_scale=12.0"), "many": at(made, 51)}
    lines["bare"] = made.line.replace("num_inference_steps=1, ", "")
    return exports.stock(lines, tmp_path_factory.mktemp("stock"))


@pytest.mark.slow
def test_the_printed_line_makes_the_students_image(sd1, images):
    ours = own(sd1[0], 1)
    assert ours.std() > 0.02 and np.abs(images["1"] - ours).max() < LIMIT
    assert sd1[1].error < LIMIT


@pytest.mark.slow
def test_a_call_with_nothing_but_the_prompt_makes_four_steps_at_the_trained_weight(sd1, images):
    assert "num_inference_steps" in sd1[1].line and "guidance_scale" not in sd1[1].line
    assert np.abs(images["bare"] - own(sd1[0], 4)).max() < LIMIT


@pytest.mark.slow
def test_another_weight_is_the_students_own_other_weight(sd1, images):
    assert np.abs(images["12"] - own(sd1[0], 2, 12.0)).max() < LIMIT
    assert np.abs(images["12"] - own(sd1[0], 2)).max() > 20 * LIMIT


@pytest.mark.slow
def test_more_steps_than_training_points_raise(images):
    assert "original_steps" in str(images["many"])


def test_the_folder_names_lcms_pipeline_and_holds_the_real_input(sd1):
    place, made = sd1
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline" and index["scheduler"][1] == "LCMScheduler"
    scheduler = json.loads((made.folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["original_inference_steps"] == 50
    weights = load_file(made.folder / "unet" / "diffusion_pytorch_model.safetensors")
    expected = Student.load(place).denoiser.net.time_embedding.cond_proj.weight
    assert torch.equal(weights["time_embedding.cond_proj.weight"], expected)
    again: Any = read_denoiser(made.folder)[0]
    assert again.takes_guidance and again.distilled


def test_the_card_says_what_the_weight_is_and_what_other_counts_do(sd1):
    text = (sd1[1].folder / "README.md").read_text()
    for words in (
        "`guidance_scale` is 8.5 above, 6 .. 16 were trained",
        "others up to 50 run at times of the training",
        "ComfyUI, A1111 (not tried here): no layout of theirs",
    ):
        assert words in text
    assert "off in the network" not in text and "cfg" not in text
    assert "Guidance is an input of the network, 8.5 unless" in (sd1[0] / "README.md").read_text()


@pytest.mark.parametrize("kind", ["single-file", "lora"])
def test_layouts_without_a_place_for_the_weight_are_refused(kind, sd1, tmp_path):
    with pytest.raises(UserError, match="no place for; use --to diffusers" if kind == "single-file" else "no LoRA"):
        export(sd1[0], kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_student_that_is_not_told_loses_the_input_of_the_network_it_began_as(tmp_path):
    """Begun as an LCM and trained without its input: the folder must not feed it the pipeline's weight."""
    place = student(tmp_path, tiny.stable_diffusion(tmp_path / "sd"))
    loaded = Student.load(place)
    spec = SamplerSpec(path=loaded.sampler.path, times={1: (999.0,)}, init="unit")
    Student(loaded.denoiser, spec, {"method": "reflow"}).save(tmp_path / "plain")
    made = export(tmp_path / "plain", "diffusers", tmp_path / "out")
    weights = load_file(made.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert made.error < LIMIT and not weights["time_embedding.cond_proj.weight"].any()
    assert json.loads((made.folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.slow
def test_xl_is_called_with_its_weight(tmp_path):
    """XL's pipeline takes 5 for the default: the printed line says the trained one. 50 steps, its default, are all of
    the training points."""
    place = student(tmp_path, tiny.sdxl(tmp_path / "xl"))
    made = export(place, "diffusers", tmp_path / "out")
    assert "guidance_scale=8.5" in made.line
    lines = {str(n): at(made, n) for n in TIMES} | {"50": at(made, 50), "51": at(made, 51)}
    found = exports.stock(lines, tmp_path)
    for n in TIMES:
        assert np.abs(found[str(n)] - own(place, n)).max() < LIMIT
    assert np.isfinite(found["50"]).all() and "original_steps" in str(found["51"])


@pytest.mark.slow
def test_a_weight_that_is_not_the_pipelines_default_is_said(tmp_path):
    place = student(tmp_path, tiny.stable_diffusion(tmp_path / "sd", prediction_type="v_prediction"), guidance=6.0)
    made = export(place, "diffusers", tmp_path / "out")
    assert "guidance_scale=6.0" in made.line
    assert np.abs(exports.stock({"image": at(made, 2)}, tmp_path)["image"] - own(place, 2)).max() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_lora_at_every_count(kind, keys, tmp_path):
    teacher = {"sd": tiny.stable_diffusion, "xl": tiny.sdxl}[kind](tmp_path / kind)
    place = student(tmp_path, teacher, lora=True)
    made = export(place, "lora", tmp_path / "out", keys=keys)
    assert "original_inference_steps=50" in made.line and "guidance_scale=1.0" in made.line
    found = exports.stock({str(n): at(made, n) for n in TIMES}, tmp_path)
    for n in TIMES:
        assert np.abs(found[str(n)] - own(place, n)).max() < LIMIT
