"""Consistency methods around their loss: sampling, what is refused, resumption, what is told."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from fastgen.denoiser import Denoiser
from fastgen.errors import Stopped, UserError
from fastgen.paths import VP, Prediction
from fastgen.samplers import few_step
from fastgen.samplers.replay import replay
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.consistency import KINDS, Consistency
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch
from tests.trainers.test_consistency import EXACT, Exact, S, law, made, moved, points
from tests.trainers.truth import gaussian, small

# Sampling


def test_samples_of_an_exact_student_are_the_teachers():
    method = made("cd", Exact(), law(), mid=0.8)
    spec, z = method.sampler(), gaussian(512, (2,))
    assert spec.renoise and spec.follows and spec.keeps_noise and spec.init == "sigma"
    assert spec.times == {1: (80.0,), 2: (80.0, 0.8)}
    one = few_step.sample(method.student, spec, z, 1)
    torch.testing.assert_close(
        one,
        moved(80 * z, torch.full((512,), 80.0, dtype=torch.float64), torch.full((512,), 0.002, dtype=torch.float64)),
        **EXACT,
    )
    two = few_step.sample(method.student, spec, z, 2, renoise=lambda i: gaussian(512, (2,), 9))
    for found in (one, two):
        torch.testing.assert_close(found.T.cov(), S, atol=0.06, rtol=0)
    assert made("ict", Exact()).sampler().follows is None and not made("ict", Exact()).sampler().keeps_noise


def test_students_of_other_paths_are_sampled_at_their_own_times():
    vp = mlp.build(mlp.MLPConfig(width=8, depth=1, path="VP", prediction="eps"), (2,), None)
    assert made("ict", vp, mid=1.6).sampler().times == {1: (999.0,), 2: (999.0, 497.0)}
    method = made("ict", vp)
    assert (method.low, method.high) == pytest.approx((0.029167, 14.6146), rel=1e-4)
    flow = small()
    assert made("ict", flow, mid=1.0).sampler().times == {1: (1.0,), 2: (1.0, 0.5)}
    stock = VPNet()
    assert replay(stock, made("ict", stock).sampler()).scheduler == "LCMScheduler"


class VPNet(Denoiser):
    """A pixel network on Stable Diffusion's table."""

    family = "unet"

    def __init__(self) -> None:
        super().__init__(None, VP(), Prediction(kind="eps"), shape=(3, 8, 8))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ict", "mu": 0.99}, r"mu has no meaning for kind=ict \(it is for cd\)"),
        ({"kind": "ect", "mu": 0.99}, "mu has no meaning for kind=ect"),
        ({"kind": "ict", "solver": "euler"}, "solver has no meaning for kind=ict"),
        ({"kind": "ict", "times": {}}, "times has no meaning for kind=ict"),
        ({"kind": "cd", "times": {"q": 2}}, "times has no meaning for kind=cd"),
        ({"kind": "ect", "grid": {"n": 18}}, "grid has no meaning for kind=ect"),
        ({"kind": "ict", "truncation": {}}, "truncation has no meaning for kind=ict"),
        ({"kind": "ect", "guidance": 2.0}, "set solver"),
        ({"kind": "ict", "s_min": 90.0}, "s_min=90 must lie below s_max=80"),
        ({"kind": "ict", "huber_c": -1.0}, "huber_c=-1 is negative"),
        ({"kind": "cd", "distance": "l2", "huber_c": 0.1}, "huber_c=0.1 has no meaning for distance=l2"),
    ],
)
def test_settings_without_an_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Consistency.Config(**options)


def test_a_kinds_own_values_are_filled_in_and_kept():
    for kind in KINDS:
        config = Consistency.Config(kind=kind)
        assert Consistency.Config.model_validate(config.model_dump()) == config
    config = Consistency.Config(kind="cd", grid={"rho": 5.0})
    assert (config.grid.n, config.grid.bins, config.grid.rho, config.solver) == (18, "uniform", 5.0, "heun")
    assert Consistency.Config(kind="tcm", times={"q": 512.0}).times.law == "log_student_t"


def test_networks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="kind cd: solver=heun needs teacher=PATH"):
        made("cd")
    with pytest.raises(UserError, match="student None, teacher 3"):
        made("cd", small(), small(3))
    with pytest.raises(UserError, match=r"method.guidance=3: the teacher has no null condition"):
        made("cd", small(), small(), guidance=3.0)
    with pytest.raises(UserError, match=r"none of the student's levels"):
        made("ict", mlp.build(mlp.MLPConfig(width=8, path="VP"), (2,), None), s_min=20.0)
    with pytest.raises(UserError, match="precision=bf16"):
        Loop(made("ict"), None, LoopConfig(precision="bf16"), tmp_path)


# Runs


TINY = """
about: tiny
status: smoke only
data: {kind: synthetic, size: 4, channels: 1, classes: 3, rows: 64}
stages:
  - name: ict
    stage: train
    net: {family: mlp, width: 16, depth: 1, path: EDM, prediction: cm, dropout: 0.2}
    method: {name: consistency, kind: ict, grid: {s0: 2, s1: 16}}
    loop: {steps: 20, batch: 8, save_every: 6, log_every: 1}
"""


def run(folder, *overrides, interrupt=None, resume=False):
    file = folder.parent / "tiny.yaml"
    file.write_text(TINY)
    config, stages = load_run(file, [f"out={folder}", *overrides])
    execute(config, stages, Context(config, folder, "cpu", interrupt or (lambda: False)), resume=resume)
    return folder / "ict"


def logged(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_in_its_stage_of_the_schedule(tmp_path):
    whole = run(tmp_path / "whole")
    asked = []
    with pytest.raises(Stopped):
        run(tmp_path / "cut", interrupt=lambda: asked.append(1) or len(asked) == 8)
    cut = run(tmp_path / "cut", resume=True)
    one, other = ([(r["loss/student"], r["levels"]) for r in logged(s) if "levels" in r] for s in (whole, cut))
    assert one == other and [levels for _, levels in one] == [3] * 5 + [5] * 5 + [9] * 5 + [17] * 5


def test_another_budget_on_resume_is_refused(tmp_path):
    """N(k) depends on it."""
    asked = []
    with pytest.raises(Stopped):
        run(tmp_path / "cut", interrupt=lambda: asked.append(1) or len(asked) == 8)
    with pytest.raises(UserError, match=r"begun with another loop.steps"):
        run(tmp_path / "cut", "stages.ict.loop.steps=40", resume=True)


def test_diagnosis_names_the_deciles():
    method, rows = made("ict", Exact()), points(640)
    told = method.diagnose(method.student, rows)
    assert set(told) == {f"distance/d{i}" for i in range(10)}
    assert told["distance/d9"] > told["distance/d0"] > 0
    assert len(method.diagnose(method.student, points(3))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_planned_with_shapes_alone(kind):
    """`fastgen inspect --plan` runs the loss without any numbers."""
    student = mlp.build(mlp.MLPConfig(width=8, depth=1, path="EDM"), (2,), 3).to("meta")
    teacher = Teacher(mlp.build(mlp.MLPConfig(width=8, depth=1, path="EDM"), (2,), 3).to("meta"))
    method = Consistency(Consistency.Config(kind=kind), student, teacher)
    data = {"x0": torch.empty(4, 2, device="meta"), "label": torch.empty(4, dtype=torch.int64, device="meta")}
    loss, _ = method.loss(Batch(data, torch.arange(4, device="meta"), seed=0, step=0, steps=9))
    assert loss.is_meta and loss.shape == ()
