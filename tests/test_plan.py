"""The plan against what a run takes, and against the published sizes of full-size networks, without their weights."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastgen import files, plan
from fastgen.errors import UserError
from fastgen.plan import GIB, RESERVE
from fastgen.student import save_teacher
from fastgen.teachers import mlp, unet
from fastgen.trainers.engine.loop import Loop
from tests import tiny
from tests.commands import call
from tests.footprints import remember_footprints

PUBLISHED = json.loads((Path(__file__).parent / "plans" / "unets.json").read_text())
ADAPTERS = "student={lora: {rank: 2}}"
HALF = "teacher_precision=bf16"
LITTLE = (HALF, "student={lora: {}}")
STAGE = {"reflow": "distil", "sim": "sim"}  # that trains the student in the default config
EIGHT = ("stages.distil.loop.batch=8",)
FEW = ("loop.batch=8", "loop.micro=4")


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """Each footprint is worked out once: plans of the same stage are asked for again and again."""
    with pytest.MonkeyPatch.context() as patch:
        yield remember_footprints(patch)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A small U-Net with labels, as a teacher folder."""
    torch.manual_seed(0)
    config = unet.UNetConfig(block_out_channels=(16, 32), layers_per_block=1)
    folder = tmp_path_factory.mktemp("pixels") / "teacher"
    save_teacher(unet.build(config, (1, 8, 8), 4), folder, {})
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("latents") / "sd")


def at(stage, *settings):
    """Overrides of one stage."""
    return tuple(f"stages.{stage}.{setting}" for setting in settings)


def empty_weights(file, tensors):
    """A safetensors file of these shapes whose bytes were never written: a hole in the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def full_size(folder, name):
    """A pipeline folder of a published architecture, without a byte of weights."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    (folder / "unet").mkdir(parents=True)
    with torch.device("meta"):
        net = UNet2DConditionModel(**PUBLISHED[name]["config"])
    net.save_config(folder / "unet")
    empty_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", net.state_dict())
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(folder / "scheduler")
    kind = "StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline"
    index = {"_class_name": kind, "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_networks_are_counted_without_their_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *_: pytest.fail("weights were read"))
    folder = full_size(tmp_path / name, name)
    published = PUBLISHED[name]["parameters"]
    method = plan.build(*plan.stage_of(folder, "reflow"))
    assert sum(p.numel() for p in method.student.parameters()) == published
    assert all(p.is_meta for p in method.student.parameters())
    weights, parameters = plan.sizes(method)
    assert weights == {"student": 4 * published} and parameters == {"student": published}


def measured(stage, run, out):
    """Bytes of a stage's tensors after one real step on the CPU, each storage once."""
    model = run.open_teacher(stage.teacher or "teacher")
    teacher = model if stage.teacher else None
    method = stage.build(run, stage.make_student(run, teacher, model), teacher)
    before = {id(t): t for m in (*method.frozen.values(), *method.networks.values()) for t in tensors(m)}
    rows = {
        "x0": torch.randn(stage.loop.batch, *method.student.shape),
        "eps": torch.randn(stage.loop.batch, *method.student.shape),
        "label": torch.zeros(stage.loop.batch, dtype=torch.int64),
    }
    source = type(
        "Source", (), {"get": lambda self, index: {name: value[: len(index)] for name, value in rows.items()}}
    )
    gradients = []
    loop = Loop(method, source(), stage.loop, out)
    for name, optimizer in loop.optimizers.items():
        optimizer.register_step_pre_hook(
            lambda *_, name=name: gradients.append(size(p.grad for p in loop.trained[name] if p.grad is not None))
        )
    loop.run(until=1)
    moments = {
        name: size(t for state in optimizer.state.values() for t in state.values() if t.ndim)
        for name, optimizer in loop.optimizers.items()
    }
    slow = {id(t): t for module in (*loop.ema.values(), *loop.slow.values()) for t in module.parameters()}
    return {
        "weights": size(before.values()),
        "averages": size(t for key, t in slow.items() if key not in before),
        "moments": sum(moments.values()),
        "gradients": max(gradients),
    }


def tensors(module):
    return (*module.parameters(), *module.buffers())


def size(found):
    return sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("reflow", how) for how in ((), (ADAPTERS,))],
        *[("sim", how) for how in ((), (ADAPTERS,))],
        *[pytest.param("sim", how, marks=pytest.mark.slow) for how in ((HALF,), (ADAPTERS, HALF))],
    ],
)
def test_the_plan_is_within_one_percent_of_what_a_step_holds(name, how, pixels, tmp_path):
    stage, run = plan.stage_of(pixels, name, at(STAGE[name], *FEW, *how))
    planned = plan.footprint(stage, run)
    real = measured(stage, dataclasses.replace(run, device="cpu"), tmp_path)
    for kind, count in real.items():
        told = getattr(planned, kind)
        assert (sum(told.values()) if isinstance(told, dict) else told) == pytest.approx(count, rel=0.01), kind
    assert planned.total == planned.resident + planned.gradients + max(planned.activations, planned.monitor) + RESERVE


