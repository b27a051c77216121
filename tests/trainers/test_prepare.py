"""Preparing a SANA teacher: loss and gradient by hand, the fixed point, the check at the end, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel

from fastgen.errors import RunFailed, UserError
from fastgen.nets import sana as changes
from fastgen.nets.lora import LoraConfig, add_lora
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.plan import plan
from fastgen.samplers import ode
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.teacher import Teacher, read_denoiser
from fastgen.teachers.sana import SanaDenoiser
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.prepare import LEVELS, Prepare
from tests import tiny
from tests.trainers import truth

RF, SHAPE = RectifiedFlow(), (4, 2, 2)


def sana(**options: Any) -> SanaDenoiser:
    torch.manual_seed(0)
    net: Any = tiny.sana_transformer(**options)
    scale = 1000 * net.config.timestep_scale
    return SanaDenoiser(net, RF, Prediction(kind="flow"), shape=SHAPE, time_scale=scale).eval()


def rows(n: int = 6, first: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(first)
    mask = (torch.arange(5) < torch.randint(1, 6, (n, 1), generator=g)).float()
    x0, text = torch.randn(n, *SHAPE, generator=g), torch.randn(n, 5, 16, generator=g)
    return {"x0": x0, "cond.text": text, "cond.text_mask": mask}


def batch(n: int = 6) -> Batch:
    return Batch(rows(n), torch.arange(n), seed=5, step=0, steps=1)


def prepare(teacher: SanaDenoiser | None = None, **options: Any) -> Prepare:
    teacher = teacher or sana()
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Prepare(Prepare.Config(**options), student, Teacher(teacher))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_is_that_of_the_formula(weight):
    method, given = prepare(data_weight=weight), batch()
    r, eps = given.uniform("r"), given.normal("eps", SHAPE)
    x = (1 - r[:, None, None, None]) * given.x0 + r[:, None, None, None] * eps
    cond = {"text": given["cond.text"], "text_mask": given["cond.text_mask"]}
    with torch.no_grad():  # the networks as stock code calls them
        nets = [method.student.net, method.teacher.denoiser.net]
        found, old = (
            net(x, cond["text"], time, encoder_attention_mask=cond["text_mask"], return_dict=False)[0]
            for net, time in zip(nets, (r, 1000 * r), strict=True)
        )
    expected = (1 - weight) * (found - old).square().mean() + weight * (found - (eps - given.x0)).square().mean()
    loss, logs = method.loss(given)
    torch.testing.assert_close(loss, expected)
    assert set(logs) == {name for name, share in (("mse/teacher", 1 - weight), ("mse/data", weight)) if share}


def test_every_weight_is_trained_and_the_teachers_none():
    method = prepare()
    loss, _ = method.loss(batch(32))
    loss.backward()
    still = [name for name, p in method.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
    assert all(p.grad is None for p in method.teacher.parameters())
    assert sum("norm_q" in name or "norm_k" in name for name, _ in method.student.named_parameters()) == 8


def test_the_teacher_itself_has_no_loss_and_no_error():
    method = prepare()
    method.teacher = Teacher(copy.deepcopy(method.student))
    loss, _ = method.loss(batch())
    assert loss == 0 and set(method.errors(method.student, batch()).values()) == {0.0}


def test_guidance_stays_out_of_the_target():
    """A guided teacher is reproduced as it answers to the condition alone."""
    method, given = prepare(), batch()
    plain = method.loss(given)[0]
    method.teacher.guidance = 7.0
    assert torch.equal(method.loss(given)[0], plain)


def test_errors_are_relative_and_by_level():
    """A student that answers the teacher's velocity times 1 + 0.1 r."""

    class Off:
        shape = SHAPE

        def __call__(self, x, t, cond, *, on):
            pair = method.teacher(x, t, cond, on=on)
            return type(pair)(torch.zeros_like(x), pair.velocity * (1 + 0.1 * t[:, None, None, None]))

    method = prepare()
    found = method.errors(Off(), batch())
    assert list(found) == list(LEVELS)
    for level, error in found.items():
        assert error == pytest.approx(0.1 * level, rel=1e-4)


def test_the_check_ends_the_run_beyond_the_tolerance():
    method = prepare(tolerance=1e-6)
    with pytest.raises(RunFailed, match=r"at r = .* off the teacher's .* allowed\s+are 1e-06 .* no model was written"):
        method.finish(method.student, batch())
    facts = prepare(tolerance=10).finish(method.student, batch())
    assert set(facts) == {"velocity_error"} and len(facts["velocity_error"]) == len(LEVELS)
    with torch.no_grad():
        method.student.net.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RunFailed):  # which no comparison with a number would notice
        prepare(tolerance=10).finish(method.student, batch())


