"""SD3 as a bare network: the stock module and its scheduler are the truth, conditions are embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from fastgen import api
from fastgen.errors import UserError
from fastgen.inspection import inspect
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.nets.lora import enable_gradient_checkpointing
from fastgen.paths import RectifiedFlow, TrigFlow
from fastgen.plan import plan
from fastgen.samplers import ode
from fastgen.samplers.draw import draw
from fastgen.student import save_teacher
from fastgen.teacher import Teacher, family, read_denoiser
from fastgen.teachers import sd3
from tests import tiny
from tests.commands import refused

# As SD3's, and as SD3.5's: normalised queries and keys, blocks with a second attention.
KINDS: dict[str, dict[str, Any]] = {
    "3": {},
    "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,), "num_layers": 3, "num_attention_heads": 1}
    | {"caption_projection_dim": 8, "attention_head_dim": 8},
}
TIMES = torch.tensor([1.0, 0.75, 0.01])


def given(n: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=g)
    return x, {"text": torch.randn(n, 5, tiny.TEXT, generator=g), "pooled": torch.randn(n, 12, generator=g)}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add_null(folder: Path, tokens: int = 5) -> None:
    g = torch.Generator().manual_seed(5)
    row = {"text": torch.randn(tokens, tiny.TEXT, generator=g), "pooled": torch.randn(12, generator=g)}
    save_file(row, folder / "null.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_the_stock_modules_at_a_thousand_sigma(tmp_path, kind):
    net = tiny.sd3(tmp_path, **KINDS[kind])
    denoiser, facts = read_denoiser(tmp_path)
    x, cond = given()
    assert facts == {} and denoiser.shape == (4, 8, 8) and denoiser.path == RectifiedFlow()
    with torch.no_grad():
        expected = net(x, cond["text"], cond["pooled"], 1000 * TIMES).sample
        pair = denoiser(x, TIMES, cond)
        torch.testing.assert_close(pair.velocity, expected, atol=1e-5, rtol=1e-5)
        other = denoiser(x, TIMES * torch.pi / 2, cond, on=TrigFlow())  # the same network, asked elsewhere
    assert expected.std() > 0.05 and other.x0.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_steps_like_the_stock_scheduler_with_its_shift(tmp_path, kind):
    net = tiny.sd3(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert stock.config.shift == 3.0  # which is no property of the network
    stock.set_timesteps(4)
    x, cond = given()
    ours = ode.solve(denoiser, x, times=stock.sigmas[:-1].tolist(), solver="euler", cond=cond)
    for t in stock.timesteps:
        with torch.no_grad():
            y = net(x, cond["text"], cond["pooled"], t.expand(3)).sample
        x = stock.step(y, t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_without_the_empty_prompt_there_is_no_guidance(tmp_path):
    tiny.sd3(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given()
    assert not denoiser.has_null and denoiser.null is None and denoiser.usual_guidance is None
    with pytest.raises(UserError, match=r"sd3 teacher has no null condition: no text encoder, and no null\.safetens"):
        Teacher(denoiser, guidance=5.0)
    with pytest.raises(UserError, match="no null condition"):
        Teacher(denoiser)(x, TIMES, cond, guidance=5.0)
    with pytest.raises(UserError, match="needs the condition 'text', an embedding of width 32, and none was given"):
        denoiser(x, TIMES)


@pytest.mark.parametrize("copied", [False, True])
def test_with_the_empty_prompt_beside_it_guidance_is_the_stock_pipelines(tmp_path, copied):
    tiny.sd3(tmp_path)
    add_null(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    if copied:
        save_teacher(denoiser, tmp_path / "own", {})
        denoiser, _ = read_denoiser(tmp_path / "own")
    x, cond = given()
    row = load_file(tmp_path / "null.safetensors")
    null = {name: value.expand(3, *value.shape) for name, value in row.items()}
    with torch.no_grad():
        guided = Teacher(denoiser, guidance=5.0)(x, TIMES, cond)
        expected = denoiser(x, TIMES, null).lerp(denoiser(x, TIMES, cond), 5.0)
        torch.testing.assert_close(guided.x0, expected.x0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(denoiser(x, TIMES).x0, denoiser(x, TIMES, null).x0)
    assert denoiser.usual_guidance == 7.0
    with pytest.raises(UserError, match="the empty prompt has 5 tokens, the condition 4"):
        Teacher(denoiser, guidance=5.0)(x, TIMES, {**cond, "text": cond["text"][:, :4]})


@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_brings_back_the_same_network(tmp_path, kind):
    tiny.sd3(tmp_path / "stranger", **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path / "stranger")
    denoiser.add_gap()
    torch.nn.init.normal_(denoiser.extra["gap"].outer.weight)
    save_teacher(denoiser, tmp_path / "own", {})
    again, _ = read_denoiser(tmp_path / "own")
    assert again.describe() == denoiser.describe()
    x, cond = given()
    with torch.no_grad():
        assert torch.equal(again(x, TIMES, cond, r=0.5 * TIMES).x0, denoiser(x, TIMES, cond, r=0.5 * TIMES).x0)
    (tmp_path / "own" / "fastgen.json").unlink()
    assert {**read_denoiser(tmp_path / "own")[0].describe(), "extra": ["gap"]} == denoiser.describe()


@pytest.mark.parametrize("layout", ["bare", "pipeline", "sharded"])
def test_other_layouts_of_the_same_network(tmp_path, layout, caplog):
    net = tiny.sd3(tmp_path)
    folder = tmp_path
    if layout == "bare":
        folder = tmp_path / "transformer"
        (tmp_path / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    elif layout == "pipeline":
        index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "vae").mkdir()
    else:
        (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
        net.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    denoiser, _ = read_denoiser(folder)
    assert ("text encoders and VAE are not read yet" in caplog.text) == (layout == "pipeline")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), denoiser.net.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_number_reaches_the_network_and_zero_changes_nothing(tmp_path, kind):
    tiny.sd3(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given()
    time, width = 1000 * TIMES, denoiser.embedding_width
    with torch.no_grad():
        plain = denoiser.raw(x, time, cond, None)
        assert torch.equal(denoiser.raw(x, time, cond, torch.zeros(3, width)), plain)
        extra = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
        told = denoiser.raw(x, time, cond, extra)
        assert not torch.allclose(told, plain, atol=1e-2)
        denoiser.net.time_text_embed.timestep_embedder.linear_2.bias += extra[0]
        one = {name: value[:1] for name, value in cond.items()}
        torch.testing.assert_close(denoiser.raw(x[:1], time[:1], one, None), told[:1], atol=1e-5, rtol=1e-4)


def test_a_second_number_is_learnt_through_gradient_checkpointing(tmp_path):
    tiny.sd3(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    denoiser.add_gap()
    x, cond = given()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_gradient_checkpointing(denoiser)
        denoiser.zero_grad()
        denoiser(x, TIMES, cond, r=0.5 * TIMES).x0.square().mean().backward()
        grads.append(denoiser.extra["gap"].outer.weight.grad.clone())
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directional_derivative_goes_through(tmp_path, kind):
    tiny.sd3(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given()
    value, tangent = value_and_tangent(
        lambda x, t: denoiser(x, t, cond).velocity, (x, TIMES), (torch.ones_like(x), torch.ones(3)), JvpConfig()
    )
    assert value.requires_grad and tangent.isfinite().all() and tangent.abs().max() > 0.1


def test_features_are_tokens_of_the_image_in_every_block(tmp_path):
    tiny.sd3(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    seen: list[torch.Tensor] = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x, cond = given()
    denoiser(x, TIMES, cond)
    assert [tuple(out.shape) for out in seen] == [(3, 16, 16)] * 2
    assert not torch.allclose(seen[0], seen[1], atol=0.1)


def test_its_size_is_free_up_to_its_positions(tmp_path):
    net = tiny.sd3(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    assert denoiser.resized(64, 96).shape == (4, 8, 12)
    x, cond = torch.randn(3, 4, 8, 12), given()[1]
    with torch.no_grad():
        expected = net(x, cond["text"], cond["pooled"], 1000 * TIMES).sample
        torch.testing.assert_close(denoiser(x, TIMES, cond).velocity, expected, atol=1e-5, rtol=1e-5)
    for size, message in (((64, 200), "multiples of 16"), ((256, 64), "positions for 192 pixels at most")):
        with pytest.raises(UserError, match=message):
            denoiser.resized(*size)


def test_inspect_and_plan_tell_in_one_line_what_is_missing(tmp_path):
    net = tiny.sd3(tmp_path)
    told = inspect(tmp_path)
    assert told["family"] == "sd3" and told["shape"] == [4, 8, 8] and told["num_classes"] is None
    assert told["parameters"] == sum(p.numel() for p in net.parameters())
    with pytest.raises(UserError, match="came without its text encoders") as error:
        plan(tmp_path, "reflow")
    assert "\n" not in str(error.value)


def test_latents_are_drawn_from_embeddings_and_from_nothing_else(tmp_path):
    tiny.sd3(tmp_path)
    generator, (_, cond) = api.load(tmp_path, device="cpu"), given(2)
    made = draw(generator.model, torch.arange(2), seed=0, steps=2, cond=cond)
    assert made.shape == (2, 4, 8, 8) and made.isfinite().all()
    for options in ({"prompts": ["a fox"]}, {}):
        with pytest.raises(UserError, match="draw latents from embeddings in Python"):
            generator.sample(**options)


def test_a_run_with_pictures_or_prompts_is_refused_before_it_begins(tmp_path):
    tiny.sd3(tmp_path / "model")
    words = tmp_path / "prompts.txt"
    words.write_text("a fox\na dog\n")
    for config, data in (("reflow", "{kind: synthetic, size: 8}"), ("sim/sd15", str(words))):
        data = data if data.startswith("{") else f"{{path: {data}}}"
        told = refused(tmp_path / "out", "distill", config, f"teacher={tmp_path / 'model'}", f"data={data}")
        assert "sd3 networks are read without text encoders and VAE so far" in told


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / WEIGHTS), "no tensor '"),
        (lambda f: edit(f / "transformer/config.json", pos_embed_max_size=14), "config and weights do not match"),
        (lambda f: edit(f / "transformer/config.json", qk_norm="rms_norm"), "no tensor '"),
        (lambda f: edit(f / "transformer/config.json", qk_norm="odd"), "no SD3Transformer2DModel can be made of it"),
        (lambda f: edit(f / "transformer/config.json", patch_size=0), "no SD3Transformer2DModel can be made of it"),
        (lambda f: edit(f / "transformer/config.json", sample_size=[8, 8]), "config.json: no"),
        (lambda f: (f / "transformer/config.json").write_text('{"_class_name": "SD3Transformer2DModel"'), "no"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler/scheduler_config.json"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "not of a rectified flow"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "OddPipeline"}'), "pipeline OddPipeline"),
        (lambda f: save_file({"text": torch.zeros(5, 32)}, f / "null.safetensors"), "not the empty prompt's condition"),
        (lambda f: add_null(f) or edit_null(f), "not the empty prompt's condition"),
    ],
)
def test_a_bad_folder_is_refused_naming_the_file(tmp_path, damage, message):
    tiny.sd3(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_denoiser(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def edit_null(folder: Path) -> None:
    row = load_file(folder / "null.safetensors")
    save_file({**row, "text": row["text"][None]}, folder / "null.safetensors")


def test_an_editing_network_is_refused(tmp_path):
    tiny.sd3(tmp_path, in_channels=5)
    with pytest.raises(UserError, match="5 channels in, 4 out"):
        read_denoiser(tmp_path)


def test_it_is_a_family():
    assert family("sd3") is sd3