def test_shared_weights_are_counted_once_and_adapters_make_the_rest_small(pixels):
    whole, adapters = (plan.plan(pixels, "sim", at("sim", *FEW, *how)).footprint for how in ((), (ADAPTERS,)))
    assert whole.weights["teacher"] == pytest.approx(whole.weights["student"], rel=0.01)
    assert adapters.weights["teacher"] == whole.weights["teacher"]
    for part in ("averages", "moments"):
        assert sum(getattr(adapters, part).values()) < 0.3 * sum(getattr(whole, part).values())
    assert adapters.weights["fake"] == adapters.weights["student"] < 0.3 * whole.weights["student"]
    assert adapters.gradients == adapters.weights["student"]


def test_8_bit_moments_take_a_byte_and_a_share_of_a_scale(pixels):
    stage, run = plan.stage_of(pixels, "reflow", at("distil", "loop.optim.name=adamw8bit"))
    counts = [p.numel() for p in plan.build(stage, run).student.parameters()]
    assert min(counts) < 4096 < max(counts)
    expected = sum(2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 8 * n for n in counts)
    assert plan.footprint(stage, run).moments == {"student": expected}


def test_activations_follow_rows_precision_and_checkpoints(latents):
    def activations(*overrides):
        return plan.plan(latents, "reflow", at("distil", "loop.batch=8", *overrides)).footprint.activations

    eight, four = activations(), activations("loop.micro=4")
    assert eight == pytest.approx(2 * four, rel=0.05)
    assert activations("loop.precision=bf16") < 0.85 * eight
    assert activations("student.gradient_checkpointing=true") < 0.6 * eight


def test_encoders_and_decoder_are_told_but_not_added_to_a_step(latents):
    footprint = plan.plan(latents, "reflow", EIGHT).footprint
    parts = [*(latents / "text_encoder").glob("*.safetensors"), *(latents / "vae").glob("*.safetensors")]
    expected = size(t.float() for file in parts for t in files.load_tensors(file).values())
    assert footprint.codec == expected > 0
    larger = dataclasses.replace(footprint, codec=GIB)
    assert larger.total == larger.resident + GIB + RESERVE


@pytest.mark.slow
def test_a_guided_teacher_for_prompts_is_planned_with_its_interval(latents):
    how = ("data={kind: prompts, path: examples}", *at("sim", "loop.batch=4"))
    plain = plan.plan(latents, "sim", how).footprint
    guided = plan.plan(latents, "sim", (*how, "guidance=4", "guidance_interval=[0.5, 3]")).footprint
    assert guided.weights == plain.weights and guided.activations > plain.activations


def test_sdxl_is_planned_with_its_pooled_and_size_conditions(tmp_path):
    footprint = plan.plan(tiny.sdxl(tmp_path / "sdxl"), "reflow", EIGHT).footprint
    assert footprint.activations > 0 and footprint.parameters["student"] > 0