def test_what_is_prepared_is_what_stock_code_reads(tmp_path):
    method = prepare()
    method.student.net.save_pretrained(tmp_path)
    net: Any = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert net.config.qk_norm == "rms_norm_across_heads" and net.config.timestep_scale == 0.001
    assert method.teacher.denoiser.net.config.qk_norm is None and method.teacher.denoiser.time_scale == 1000
    kept = prepare(qk_norm=False).student.net
    assert kept.config.qk_norm is None and kept.config.timestep_scale == 0.001


def test_training_brings_it_near(tmp_path):
    """A teacher whose embedding is smooth in r, as that of a trained one, and a student that was moved away."""

    class Source:
        def get(self, numbers):
            given = rows(64)
            return {name: value[numbers % 64] for name, value in given.items()}

    teacher = sana()
    frequencies = 1000 * torch.exp(-torch.arange(128) / 128 * math.log(10000))
    with torch.no_grad():
        changes.embedder(teacher.net).linear_1.weight[:, (frequencies > 10).repeat(2)] = 0
    method = prepare(teacher)
    with torch.no_grad():  # and to have something to learn
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = method.errors(method.student, batch(16))
    config = LoopConfig(steps=60, batch=16, optim=OptimConfig(lr=2e-3), save_every=60)
    Loop(method, Source(), config, tmp_path).run()
    after = method.errors(method.student.eval(), batch(16))
    assert max(after.values()) < 0.6 * max(before.values()), (max(before.values()), max(after.values()))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}, "has a dense time and QK-norm already"),
        ({"guidance_embeds": True}, "it is a student already"),
    ],
)
def test_networks_that_need_no_preparation_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        prepare(sana(**options))


def test_a_dense_time_alone_still_gets_its_norms():
    method = prepare(sana(timestep_scale=0.001))
    assert method.student.net.config.qk_norm and method.embedding_error == 0


def test_other_networks_and_adapters_are_refused():
    other = truth.small()
    with pytest.raises(UserError, match="give a SANA checkpoint"):
        Prepare(Prepare.Config(), other, Teacher(copy.deepcopy(other)))
    with pytest.raises(UserError, match="set teacher=PATH"):
        Prepare(Prepare.Config(), sana(), None)
    adapted = add_lora(sana(), LoraConfig(rank=2, targets=("to_q",)), 0)
    with pytest.raises(UserError, match=r"student\.lora saves adapters alone"):
        Prepare(Prepare.Config(), adapted, Teacher(sana()))


def smoke(tmp_path: Path, *overrides: str) -> Path:
    where = Path(__file__).parents[2] / "configs/prepare/sana.yaml"
    out = [f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    config, stages = load_run(where, [*out, *overrides], smoke=True)
    execute(config, stages, Context(config, tmp_path / "out", "cpu"), resume=False)
    return tmp_path / "out" / "prepare"


def test_a_run_writes_a_teacher_that_tells_its_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "zoo"))
    folder = smoke(tmp_path)
    denoiser, data = read_denoiser(folder / "model")
    assert data["kind"] == "teacher" and denoiser.time_scale == 1 and denoiser.codec.reads_text
    assert len(data["facts"]["velocity_error"]) == len(LEVELS)
    z = torch.randn(1, *denoiser.shape)
    cond = denoiser.codec.encode_prompts(["a grating"])
    assert ode.solve(Teacher(denoiser, guidance=4.5), z, steps=2, cond=cond).isfinite().all()


def test_a_run_beyond_the_tolerance_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "zoo"))
    with pytest.raises(RunFailed, match="no model was written"):
        smoke(tmp_path, "stages.prepare.method.tolerance=1e-4")
    left = tmp_path / "out" / "prepare"
    assert not (left / "model").exists() and not (left / "stage.json").exists() and (left / "checkpoints").is_dir()


def test_a_run_is_planned_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "zoo"))
    found = plan("zoo:sana-0.6b", "prepare/sana", ["size=null"], vram=24.0)
    count = sum(p.numel() for p in prepare(read_denoiser("zoo:sana-0.6b")[0]).student.parameters())
    assert found.footprint.parameters["student"] == count and found.fits
    assert found.footprint.activations > 0
