"""SANA and SANA-Sprint as a Denoiser: the stock pipelines are the truth, and stock code reads what was changed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

from fastgen import api
from fastgen.errors import UserError
from fastgen.nets import sana as changes
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.samplers import few_step, ode, scm
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import Teacher, read_denoiser
from fastgen.teachers.sana import SanaDenoiser
from tests import tiny

PROMPTS = ["a red fox", "An Owl in snow "]
SIDE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {"base": tiny.sana(root / "base"), "sprint": tiny.sana_sprint(root / "sprint")}


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["base"], tmp_path / "copied"))


def bare(**options: Any) -> SanaDenoiser:
    """A transformer alone."""
    torch.manual_seed(0)
    net = tiny.sana_transformer(**options)
    scale = 1000 * net.config.timestep_scale
    return SanaDenoiser(net, RectifiedFlow(), Prediction(kind="flow"), shape=(4, 2, 2), time_scale=scale)


def asked(n: int = 3, **more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """x, t and a condition of n rows, whose texts are of different lengths."""
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5])[:n, None]).float()
    cond = {"text": torch.randn(n, 7, 16, generator=g), "text_mask": mask, **more}
    return torch.randn(n, 4, 2, 2, generator=g), torch.tensor([0.1, 0.6, 1.0])[:n], cond


def stock(folder: Path, **options: Any) -> torch.Tensor:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if options.get("sigmas"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    plain = {"height": SIDE, "width": SIDE, "use_resolution_binning": False, "output_type": "pt"}
    return pipeline(PROMPTS, **plain, **options).images


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_euler_is_the_stock_pipelines_flow(folders, guidance):
    denoiser, _ = read_denoiser(folders["base"])
    z = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    cond = denoiser.codec.encode_prompts(PROMPTS)
    x0 = ode.solve(Teacher(denoiser, guidance=guidance), z, steps=4, solver="euler", cond=cond)
    with torch.no_grad():
        images = denoiser.codec.decode(x0)
    expected = stock(folders["base"], latents=z, guidance_scale=guidance, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert expected.std() > 0.05
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), expected, atol=2e-5)


def test_sprint_on_trigflow_is_the_stock_pipeline(folders):
    denoiser, _ = read_denoiser(folders["sprint"])
    assert denoiser.time_scale == 1 and denoiser.takes_guidance and denoiser.distilled
    z = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    fresh = lambda _: torch.randn(z.shape, generator=generator)  # noqa: E731
    spec = SamplerSpec(path=scm.PATH, times={2: scm.times(2)}, renoise=True, guidance=4.5)
    with torch.no_grad():
        x0 = few_step.sample(denoiser, spec, z, 2, denoiser.codec.encode_prompts(PROMPTS), renoise=fresh)
        images = denoiser.codec.decode(x0)
    expected = stock(folders["sprint"], latents=z, generator=torch.Generator().manual_seed(3))
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)


def test_what_the_folders_say(folders):
    base, _ = read_denoiser(folders["base"])
    assert base.time_scale == 1000 and not base.takes_guidance and not base.distilled
    assert base.shape == (4, 2, 2) and base.codec.image_shape == (3, 64, 64) and base.codec.factor == 32
    assert base.usual_guidance == 4.5 and base.has_null and base.embedding_width == 32
    assert len(base.blocks) == 2 and base.resized(64, 96).shape == (4, 2, 3)
    sprint, _ = read_denoiser(folders["sprint"])
    assert sprint.usual_guidance is None
    with pytest.raises(UserError, match="takes the guidance weight as an input, and none was given"):
        sprint(*asked())


def test_the_time_argument_is_a_thousand_times_the_flows():
    seen = []
    denoiser = bare()
    denoiser.net.time_embed.emb.time_proj.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    x, t, cond = asked()
    denoiser(x, t, cond)
    assert torch.allclose(seen[0], 1000 * t) and seen[0].dtype == torch.float32


def test_masked_tokens_do_not_count():
    denoiser = bare()
    x, t, cond = asked()
    other = {**cond, "text": torch.where(cond["text_mask"][..., None] > 0, cond["text"], 100.0)}
    assert torch.allclose(denoiser(x, t, cond).x0, denoiser(x, t, other).x0, atol=1e-5)


def test_a_new_guidance_input_changes_nothing_and_can_be_learnt():
    denoiser = bare(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    x, t, cond = asked()
    before = denoiser(x, t, cond)
    denoiser.add_guidance()
    weights = torch.tensor([1.0, 4.5, 8.0])
    after = denoiser(x, t, {**cond, "guidance": weights})
    assert torch.equal(before.x0, after.x0) and torch.equal(before.eps, after.eps)
    after.x0.square().mean().backward()
    layers = denoiser.net.time_embed.guidance_embedder
    assert layers.linear_2.weight.grad.abs().max() > 0  # nothing but a bias would learn if both layers were zero
    with torch.no_grad():
        layers.linear_2.weight.add_(0.1 * torch.randn_like(layers.linear_2.weight))
        one, other = (denoiser(x, t, {**cond, "guidance": w}).x0 for w in (weights, 2 * weights))
    assert not torch.allclose(one, other)


def test_the_guidance_weight_is_scaled_as_the_stock_pipeline_scales_it():
    denoiser, seen = bare(guidance_embeds=True, guidance_embeds_scale=0.3), []
    denoiser.net.time_embed.guidance_condition_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    x, t, cond = asked(guidance=torch.tensor([1.0, 4.0, 5.0]))
    denoiser(x, t, cond)
    assert torch.allclose(seen[0], torch.tensor([0.3, 1.2, 1.5]))


def test_changed_networks_are_read_back_by_stock_code_and_by_ours(tmp_path):
    denoiser = bare()
    denoiser.prepare(qk_norm=True)
    denoiser.add_guidance()
    denoiser.add_gap()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    x, t, cond = asked(guidance=torch.tensor([1.0, 4.0, 5.0]))
    denoiser.net.save_pretrained(tmp_path / "net")
    net: Any = SanaTransformer2DModel.from_pretrained(tmp_path / "net").eval()
    assert net.config.guidance_embeds and net.config.timestep_scale == 0.001
    theirs = SanaDenoiser(net, denoiser.path, denoiser.prediction, shape=denoiser.shape)
    with torch.no_grad():
        no_gap = torch.zeros(3, 32)
        assert torch.equal(denoiser.raw(x, t, cond, no_gap), theirs.raw(x, t, cond, None))
    spec = SamplerSpec(path=scm.PATH, times={1: scm.times(1)}, renoise=True, guidance=4.5)
    Student(denoiser, spec, {}).save(tmp_path / "student")
    again = Student.load(tmp_path / "student").denoiser
    assert again.time_scale == 1 and again.two_time and again.takes_guidance and "guidance" not in again.extra
    r = torch.tensor([0.0, 0.3, 0.4])
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, cond, r=r).x0, again(x, t, cond, r=r).x0)
        assert not torch.allclose(again(x, t, cond, r=r).x0, again(x, t, cond).x0)


def test_normalised_queries_leave_the_linear_attention_as_it_was():
    denoiser = bare()
    x, t, cond = asked()
    before = denoiser(x, t, cond).x0
    changes.add_qk_norm(denoiser.net)
    for block in denoiser.net.transformer_blocks:
        block.attn1.norm_k = block.attn2.norm_q = block.attn2.norm_k = None
    assert torch.allclose(denoiser(x, t, cond).x0, before, atol=1e-5)
    changes.add_qk_norm(denoiser.net)
    assert not torch.allclose(denoiser(x, t, cond).x0, before, atol=1e-3)


@pytest.mark.parametrize(("wave", "limit"), [(1.0, 1e-3), (10.0, 1e-2)])
def test_a_smooth_embedding_survives_the_change_of_time(wave, limit):
    """An embedding that only uses waves this many radians long over [0, 1]; its derivative stays what it was."""
    denoiser = bare(num_attention_heads=8, cross_attention_dim=64, num_cross_attention_heads=4)
    layer = changes.embedder(denoiser.net)
    frequencies = 1000 * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    with torch.no_grad():
        layer.linear_1.weight[:, (frequencies > wave).repeat(2)] = 0
    x, t, cond = asked()
    before = denoiser(x, t, cond).velocity
    off = denoiser.prepare(qk_norm=False)
    after = denoiser(x, t, cond).velocity
    assert off < limit and (after - before).norm() < 2 * limit * before.norm()
    assert denoiser.time_scale == 1 and denoiser.prepare(qk_norm=False) == 0  # twice is once


def test_a_dense_time_has_a_small_derivative():
    """2410.11081's and 2503.09641's reason for it: with 1000 r in the sines the derivative is of another size."""

    def slope(denoiser: SanaDenoiser) -> float:
        x, _, cond = asked()
        t = torch.full((3,), 0.37)
        move = lambda h: denoiser.raw(x, denoiser.time_input(t + h), cond, None)  # noqa: E731
        with torch.no_grad():
            return float((move(5e-4) - move(-5e-4)).norm() / 1e-3)

    denoiser = bare()
    before = slope(denoiser)
    denoiser.prepare(qk_norm=True)
    assert slope(denoiser) < before / 10


def test_a_teacher_and_a_student_make_images(folders, tmp_path):
    model = api.load(folders["base"], device="cpu")
    (picture,) = model.generate("a fox", steps=1, solver="euler")
    assert picture.size == (SIDE, SIDE)
    sprint, _ = read_denoiser(folders["sprint"])
    spec = SamplerSpec(path=scm.PATH, times={n: scm.times(n) for n in (1, 2)}, renoise=True, guidance=4.5)
    Student(sprint, spec, {}).save(tmp_path / "student")
    student = api.load(tmp_path / "student", device="cpu")
    one, other = (student.sample(prompts=["a fox"], steps=2, guidance=w) for w in (None, 8.0))
    assert one.shape == (1, 3, SIDE, SIDE) and not torch.allclose(one, other)


def test_a_bare_transformer_is_read_and_asks_for_its_embeddings(folders, caplog):
    with caplog.at_level(logging.WARNING):
        denoiser, _ = read_denoiser(folders["base"] / "transformer")
    assert "no text encoder or no VAE" in caplog.text and not denoiser.has_null
    with pytest.raises(UserError, match="cannot be encoded"):
        denoiser(torch.zeros(1, 4, 2, 2), torch.ones(1))


def spoil(file: str, **values: Any):
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (spoil("model_index.json", _class_name="SanaPAGPipeline"), "pipeline SanaPAGPipeline is not read"),
        (spoil("transformer/config.json", caption_channels=48), "config and weights do not match"),
        (spoil("text_encoder/config.json", hidden_size=48), "texts of width 16, the text encoder here has 48"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(copied, change, told):
    change(copied)
    with pytest.raises(UserError, match=told) as caught:
        read_denoiser(copied)
    assert "\n" not in str(caught.value)
