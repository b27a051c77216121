"""What sCM learns on the mixture: a short run of small networks, and the shipped config with its whole budget."""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path

import pytest
import torch

from fastgen.eval import metrics
from fastgen.samplers.draw import draw
from fastgen.student import Student
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig, ScheduleConfig
from fastgen.trainers.imitate import Imitate
from fastgen.trainers.scm import Scm, TangentConfig
from tests.trainers.test_scm import PLANTED, Rows, plant
from tests.trainers.truth import mixture

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scm_mixture.py"
BOUND = 0.12


def learn(out: Path, steps: int) -> tuple[float, float]:
    """Ratio of one-step RMSE to the teacher's own (after imitation, after sCM)."""
    torch.manual_seed(0)
    student, truth = mlp.build(mlp.MLPConfig(width=32, depth=2), (2,), None), mixture()
    teacher = Teacher(truth)
    fast = {
        "batch": 128,
        "clip": None,
        "save_every": 10_000,
        "log_every": 1000,
        "schedule": ScheduleConfig(decay="cosine"),
    }
    begin = Imitate(Imitate.Config(), student, teacher)
    Loop(begin, None, LoopConfig(steps=100, optim=OptimConfig(lr=4e-3), **fast), out / "imitate").run()

    rows = torch.arange(500)
    exact = draw(teacher, rows, seed=3, steps=40)
    own = metrics.rmse(draw(teacher, rows, seed=3, steps=1, solver="euler"), exact)

    def ratio(network: torch.nn.Module) -> float:
        made = Student(network.eval(), Scm(Scm.Config(data_sd=1.7), network, teacher).sampler(), {})
        return metrics.rmse(draw(made, rows, seed=3, steps=1), exact) / own

    first = ratio(student)
    method = Scm(Scm.Config(data_sd=1.7, tangent=TangentConfig(warmup=40)), student, teacher)
    config = LoopConfig(steps=steps, optim=OptimConfig(name="radam", lr=4e-3), ema=(AverageConfig(decay=0.95),), **fast)
    data = Rows({"x0": truth.sample(0, "x", torch.arange(8192))})
    loop = Loop(method, data, config, out / "scm")
    loop.run()
    return first, ratio(loop.student)


def test_some_hundred_steps_lead_a_noise_near_its_end_point(tmp_path):
    first, last = learn(tmp_path, steps=180)
    assert 0.8 < first < 1.2 and last < 0.65, (first, last)  # 0.52 where this was written


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_end_elsewhere(error, tmp_path, monkeypatch):
    plant(error, monkeypatch)
    assert learn(tmp_path, steps=180)[1] > 0.8  # 0.94, 1.95 and 1.05 where this was written


@pytest.mark.slow
def test_the_shipped_config_gives_its_figures(tmp_path):
    benchmark = runpy.run_path(str(BENCHMARK))
    found = [benchmark["measure"](tmp_path, "sCM", seed)[0] for seed in (0, 1, 2)]
    assert statistics.median(found) <= BOUND, found
