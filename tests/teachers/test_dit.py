"""DiT as a Denoiser: what the stock network, its scheduler and its pipeline make of the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from fastgen import api
from fastgen.errors import UserError
from fastgen.eval.roofline import flops
from fastgen.inspection import inspect
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.nets.lora import LoraConfig, add_lora, enable_gradient_checkpointing, merged
from fastgen.paths import VP, Prediction
from fastgen.plan import plan
from fastgen.samplers import ode
from fastgen.student import save_teacher
from fastgen.teacher import Teacher, family, read_denoiser
from fastgen.teachers import dit
from tests import tiny
from tests.commands import call, refused

# The first in the published shape, the second without learned variances, of other sizes, and in single-pixel patches.
KINDS: dict[str, dict[str, Any]] = {
    "published": {},
    "other": {"out_channels": None, "in_channels": 3, "patch_size": 1, "num_layers": 1, "num_embeds_ada_norm": 3},
}


def given(kind: str = "published") -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, KINDS[kind].get("in_channels", 4), 8, 8, generator=g)
    return x, torch.tensor([999.0, 400.5, 0.0]), {"label": torch.tensor([2, 0, 1])}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_network_is_the_stock_modules_own_channels(tmp_path, kind):
    net = tiny.dit(tmp_path, **KINDS[kind])
    denoiser, facts = read_denoiser(tmp_path)
    x, time, cond = given(kind)
    assert (
        facts == {} and denoiser.shape == x.shape[1:] and denoiser.prediction.kind == "eps" and denoiser.codec is None
    )
    assert denoiser.path == VP(beta_start=1e-4, beta_end=0.02, schedule="linear") and denoiser.time_scale == 1
    with torch.no_grad():
        expected = net(x, time, class_labels=cond["label"]).sample[:, : x.shape[1]]
        found = denoiser.raw(x, time, cond, None)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 0.05


def test_learned_variances_are_cut_out_of_every_pixel_of_a_patch(tmp_path, caplog):
    caplog.set_level("INFO")
    tiny.dit(tmp_path / "stranger")
    denoiser, _ = read_denoiser(tmp_path / "stranger")
    assert "learned variances" in caplog.text
    assert denoiser.net.proj_out_2.out_features == 2 * 2 * 4 and denoiser.net.config.out_channels == 4
    save_teacher(denoiser, tmp_path / "own", {})
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "own" / "transformer")
    x, time, cond = given()
    with torch.no_grad():
        torch.testing.assert_close(
            again(x, time, class_labels=cond["label"]).sample, denoiser.raw(x, time, cond, None), atol=0, rtol=0
        )


def test_it_steps_like_the_stock_pipeline_with_guidance(tmp_path):
    net = tiny.dit(tmp_path)
    teacher = Teacher(read_denoiser(tmp_path)[0], guidance=4.0)
    stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    stock.set_timesteps(4)
    x, _, cond = given()
    ours = ode.solve(teacher, x, times=stock.timesteps.tolist(), solver="euler", cond=cond, init="unit")
    for t in stock.timesteps:
        both, labels = torch.cat([x, x]), torch.cat([cond["label"], torch.full((3,), 10)])
        with torch.no_grad():
            eps = net(both, t.expand(6), class_labels=labels).sample[:, :4]
        x = stock.step(eps[3:] + 4.0 * (eps[:3] - eps[3:]), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-3, rtol=1e-3)
    assert teacher.denoiser.usual_guidance == 4.0


def test_labels_and_the_label_that_means_none(tmp_path):
    tiny.dit(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    x, time, cond = given()
    assert denoiser.num_classes == 10 and denoiser.has_null and denoiser.null["label"].tolist() == [10]
    with torch.no_grad():
        none = denoiser(x, time).eps
        assert torch.equal(none, denoiser(x, time, {"label": torch.full((3,), 10)}).eps)
        assert not torch.allclose(none, denoiser(x, time, cond).eps, atol=1e-3)
        with pytest.raises(IndexError):
            denoiser(x, time, {"label": torch.full((3,), 11)})


def test_a_network_in_training_keeps_the_labels_it_is_given(tmp_path):
    tiny.dit(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    x, time, cond = (torch.cat([v] * 40) if torch.is_tensor(v) else v for v in given())
    cond = {"label": cond["label"].repeat(40)}
    with torch.no_grad():
        assert torch.equal(denoiser.train().raw(x, time, cond, None), denoiser.eval().raw(x, time, cond, None))


@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_brings_back_the_same_network(tmp_path, kind):
    tiny.dit(tmp_path / "stranger", **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path / "stranger")
    denoiser.add_gap()
    torch.nn.init.normal_(denoiser.extra["gap"].outer.weight)
    save_teacher(denoiser, tmp_path / "own", {"license": "mit"})
    again, data = read_denoiser(tmp_path / "own")
    assert again.describe() == denoiser.describe() and data["facts"] == {"license": "mit"}
    x, time, cond = given(kind)
    with torch.no_grad():
        assert torch.equal(again(x, time, cond, r=0.5 * time).x0, denoiser(x, time, cond, r=0.5 * time).x0)
    (tmp_path / "own" / "fastgen.json").unlink()
    stranger, _ = read_denoiser(tmp_path / "own")
    assert {**stranger.describe(), "extra": ["gap"]} == denoiser.describe()


@pytest.mark.parametrize("layout", ["beside", "subfolder", "old name"])
def test_other_layouts_of_the_same_network(tmp_path, layout):
    net = tiny.dit(tmp_path)
    folder = tmp_path
    if layout == "old name":  # facebook/DiT-XL-2-256's config is older than the class
        old = {"num_vector_embeds": None, "cross_attention_dim": None, "use_linear_projection": False}
        edit(tmp_path / "transformer/config.json", _class_name="Transformer2DModel", **old)
        index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "Transformer2DModel"], "id2label": {}}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    else:
        folder = tmp_path / "transformer"
        target = folder if layout == "beside" else folder / "scheduler"
        target.mkdir(exist_ok=True)
        (tmp_path / "scheduler/scheduler_config.json").rename(target / "scheduler_config.json")
    denoiser, _ = read_denoiser(folder)
    x, time, cond = given()
    with torch.no_grad():
        expected = net(x, time, class_labels=cond["label"]).sample[:, :4]
        torch.testing.assert_close(denoiser.raw(x, time, cond, None), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_number_reaches_every_block_and_zero_changes_nothing(tmp_path, kind):
    tiny.dit(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, time, cond = given(kind)
    width = denoiser.embedding_width
    with torch.no_grad():
        plain = denoiser.raw(x, time, cond, None)
        assert torch.equal(denoiser.raw(x, time, cond, torch.zeros(3, width)), plain)
        extra = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
        told = denoiser.raw(x, time, cond, extra)
        assert not torch.allclose(told, plain, atol=1e-2)
        for block in denoiser.net.transformer_blocks:  # the same number for all, so a bias can hold it
            block.norm1.emb.timestep_embedder.linear_2.bias += extra[0]
        torch.testing.assert_close(denoiser.raw(x[:1], time[:1], {"label": cond["label"][:1]}, None), told[:1])


def test_gradient_checkpointing_and_a_second_number_do_not_go_together(tmp_path):
    tiny.dit(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    x, time, cond = given()
    denoiser.raw(x, time, cond, None).square().sum().backward()
    whole = denoiser.net.pos_embed.proj.weight.grad.clone()
    denoiser.zero_grad()
    enable_gradient_checkpointing(denoiser)
    denoiser.raw(x, time, cond, None).square().sum().backward()
    torch.testing.assert_close(denoiser.net.pos_embed.proj.weight.grad, whole)
    denoiser.add_guidance()
    assert denoiser(x, time, cond) is not None  # not told of it, so nothing is added
    with pytest.raises(UserError, match=r"student\.gradient_checkpointing: the blocks of a DiT embed its time"):
        denoiser(x, time, {**cond, "guidance": torch.ones(3)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_directional_derivative_goes_through(tmp_path, kind):
    tiny.dit(tmp_path, **KINDS[kind])
    denoiser, _ = read_denoiser(tmp_path)
    x, time, cond = given(kind)
    value, tangent = value_and_tangent(
        lambda x, t: denoiser(x, t, cond).eps, (x, time), (torch.ones_like(x), torch.ones(3)), JvpConfig()
    )
    assert value.requires_grad and tangent.isfinite().all() and tangent.abs().max() > 0.1


def test_features_are_tokens_of_every_block(tmp_path):
    tiny.dit(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    seen: list[torch.Tensor] = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x, time, cond = given()
    denoiser(x, time, cond)
    assert [tuple(out.shape) for out in seen] == [(3, 16, 16)] * 2


def test_adapters_go_on_and_merge(tmp_path):
    tiny.dit(tmp_path)
    denoiser = add_lora(read_denoiser(tmp_path)[0], LoraConfig(rank=2), seed=0)
    for layer in denoiser.net.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x, time, cond = given()
    with torch.no_grad():
        found = merged(denoiser).raw(x, time, cond, None)
        torch.testing.assert_close(found, denoiser.raw(x, time, cond, None), atol=1e-5, rtol=1e-4)


def test_samples_are_latents_and_no_pictures(tmp_path):
    tiny.dit(tmp_path)
    generator = api.load(tmp_path, device="cpu")
    made = generator.sample(num=2, label=3, steps=2, guidance=2.0)
    assert made.shape == (2, 4, 8, 8) and made.isfinite().all()
    with pytest.raises(UserError, match=r"samples of shape \(4, 8, 8\), which are no images"):
        generator.generate(label=3, steps=2)
    with pytest.raises(UserError, match=r"classes 0 \.\. 9"):
        generator.sample(label=10)


def test_the_defaults_of_the_class_are_the_published_xl_2():
    """675 M parameters and 118.64 Gflops (multiply-adds; 2212.09748, table 4), counted without memory."""
    with torch.device("meta"):
        net = DiTTransformer2DModel(out_channels=8)
        x, time, label = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    count = sum(p.numel() for p in net.parameters())
    embedding = sum(p.numel() for p in net.transformer_blocks[0].norm1.emb.parameters())
    positions = 16 * 16 * 1152
    # The authors' code has one embedding for all 28 blocks, and counts its fixed positions.
    assert count - 27 * embedding + positions == 675_129_632
    dit.cut(net, 4)
    denoiser = dit.DiTDenoiser(net, VP(), Prediction(kind="eps"), shape=(4, 32, 32), num_classes=1000).to("meta")
    done = flops(lambda: denoiser.raw(x, time, {"label": label}, None))
    assert abs(done / 2e9 - 118.64) < 0.1


def test_inspect_and_plan_know_it(tmp_path):
    net = tiny.dit(tmp_path)
    told = inspect(tmp_path)
    cut = 2 * 2 * 4 * (net.inner_dim + 1)
    assert told["family"] == "dit" and told["num_classes"] == 10 and told["shape"] == [4, 8, 8]
    assert told["parameters"] == sum(p.numel() for p in net.parameters()) - cut
    made = plan(tmp_path, "reflow", ["stages.distil.loop.batch=2"])
    assert made.footprint.parameters["student"] == told["parameters"] and made.footprint.activations > 0


def test_pictures_are_refused_as_data(tmp_path):
    tiny.dit(tmp_path / "model")
    data = "data={kind: synthetic, size: 16}"
    told = refused(tmp_path / "out", "distill", "flow_matching", f"teacher={tmp_path / 'model'}", data)
    assert "samples of different shapes do not go together" in told and "(4, 8, 8)" in told


@pytest.mark.slow
def test_a_run_makes_pairs_of_latents_and_a_student_of_them(tmp_path):
    tiny.dit(tmp_path / "model")
    words = ("reflow", f"teacher={tmp_path / 'model'}", "guidance=2.0", f"out={tmp_path / 'run'}")
    ended = call("distill", *words, "--smoke")
    assert ended.code == 0, ended.err
    denoiser, data = read_denoiser(tmp_path / "run" / "distil" / "model")
    assert denoiser.family == "dit" and data["kind"] == "student" and data["facts"]["guidance"] == 2.0


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def without(file: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(file).items() if key != name}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda f: (f / WEIGHTS).rename(f / "transformer/diffusion_pytorch_model.bin"), "a pickle"),
        (lambda f: without(f / WEIGHTS, "proj_out_1.bias"), "no tensor 'proj_out_1.bias'"),
        (lambda f: edit(f / "transformer/config.json", num_layers=3), "no tensor '"),
        (lambda f: edit(f / "transformer/config.json", num_layers=1), "has no place in this network"),
        (lambda f: edit(f / "transformer/config.json", num_embeds_ada_norm=11), "config and weights do not match"),
        (lambda f: edit(f / "transformer/config.json", num_layers="2"), "no DiTTransformer2DModel can be made of it"),
        (lambda f: edit(f / "transformer/config.json", norm_type="odd"), "no DiTTransformer2DModel can be made of it"),
        (lambda f: edit(f / "transformer/config.json", sample_size=None), "config.json: no"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler/scheduler_config.json"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="Odd"), "scheduler Odd"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "known: DiTPipeline"),
    ],
)
def test_a_bad_folder_is_refused_naming_the_file(tmp_path, damage, message):
    tiny.dit(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_denoiser(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_channels_that_fit_no_denoiser_are_refused(tmp_path):
    tiny.dit(tmp_path, out_channels=6)
    with pytest.raises(UserError, match="6 channels out for 4 in"):
        read_denoiser(tmp_path)


def test_it_is_a_family_and_others_are_not_taken_for_it(tmp_path):
    assert family("dit") is dit and not dit.recognises(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}')
    assert not dit.recognises(tmp_path)  # PixArt, by the same old name