@pytest.mark.slow
def test_remedies_come_in_order_up_to_the_first_that_fits(pixels):
    none = plan.plan(pixels, "sim")
    assert (none.vram, none.fits, none.remedies, none.settings) == (None, None, [], None)
    assert plan.plan(pixels, "sim", vram=80).remedies == []
    tight = plan.plan(pixels, "sim", vram=0.5)
    assert tight.fits is False and tight.settings is None  # the reserve alone is more
    order = [setting for _, setting in plan.REMEDIES]
    first = [remedy.setting.split()[0] for remedy in tight.remedies]
    assert first == [setting for setting in order if setting in first]
    assert first[:3] == ["loop.micro=1", "student.gradient_checkpointing=true", "loop.optim.name=adamw8bit"]
    assert "loop.networks.fake.name=adamw8bit" in tight.remedies[2].setting
    totals = [none.footprint.total, *(remedy.total for remedy in tight.remedies)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    for n, remedy in enumerate(tight.remedies):
        some = plan.plan(pixels, "sim", vram=remedy.total / GIB + 1e-6)
        assert len(some.remedies) == n + 1
        assert some.settings == " ".join(remedy.setting for remedy in tight.remedies[: n + 1])
        assert plan.plan(pixels, "sim", at("sim", *some.settings.split())).footprint.total == remedy.total


def test_weights_that_exceed_the_device_are_refused_with_the_first_remedy(pixels):
    stage, run = plan.stage_of(pixels, "sim")
    whole, small = (plan.sizes(plan.build(*plan.stage_of(pixels, "sim", at("sim", *how))))[0] for how in ((), LITTLE))
    run, weights = dataclasses.replace(run, device="cpu"), sum(whole.values())
    plan.refuse_if_too_large(stage, run, memory=weights)
    with pytest.raises(UserError, match=r"stage sim: the weights alone take .* with teacher_precision=bf16$"):
        plan.refuse_if_too_large(stage, run, memory=weights - 1)
    with pytest.raises(UserError, match=r"GiB, cpu has 0\.0 GiB; use a smaller teacher or a larger device"):
        plan.refuse_if_too_large(stage, run, memory=min(small.values()) // 2)


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < plan.device_memory("cpu") < 2**50


def test_the_command_prints_one_table_or_one_object(latents):
    words = ("inspect", latents, *EIGHT, "--plan", "reflow", "--vram")
    told = call(*words, "80")
    assert told.code == 0 and "an estimate" in told.out and "fits" in told.out.splitlines()[-2]
    made = json.loads(call(*words, "0.5", "--json").out)
    assert made["fits"] is False and made["vram_bytes"] == GIB // 2 and made["fits_with"] is None
    assert made["bytes"]["total"] > made["bytes"]["weights"]["student"] > 0
    assert made["remedies"][0]["setting"] == "loop.micro=1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--vram", "24"), "go with --plan"),
        (EIGHT, "go with --plan"),
        (("--plan", "reflowx"), "reflowx"),
        (("--plan", "imitate"), "closed-form"),
        (("--plan", "meanflow"), "cannot be planned, only run"),
        (("--plan", "reflow", "stages.distil.loop.batchx=4"), "batchx"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, expected, pixels):
    ended = call("inspect", pixels, *words)
    assert ended.code == 2 and expected in ended.err and len(ended.err.strip().splitlines()) == 1


def test_a_network_without_blocks_is_not_offered_checkpoints(tmp_path):
    save_teacher(mlp.build(mlp.MLPConfig(width=64, depth=2), (1, 8, 8), 4), tmp_path / "mlp", {})
    made = plan.plan(tmp_path / "mlp", "reflow", vram=0.5)
    assert [remedy.setting for remedy in made.remedies] == ["loop.micro=1", "loop.optim.name=adamw8bit"]


def test_a_head_for_learned_variances_is_left_out_of_the_count(tmp_path):
    from diffusers import DDPMScheduler, UNet2DModel

    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = UNet2DModel(sample_size=8, in_channels=3, out_channels=6, **sizes, **blocks)
    net.save_pretrained(tmp_path / "ddpm")
    DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path / "ddpm")
    count = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.conv_out.parameters()) // 2
    assert plan.plan(tmp_path / "ddpm", "reflow", EIGHT).footprint.parameters == {"student": count}
