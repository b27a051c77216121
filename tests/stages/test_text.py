"""Runs on text teachers: pairs, reflow, SIM and LoRA students on tiny checkpoints of the real classes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgen import api
from fastgen.errors import Stopped, UserError
from fastgen.nets.lora import lora_tensors
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.student import Student
from fastgen.teacher import read_denoiser
from tests import tiny

PROMPTS = [f"a fox number {i}" for i in range(6)]
LOOP = "{steps: 4, batch: 4, log_every: 1, save_every: 2, preview_every: 4, optim: {lr: 1.0e-4}}"
PAIRS = "{num: 16, per_shard: 8, steps: 2, solver: euler, batch: 8, limit: 1.0e9}"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {"sd": tiny.stable_diffusion(root / "sd"), "xl": tiny.sdxl(root / "xl")}


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def run(
    tmp_path: Path, teacher: Path, stages: str, *overrides: str, resume: bool = False, interrupt=lambda: False
) -> Path:
    config = tmp_path / "config.yaml"
    config.write_text(f"stages:\n{stages}")
    given = [f"teacher={teacher}", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "guidance=3.0", *overrides]
    head, made = load_run(config, given)
    context = Context(head, Path(head.out), "cpu", interrupt=interrupt, names=tuple(stage.name for stage in made))
    execute(head, made, context, resume=resume)
    return Path(head.out)


def sim(options: str = "") -> str:
    networks = "teacher: teacher, init: teacher"
    return f"  - {{name: sim, stage: train, {networks}, method: {{name: sim}}, loop: {LOOP}{options}}}\n"


REFLOW = f"""
  - {{name: pairs, stage: pairs, pairs: {PAIRS}}}
  - {{name: reflow, stage: train, init: teacher, pairs: pairs, method: {{name: reflow}}, loop: {LOOP}}}
"""


@pytest.mark.parametrize("kind", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_reflow_and_sim_make_students_that_read_prompts(tmp_path, teachers, prompts, kind):
    out = run(tmp_path, teachers[kind], REFLOW + sim(), f"data.path={prompts}")
    before = dict(read_denoiser(teachers[kind])[0].named_parameters())
    for name in ("reflow", "sim"):
        student = Student.load(out / name / "model")
        assert any(not torch.equal(p, before[key]) for key, p in student.denoiser.named_parameters())
        assert (student.facts["guidance"] == 3.0 and student.facts["teacher"] == kind) or name == "reflow"
        assert api.load(out / name / "model", device="cpu").sample(prompts=["an owl"], num=2).shape == (2, 3, 16, 16)
        (preview,) = (out / name / "previews").glob("*.png")
        assert Image.open(preview).size[0] >= 2 * 16  # the four fixed prompts
    (shard, _) = sorted((out / "pairs/shards").glob("*.safetensors"))
    assert set(load_file(shard)) == {"x0", "row", "cond.prompt"}  # prompts by number: an embedding weighs more
    assert not (out / "sim/model/lora").exists()
    # What an export is added to is told by `teacher`, where `init` is the same network.
    facts = student.facts
    assert facts["teacher_sha256"] == facts["init_sha256"]


@pytest.mark.slow
def test_lora_students_share_frozen_weights_and_are_written_merged_and_beside(tmp_path, teachers, prompts):
    lora = ", student: {lora: {rank: 2}, gradient_checkpointing: true}, teacher_precision: bf16"
    out = run(tmp_path, teachers["sd"], sim(lora), f"data.path={prompts}")
    student = Student.load(out / "sim/model")
    before = dict(read_denoiser(teachers["sd"])[0].named_parameters())
    assert student.adapters is not None and student.adapters.settings["rank"] == 2
    assert any(value.abs().sum() > 0 for name, value in student.adapters.tensors.items() if "lora_B" in name)
    moved = [name for name, p in student.denoiser.named_parameters() if not torch.equal(p, before[name])]
    paths = {re.sub(r"^unet\.(.*)\.lora_[AB]\.weight$", r"net.\1.weight", name) for name in student.adapters.tensors}
    assert moved and set(moved) <= paths
    # Merged into the weights as they were read, not as bfloat16 rounded them.
    name = next(name for name in before if name not in paths)
    assert torch.equal(dict(student.denoiser.named_parameters())[name], before[name])
    state = torch.load(next((out / "sim/checkpoints").glob("step-*")) / "state.pt", weights_only=True)
    assert all("lora" in key for key in state["networks"]["student"])


@pytest.mark.slow
def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, teachers, prompts):
    whole = run(
        tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path, teachers["sd"], sim(), f"data.path={prompts}"
    )
    asked = iter([False, True])
    (tmp_path / "b").mkdir()
    with pytest.raises(Stopped):
        run(tmp_path / "b", teachers["sd"], sim(), f"data.path={prompts}", interrupt=lambda: next(asked, True))
    parts = run(tmp_path / "b", teachers["sd"], sim(), f"data.path={prompts}", resume=True)
    weights = [load_file(out / "sim/model/unet/diffusion_pytorch_model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_captioned_pictures_train_on_latents_with_dropped_captions(tmp_path, teachers):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 24 + i, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    stage = f"""
  - {{name: tune, stage: train, init: teacher, caption_dropout: 0.3, method: {{name: flow_matching}}, loop: {LOOP}}}
