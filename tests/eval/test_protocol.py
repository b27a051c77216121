"""What is measured of a student on points, where the student is a broken one."""

from __future__ import annotations

import json

import torch

from fastgen.eval.protocol import point_protocol
from fastgen.paths import RectifiedFlow
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from tests.trainers.truth import mixture


def student(scale):
    """Of which the last layer's weights are so many times what they should be."""
    torch.manual_seed(0)
    denoiser = mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None).eval()
    with torch.no_grad():
        for weight in list(denoiser.parameters())[-2:]:
            weight.copy_(torch.randn_like(weight) * scale)
    return Student(denoiser, SamplerSpec(path=RectifiedFlow(), times={1: (1.0,)}), {})


def test_a_diverged_student_is_told_by_the_figures_that_it_has():
    told = point_protocol(student(1e20), Teacher(mixture()), n=64, seed=0)
    assert told["rmse_ratio"] > 1e3 and told["straightness"] is told["straightness_ratio"] is None
    json.dumps(told, allow_nan=False)
    told = point_protocol(student(0.1), Teacher(mixture()), n=64, seed=0)
    assert told["rmse_ratio"] < 10 and 0 < told["straightness"] < 100
