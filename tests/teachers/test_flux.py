"""FLUX as a bare network: the stock module, its packing and its scheduler are the truth, conditions are embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from fastgen.errors import UserError
from fastgen.inspection import inspect
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.nets.lora import enable_gradient_checkpointing
from fastgen.paths import RectifiedFlow
from fastgen.samplers import ode
from fastgen.student import save_teacher
from fastgen.teacher import Teacher, family, read_denoiser
from fastgen.teachers import flux
from tests import tiny

# As FLUX.1-dev, whose guidance is an input, and as FLUX.1-schnell, which has none.
KINDS: dict[str, dict[str, Any]] = {
    "dev": {},
    "schnell": {"guidance_embeds": False, "num_layers": 2, "num_single_layers": 1, "in_channels": 8},
}
TIMES = torch.tensor([1.0, 0.75, 0.01])
SIZE = (8, 12)  # of the latents


def given(kind: str = "dev") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, KINDS[kind].get("in_channels", 16) // 4, *SIZE, generator=g)
    return x, {"text": torch.randn(3, 5, tiny.TEXT, generator=g), "pooled": torch.randn(3, 12, generator=g)}


def stock(net: Any, x: torch.Tensor, sigma: torch.Tensor, cond: dict[str, torch.Tensor], guidance: Any) -> torch.Tensor:
    """The velocity as the stock pipeline asks for it."""
    n, c, h, w = x.shape
    tokens = FluxPipeline._pack_latents(x, n, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, x.device, x.dtype)
    made = net(
        hidden_states=tokens,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["text"],
        txt_ids=torch.zeros(cond["text"].shape[1], 3),
        img_ids=ids,
    ).sample
    return FluxPipeline._unpack_latents(made, 8 * h, 8 * w, 8)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_the_stock_pipelines(tmp_path, kind):
    net = tiny.flux(tmp_path, **KINDS[kind])
    denoiser, facts = read_denoiser(tmp_path)
    x, cond = given(kind)
    assert facts == {} and denoiser.shape == (x.shape[1], 128, 128) and denoiser.path == RectifiedFlow()
    assert denoiser.resized(64, 96).shape == x.shape[1:] and denoiser.time_scale == 1
    guidance = torch.full((3,), 3.5) if kind == "dev" else None
    with torch.no_grad():
        expected = stock(net, x, TIMES, cond, guidance)
        torch.testing.assert_close(denoiser(x, TIMES, cond).velocity, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_it_steps_like_the_stock_scheduler_with_its_shift(tmp_path, kind):
    net = tiny.flux(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.6)
    x, cond = given(kind)
    guidance = torch.full((3,), 3.5) if kind == "dev" else None
    ours = ode.solve(denoiser, x, times=scheduler.sigmas[:-1].tolist(), solver="euler", cond=cond)
    for t in scheduler.timesteps:
        with torch.no_grad():
            y = stock(net, x, t.expand(3) / 1000, cond, guidance)
        x = scheduler.step(y, t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_its_own_guidance_is_an_input_with_the_stock_default(tmp_path):
    net = tiny.flux(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given()
    weights = torch.tensor([1.0, 3.5, 7.0])
    with torch.no_grad():
        told = denoiser(x, TIMES, {**cond, "guidance": weights}).velocity
        torch.testing.assert_close(told, stock(net, x, TIMES, cond, weights), atol=1e-5, rtol=1e-5)
        usual = denoiser(x, TIMES, cond).velocity
    assert torch.allclose(usual[1], told[1], atol=1e-5) and not torch.allclose(usual[2], told[2], atol=1e-3)
    denoiser.add_guidance()
    assert denoiser.takes_guidance and not denoiser.extra  # it has its own


def test_a_network_without_guidance_can_be_given_it(tmp_path):
    tiny.flux(tmp_path, **KINDS["schnell"])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given("schnell")
    assert not denoiser.takes_guidance
    plain = denoiser(x, TIMES, cond).x0
    denoiser.add_guidance()
    told = denoiser(x, TIMES, {**cond, "guidance": torch.full((3,), 4.0)})
    assert denoiser.takes_guidance and torch.equal(told.x0, plain)
    told.x0.square().mean().backward()
    assert denoiser.extra["guidance"].outer.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_null_condition_and_it_is_said_what_there_is(tmp_path, kind):
    tiny.flux(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given(kind)
    assert not denoiser.has_null and denoiser.null is None and denoiser.usual_guidance is None
    told = r'no null condition; its own guidance is an input, cond\["guidance"\], 3.5 by default'
    with pytest.raises(UserError, match="no null condition; leave it off" if kind == "schnell" else told):
        Teacher(denoiser, guidance=3.5)
    with pytest.raises(UserError, match="no null condition"):
        Teacher(denoiser)(x, TIMES, cond, guidance=3.5)
    with pytest.raises(UserError, match="needs the condition 'pooled', an embedding of width 12, and this one has 11"):
        denoiser(x, TIMES, {**cond, "pooled": cond["pooled"][:, :11]})


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_half_precision_leaves_its_time_alone(tmp_path, half):
    tiny.flux(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    seen: list[torch.Tensor] = []
    denoiser.net.time_text_embed.time_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x, cond = given()
    sigma, weight = torch.tensor([0.999, 0.5, 0.3]), torch.tensor([3.3, 1.0, 4.7])
    if half == "weights":
        denoiser.net.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        made = denoiser(x, sigma, {**cond, "guidance": weight})
    assert torch.equal(seen[0], 1000 * sigma) and torch.equal(seen[1], 1000 * weight)
    assert made.x0.dtype == torch.float32 and not denoiser.net.time_text_embed._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_brings_back_the_same_network(tmp_path, kind):
    tiny.flux(tmp_path / "stranger", **KINDS[kind])
    denoiser = read_denoiser(tmp_path / "stranger")[0].resized(64, 96)
    denoiser.add_gap()
    torch.nn.init.normal_(denoiser.extra["gap"].outer.weight)
    save_teacher(denoiser, tmp_path / "own", {})
    again, _ = read_denoiser(tmp_path / "own")
    assert again.describe() == denoiser.describe()
    x, cond = given(kind)
    with torch.no_grad():
        assert torch.equal(again(x, TIMES, cond, r=0.5 * TIMES).x0, denoiser(x, TIMES, cond, r=0.5 * TIMES).x0)
    (tmp_path / "own" / "fastgen.json").unlink()
    stranger = read_denoiser(tmp_path / "own")[0].resized(64, 96)
    assert {**stranger.describe(), "extra": ["gap"]} == denoiser.describe()
    written = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "own" / "scheduler")
    assert written.config.num_train_timesteps == 1000


@pytest.mark.parametrize("layout", ["bare", "pipeline"])
def test_other_layouts_of_the_same_network(tmp_path, layout, caplog):
    net = tiny.flux(tmp_path)
    folder = tmp_path
    if layout == "bare":
        folder = tmp_path / "transformer"
        (tmp_path / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    else:
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "text_encoder_2").mkdir()
    denoiser, _ = read_denoiser(folder)
    assert ("text encoders and VAE are not read yet" in caplog.text) == (layout == "pipeline")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), denoiser.net.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_number_reaches_the_network_and_zero_changes_nothing(tmp_path, kind):
    tiny.flux(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given(kind)
    width = denoiser.embedding_width
    with torch.no_grad():
        plain = denoiser.raw(x, TIMES, cond, None)
        assert torch.equal(denoiser.raw(x, TIMES, cond, torch.zeros(3, width)), plain)
        extra = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
        told = denoiser.raw(x, TIMES, cond, extra)
        assert not torch.allclose(told, plain, atol=1e-2)
        denoiser.net.time_text_embed.timestep_embedder.linear_2.bias += extra[0]
        one = {name: value[:1] for name, value in cond.items()}
        torch.testing.assert_close(denoiser.raw(x[:1], TIMES[:1], one, None), told[:1], atol=1e-5, rtol=1e-4)


def test_a_second_number_is_learnt_through_gradient_checkpointing(tmp_path):
    tiny.flux(tmp_path)
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
    tiny.flux(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, cond = given(kind)
    value, tangent = value_and_tangent(
        lambda x, t: denoiser(x, t, cond).velocity, (x, TIMES), (torch.ones_like(x), torch.ones(3)), JvpConfig()
    )
    assert value.requires_grad and tangent.isfinite().all() and tangent.abs().max() > 0.1


def test_features_are_tokens_in_every_block(tmp_path):
    tiny.flux(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    seen: list[torch.Tensor] = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x, cond = given()
    denoiser(x, TIMES, cond)
    assert [tuple(out.shape) for out in seen] == [(3, 24, 16), (3, 29, 16), (3, 29, 16)]  # 24 of the image, 5 of text


def test_packing_and_back_is_the_stock_pipelines():
    x = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    tokens = flux.pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 3, 4, 6)) and torch.equal(flux.unpack(tokens, 4, 6), x)
    stock_ids = FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    assert torch.equal(flux.positions(2, 3), stock_ids)


def test_inspect_knows_it_and_sizes_that_do_not_fit_are_refused(tmp_path):
    net = tiny.flux(tmp_path)
    told = inspect(tmp_path)
    assert told["family"] == "flux" and told["parameters"] == sum(p.numel() for p in net.parameters())
    with pytest.raises(UserError, match="multiples of 16"):
        read_denoiser(tmp_path)[0].resized(64, 72)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / WEIGHTS), "no tensor '"),
        (lambda f: edit(f / "transformer/config.json", num_single_layers=1), "has no place in this network"),
        (lambda f: edit(f / "transformer/config.json", joint_attention_dim=8), "config and weights do not match"),
        (lambda f: edit(f / "transformer/config.json", guidance_embeds=False), "has no place in this network"),
        (lambda f: edit(f / "transformer/config.json", num_layers="x"), "no FluxTransformer2DModel can be made of it"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler/scheduler_config.json"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "not of a rectified flow"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}'), "known: FluxPipeline"),
    ],
)
def test_a_bad_folder_is_refused_naming_the_file(tmp_path, damage, message):
    tiny.flux(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_denoiser(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [{"in_channels": 24, "out_channels": 16}, {"in_channels": 6}])
def test_networks_of_other_channels_are_refused(tmp_path, channels):
    tiny.flux(tmp_path, **channels)
    with pytest.raises(UserError, match="channels in"):
        read_denoiser(tmp_path)


def test_it_is_a_family():
    assert family("flux") is flux