"""
    out = run(tmp_path, teachers["xl"], stage, f"data={{path: {folder}, size: 16}}")
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["latents", "text", "text"]
    denoiser, facts = read_denoiser(out / "tune/model")
    assert facts["kind"] == "teacher" and denoiser.codec.reads_text
    again = run(tmp_path, out / "tune/model", stage, f"data={{path: {folder}, size: 16}}", f"out={tmp_path / 'again'}")
    assert (again / "tune/model").is_dir() and len(list((tmp_path / "cache").iterdir())) == 3  # found, not made again


@pytest.mark.slow
def test_a_cached_run_needs_no_text_encoder(tmp_path, teachers, prompts):
    teacher = shutil.copytree(teachers["sd"], tmp_path / "teacher")
    run(tmp_path, teacher, sim(), f"data.path={prompts}")
    texts = api.load(teacher, device="cpu")
    assert not texts.model.denoiser.codec._parts  # nothing is read before it is needed
    out = run(tmp_path, teacher, sim(), f"data.path={prompts}", f"out={tmp_path / 'second'}")
    assert (out / "sim/model").is_dir()


@pytest.mark.parametrize(
    ("stages", "overrides", "told"),
    [
        (REFLOW, [], r"this teacher reads text; set data\.path to prompts or captioned images"),
        (sim(), [], r"method sim reads \['cond\.text'\] and was given no data"),
        (sim(), ["data.kind=digits"], r"samples of different shapes|images without captions"),
        (
            sim(", teacher_precision: fp16"),
            ["P"],
            r"teacher_precision=fp16: method sim differentiates its networks' inputs",
        ),
        (
            sim().replace("batch: 4", "batch: 4, precision: fp16"),
            ["P"],
            r"loop\.precision=fp16: sim is trained in fp32, bf16",
        ),
        (sim(), ["P", "size=17"], r"size 17x17: the VAE works in steps of 2 pixels; nearest 16x16"),
        (sim(", caption_dropout: 2"), ["P"], r"caption_dropout"),
        (
            REFLOW.replace("pairs: pairs", "pairs: pairs, caption_dropout: 0.5"),
            ["P"],
            r"of the data, and here are none",
        ),
        (REFLOW.replace("pairs: pairs", "pairs: pairs, teacher_precision: bf16"), ["P"], r"this stage has no teacher"),
        (
            sim(", student: {lora: {rank: 2}}").replace("name: sim}", "name: sim, fake: {init: student}}"),
            ["P"],
            r"method\.fake\.init=student: under student\.lora the fake score adapts the teacher",
        ),
        (sim(", student: {lora: {rank: 2, targets: [to_qq]}}"), ["P"], r"to_qq"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, teachers, prompts, stages, overrides, told):
    given = [f"data.path={prompts}" if word == "P" else word for word in overrides]
    with pytest.raises(UserError, match=told) as caught:
        run(tmp_path, teachers["sd"], stages, *given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/sim/model").exists()


def test_pairs_of_other_prompts_are_refused(tmp_path, teachers, prompts):
    out = run(tmp_path, teachers["sd"], REFLOW.split("\n  - {name: reflow")[0], f"data.path={prompts}")
    other = tmp_path / "other.txt"
    other.write_text("something else")
    stage = REFLOW.split("\n")[2].replace("pairs: pairs", f"pairs: {out}/pairs/shards") + "\n"
    with pytest.raises(UserError, match=r"made with other prompts than those of data\.path"):
        run(tmp_path, teachers["sd"], stage, f"data.path={other}", f"out={tmp_path / 'second'}")


def test_a_stale_cache_is_refused(tmp_path, teachers, prompts):
    run(tmp_path, teachers["sd"], sim(), f"data.path={prompts}")
    for manifest in (tmp_path / "cache").glob("text-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"dtype": "torch.float16"', '"dtype": "torch.float32"'))
    with pytest.raises(UserError, match="a stale cache: made with another dtype; delete the folder"):
        run(tmp_path, teachers["sd"], sim(), f"data.path={prompts}", f"out={tmp_path / 'second'}")


def test_prompts_are_refused_by_a_network_that_reads_none(tmp_path, prompts):
    net = "net: {family: mlp, width: 8, depth: 1}"
    stage = f"  - {{name: fresh, stage: train, {net}, method: {{name: flow_matching}}, loop: {LOOP}}}\n"
    with pytest.raises(UserError, match="texts"):
        run(tmp_path, tmp_path, stage, f"data.path={prompts}", "teacher=null", "guidance=null")


def test_adapters_are_told_of_by_the_folder(tmp_path, teachers, prompts):
    out = run(tmp_path, teachers["sd"], sim(", student: {lora: {rank: 2, alpha: 4}}"), f"data.path={prompts}")
    student = Student.load(out / "sim/model")
    assert student.adapters is not None and student.adapters.settings["alpha"] == 4.0
    plain, base = student.denoiser, read_denoiser(teachers["sd"])[0]
    name = next(iter(student.adapters.tensors)).removesuffix(".lora_A.weight")
    a, b = (student.adapters.tensors[f"{name}.lora_{half}.weight"] for half in "AB")
    if a.ndim == 2:
        path = name.removeprefix("unet.")
        delta = plain.net.get_submodule(path).weight - base.net.get_submodule(path).weight
        assert torch.allclose(delta, 2.0 * b @ a, atol=1e-6)  # alpha / rank
    assert not lora_tensors(plain)


def test_an_already_distilled_checkpoint_is_no_start_unless_that_is_meant(tmp_path, teachers, prompts):
    from diffusers import UNet2DConditionModel

    teacher = shutil.copytree(teachers["sd"], tmp_path / "lcm")
    net = UNet2DConditionModel.from_pretrained(teacher / "unet")
    distilled = UNet2DConditionModel.from_config({**net.config, "time_cond_proj_dim": 16})
    distilled.load_state_dict(net.state_dict(), strict=False)
    distilled.save_pretrained(teacher / "unet")
    assert read_denoiser(teacher)[0].usual_guidance is None  # it is in the weights
    with pytest.raises(UserError, match=r"init=teacher is a distilled student.*init_distilled=true"):
        run(tmp_path, teacher, sim(), f"data.path={prompts}")
    run(tmp_path, teacher, sim(", init_distilled: true"), f"data.path={prompts}")
