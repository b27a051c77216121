"""What consistency methods learn on the mixture: short runs of small networks, and the shipped configs, whole."""

from __future__ import annotations

import copy
import functools
import runpy
import statistics
from pathlib import Path

import pytest
import torch

from fastgen.data.closed_form import MixtureSamples
from fastgen.data.source import Source
from fastgen.denoiser import Denoiser
from fastgen.eval import metrics
from fastgen.samplers.draw import draw
from fastgen.student import Student
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.consistency import Consistency
from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig, ScheduleConfig
from fastgen.trainers.imitate import Imitate
from tests.trainers.truth import mixture

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "consistency_mixture.py"
# RMSE ratios of docs/consistency.md, medians over three seeds, times 1.3.
LIMITS = {"ict": 0.32, "ect": 0.242, "cd": 0.051}
ROWS = torch.arange(1000)
FAST = {"batch": 128, "clip": None, "save_every": 10_000, "log_every": 1000}


@functools.lru_cache
def ends() -> tuple[torch.Tensor, float]:
    """Where the teacher's ODE takes the noise of `ROWS`, and how far its own single step is from there."""
    teacher = Teacher(mixture())
    exact = draw(teacher, ROWS, seed=5, steps=60)
    return exact, metrics.rmse(draw(teacher, ROWS, seed=5, steps=1, solver="euler"), exact)


QUICK = {"optim": OptimConfig(lr=4e-3, betas=(0.9, 0.99)), "schedule": ScheduleConfig(decay="cosine")}


def ratio(student: Denoiser, method: Consistency) -> float:
    exact, first = ends()
    return metrics.rmse(draw(Student(student.eval(), method.sampler(), {}), ROWS, seed=5, steps=1), exact) / first


@pytest.fixture(scope="module")
def imitated(tmp_path_factory) -> Denoiser:
    """A small copy of the mixture: what the students begin as."""
    torch.manual_seed(0)
    student = mlp.build(mlp.MLPConfig(width=32, depth=2, path="EDM"), (2,), None)
    method, config = Imitate(Imitate.Config(), student, Teacher(mixture())), LoopConfig(steps=150, **QUICK, **FAST)
    Loop(method, None, config, tmp_path_factory.mktemp("imitate")).run()
    return student


def learn(out: Path, student: Denoiser, kind: str, steps: int, **options) -> tuple[float, float]:
    """The RMSE ratio before and after `steps` steps of a kind."""
    student, teacher = copy.deepcopy(student), Teacher(mixture())
    method = Consistency(Consistency.Config(kind=kind, **options), student, teacher)
    begin = ratio(student, method)
    config = LoopConfig(steps=steps, ema=(AverageConfig(decay=0.98),), **QUICK, **FAST)
    loop = Loop(method, Source(MixtureSamples(teacher.denoiser, 100_000), 0), config, out)
    loop.run()
    return begin, ratio(loop.student, method)


SHORT = {
    "cd": {"distance": "l2"},
    "ect": {"times": {"q": 4, "doubling": 50}, "distance": "l2"},
    "ict": {"grid": {"s0": 10, "s1": 40}, "distance": "l2"},
}


BELOW = {"cd": 0.4, "ect": 0.6, "ict": 0.65}  # from 0.90; 0.30, 0.48 and 0.52 where this was written


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "cd" else pytest.mark.slow) for kind in SHORT])
def test_a_short_run_brings_one_step_near_the_end_points(kind, tmp_path, imitated):
    begin, end = learn(tmp_path, imitated, kind, 150, **SHORT[kind])
    assert begin > 0.85 and end < BELOW[kind], (begin, end)


@pytest.mark.slow
def test_a_teachers_step_taken_backwards_ends_elsewhere(tmp_path, imitated, monkeypatch):
    step = Consistency.teacher_step
    monkeypatch.setattr(Consistency, "teacher_step", lambda self, x, *rest: 2 * x - step(self, x, *rest))
    end = learn(tmp_path, imitated, "cd", 150, **SHORT["cd"])[1]
    assert not end < 2 * BELOW["cd"], end  # 165 where this was written: it diverges


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), LIMITS.items())
def test_the_shipped_config_gives_its_figures(kind, limit, tmp_path):
    measure = runpy.run_path(str(BENCHMARK))["measure"]
    found = [measure(tmp_path, kind, seed)["rmse_ratio"] for seed in (0, 1, 2)]
    assert statistics.median(found) <= limit, found


@pytest.mark.slow
def test_the_whole_run_with_the_step_backwards_is_far_above_the_bound(tmp_path):
    measure = runpy.run_path(str(BENCHMARK))["measure"]
    ratio = measure(tmp_path, "cd-reversed", 0)["rmse_ratio"]
    assert not ratio < 2 * 0.18, ratio
