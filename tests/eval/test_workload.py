"""What is timed: scopes, stages, network calls, and the listening to networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.eval.latency import HostWatch, Stages
from fastgen.eval.workload import Workload, networks, outermost_calls, pixels, resolution
from fastgen.samplers import ode
from fastgen.student import Student
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from tests.eval.models import pixel_denoiser, spec, text_denoiser, text_student


def stages_of(model, **options):
    stages = Stages(HostWatch())
    work = Workload(model, batch=2, stages=stages, **options)
    stages.on = True
    out = work.run("e2e")
    return list(stages.medians()), out


def test_text_models_go_from_prompts_to_pixels():
    names, out = stages_of(text_student(), steps=1)
    assert names == ["text", "net", "decode", "copy"]
    assert out.shape == (2, 16, 16, 3) and out.dtype == torch.uint8 and out.device.type == "cpu"


def test_pixel_models_have_neither_text_nor_decoder():
    names, out = stages_of(Student(pixel_denoiser(), spec(1), {}), steps=1)
    assert names == ["net", "copy"] and out.shape == (2, 8, 8, 1)


def test_the_whole_way_ends_in_the_networks_own_pictures():
    model = text_student()
    work = Workload(model, steps=2, batch=3, seed=5)
    with torch.no_grad():
        expected = pixels(model.denoiser.codec.decode(work.run("net")))
    assert torch.equal(work.run("e2e"), expected)
    assert not torch.equal(Workload(model, steps=2, batch=3, seed=6).run("e2e"), expected)


def test_pixels_round_as_pictures_do():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert pixels(x).flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("solver", "steps", "calls"), [("euler", 3, 3), ("heun", 3, 5), ("dpm++", 3, 3)])
def test_network_calls_of_a_teacher_are_counted_right(solver, steps, calls):
    work = Workload(Teacher(text_denoiser()), steps=steps, batch=1, solver=solver, guidance=3.0)
    work.record()
    assert work.nfe == calls == ode.nfe(solver, steps)
    net = work.model.denoiser.net
    assert sum(module is net for module, _, _ in work.recorded) == calls


@pytest.mark.parametrize("renoise", [False, True])
def test_a_student_calls_its_network_once_a_step(renoise):
    work = Workload(text_student(1, 2, 4, renoise=renoise), steps=4, batch=1)
    work.record()
    assert sum(module is work.model.denoiser.net for module, _, _ in work.recorded) == work.nfe == 4


def test_guidance_doubles_the_batch_of_the_network():
    for guidance, rows in ((None, 2), (4.0, 4)):
        work = Workload(Teacher(text_denoiser()), steps=1, batch=2, guidance=guidance)
        work.record()
        called = [arguments[0] for module, arguments, _ in work.recorded if module is work.model.denoiser.net]
        assert [len(x) for x in called] == [rows]


def test_bare_runs_the_recorded_networks_and_nothing_else():
    model = text_student()
    work = Workload(model, steps=2, batch=1)
    work.record()
    codec = model.denoiser.codec
    with outermost_calls() as calls:
        work.run("bare")
    net = model.denoiser.net
    assert [module for module, _, _ in calls] == [codec.text, net, net, codec.decoder]
    codec.decode = codec.encode_prompts = None  # not even called
    work.run("bare")


def test_networks_are_the_outermost_modules_once_each():
    model = text_student()
    work = Workload(model, steps=2, batch=1)
    codec = model.denoiser.codec
    assert networks(lambda: work.run("e2e")) == [codec.text, model.denoiser.net, codec.decoder]


def test_listening_ends_with_its_block():
    layer = nn.Linear(2, 2)
    with outermost_calls() as calls:
        layer(torch.zeros(1, 2))
    layer(torch.zeros(1, 2))
    assert len(calls) == 1


def test_resolution_is_that_of_the_pictures():
    assert resolution(text_denoiser()) == (16, 16)
    assert resolution(pixel_denoiser(6)) == (6, 6)
    points = mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None)
    with pytest.raises(UserError, match="no images"):
        resolution(points)
