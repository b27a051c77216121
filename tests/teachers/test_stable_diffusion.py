"""Stable Diffusion 1.x, 2.x and XL as a Denoiser: the stock pipeline is the truth."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from fastgen import api
from fastgen.errors import UserError
from fastgen.paths import VP, RectifiedFlow
from fastgen.samplers import ode
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import Teacher, read_denoiser
from tests import tiny

KINDS = ("eps", "v", "xl")
PROMPTS = ["a red fox", "a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {
        "eps": tiny.stable_diffusion(root / "eps"),
        "v": tiny.stable_diffusion(root / "v", "v_prediction", zero_snr=True),
        "xl": tiny.sdxl(root / "xl"),
    }


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["eps"], tmp_path / "copied"))


def stock(folder: Path, z: torch.Tensor, *, guidance: float, steps: int) -> torch.Tensor:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    options = {"latents": z, "guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
    side = 2 * tiny.LATENT
    return pipeline(PROMPTS, height=side, width=side, **options).images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_euler_is_the_stock_pipelines_ddim(folders, kind, guidance):
    denoiser, _ = read_denoiser(folders[kind])
    z = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    cond = denoiser.codec.encode_prompts(PROMPTS)
    x0 = ode.solve(Teacher(denoiser, guidance=guidance), z, steps=5, solver="euler", cond=cond)
    with torch.no_grad():
        images = denoiser.codec.decode(x0)
    expected = stock(folders[kind], z, guidance=guidance, steps=5)
    assert expected.std() > 0.05
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), expected, atol=2e-5)


def test_each_kind_is_read_with_its_conventions(folders):
    eps, v, xl = (read_denoiser(folders[kind])[0] for kind in KINDS)
    assert (eps.prediction.kind, v.prediction.kind, xl.prediction.kind) == ("eps", "v", "eps")
    assert eps.path == VP() and v.path == VP(zero_snr=True)
    assert eps.shape == (4, 8, 8) and eps.codec.image_shape == (3, 16, 16) and eps.codec.factor == 2
    assert (eps.xl, xl.xl) == (False, True) and (eps.usual_guidance, xl.usual_guidance) == (7.5, 5.0)
    assert set(xl.null) == {"text", "pooled", "time_ids"} and set(eps.null) == {"text"}
    assert not xl.null["text"].any() and eps.null["text"].any()  # XL's empty prompt is zeros


def test_the_unguided_half_of_a_batch_keeps_the_framing_of_its_row(folders):
    denoiser, _ = read_denoiser(folders["xl"])
    cond = denoiser.codec.encode_prompts(PROMPTS)
    cond["time_ids"][1] = torch.tensor([40.0, 30, 5, 6, 16, 16])
    null = denoiser.unconditional(cond)
    assert torch.equal(null["time_ids"], cond["time_ids"]) and not null["text"].any()


def test_guidance_holds_inside_its_interval_only(folders):
    denoiser, _ = read_denoiser(folders["eps"])
    cond = denoiser.codec.encode_prompts(PROMPTS)
    x, t = torch.randn(2, *denoiser.shape), torch.tensor([999.0, 500.0])
    alpha, sigma = denoiser.path.levels(t)
    between = float((sigma / alpha).mean())
    bounded = Teacher(denoiser, guidance=4.0, guidance_interval=(0.0, between))(x, t, cond).x0
    assert torch.allclose(bounded[0], denoiser(x, t, cond).x0[0], rtol=1e-4, atol=1e-3)
    assert torch.allclose(bounded[1], Teacher(denoiser, guidance=4.0)(x, t, cond).x0[1], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(bounded[1], denoiser(x, t, cond).x0[1], rtol=1e-2, atol=1e-2)


def test_half_precision_files_become_float32_and_it_is_said(copied, caplog):
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = copied / part / f"{name}.safetensors"
        save_file(
            {key: value.half() for key, value in load_file(file).items()},
            file.with_suffix(".fp16.safetensors"),
            {"format": "pt"},
        )
        file.unlink()
    with caplog.at_level(logging.WARNING):
        denoiser, _ = read_denoiser(copied)
    assert "float16 weights, kept in float32" in caplog.text
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert denoiser.codec.encode_prompts(["x"])["text"].dtype == torch.float32
    assert denoiser.codec.modules()["vae"].dtype == torch.float32


def test_sharded_weights_are_read(folders, copied):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, file.with_name(name))
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (copied / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    whole, shards = read_denoiser(folders["eps"])[0], read_denoiser(copied)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), shards.parameters(), strict=True))


def test_sizes_are_free_in_steps_of_the_vae(folders):
    denoiser, _ = read_denoiser(folders["xl"])
    assert denoiser.resized(24, 32).shape == (4, 12, 16)
    assert denoiser.codec.image_shape == (3, 24, 32)
    assert denoiser.codec.encode_prompts(["x"])["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]
    with pytest.raises(UserError, match=r"size 17x16: the VAE works in steps of 2 pixels; nearest 16x16"):
        denoiser.resized(17, 16)


def test_a_student_folder_holds_all_that_it_needs(folders, tmp_path):
    denoiser, _ = read_denoiser(folders["eps"])
    spec = SamplerSpec(path=denoiser.path, times={1: (999.0,)}, init="unit")
    Student(denoiser, spec, {"method": "reflow"}).save(tmp_path / "student")
    moved = tmp_path / "student"
    names = {path.name for path in moved.iterdir()}
    assert {"unet", "scheduler", "vae", "text_encoder", "tokenizer", "fastgen.json", "README.md"} <= names
    assert "model_index.json" not in names  # a stock pipeline would run it at its own defaults
    images = api.load(moved, device="cpu").sample(prompts=["a fox"], num=3, batch=2)
    again = api.Generator(Student(denoiser, spec, {})).sample(prompts=["a fox"] * 3, num=3, batch=3)
    assert images.shape == (3, 3, 16, 16) and torch.allclose(images, again, atol=1e-5)
    assert not torch.allclose(images[0], images[1])


def test_another_path_asks_the_same_network(folders):
    denoiser, _ = read_denoiser(folders["v"])
    pair = denoiser(torch.randn(1, *denoiser.shape), torch.tensor([0.5]), denoiser.null, on=RectifiedFlow())
    assert pair.x0.isfinite().all()


def spoil_index(key: str, value: Any):
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def spoil_unet(**values: Any):
    def change(folder: Path) -> None:
        file = folder / "unet/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            spoil_index("_class_name", "StableDiffusionInpaintPipeline"),
            "pipeline StableDiffusionInpaintPipeline is not",
        ),
        (spoil_unet(in_channels=9), "9 channels in, 4 out: an inpainting or editing network"),
        (spoil_unet(sample_size=None), "no sample_size"),
        (spoil_unet(addition_embed_type="image"), "addition_embed_type image is not supported"),
        (spoil_unet(cross_attention_dim=48), "config and weights do not match"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "no such file"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json: no such file"),
        (lambda f: (f / "vae/config.json").write_text("{"), "not readable as JSON"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(copied, change, told):
    change(copied)
    with pytest.raises(UserError, match=told) as caught:
        read_denoiser(copied)
    assert "\n" not in str(caught.value) and str(copied) in str(caught.value)


@pytest.mark.parametrize(("unet", "text"), [("eps", "xl"), ("xl", "eps")])
def test_a_unet_and_text_encoders_of_different_families_are_refused(folders, tmp_path, unet, text):
    mixed = shutil.copytree(folders[text], tmp_path / "mixed")
    shutil.rmtree(mixed / "unet")
    shutil.copytree(folders[unet] / "unet", mixed / "unet")
    with pytest.raises(UserError, match="parts of different families"):
        read_denoiser(mixed)


def test_parts_that_are_broken_are_told_when_they_are_needed(copied):
    denoiser, _ = read_denoiser(copied)
    file = copied / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no AutoencoderKL can be made of it"):
        denoiser.codec.decode(torch.zeros(1, *denoiser.shape))
    (copied / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no CLIP tokenizer can be made of it"):
        denoiser.codec.encode_prompts(["x"])


def test_without_a_text_encoder_prompts_are_refused_and_guidance_too(copied):
    shutil.rmtree(copied / "text_encoder")
    denoiser, _ = read_denoiser(copied)
    assert not denoiser.has_null
    with pytest.raises(UserError, match=r"no text encoder; put text_encoder/ and tokenizer/"):
        denoiser.codec.encode_prompts(["x"])
    with pytest.raises(UserError, match=r"guidance=3\.0"):
        Teacher(denoiser, guidance=3.0)


def test_an_image_of_text_models_needs_a_prompt_and_takes_no_label(folders):
    model = api.load(folders["eps"], device="cpu")
    with pytest.raises(UserError, match="reads text"):
        model.sample()
    with pytest.raises(UserError, match="as many as images"):
        model.sample(num=3, prompts=["a", "b"])
    with pytest.raises(UserError, match="give it a prompt"):
        model.sample(prompts=["a"], label=1)
    (picture,) = model.generate("a fox", steps=1, solver="euler")
    assert picture.size == (16, 16)
