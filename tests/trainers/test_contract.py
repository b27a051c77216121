"""What every method of the registry keeps, proved on its own default config under --smoke."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import read_yaml
from fastgen.errors import Stopped
from fastgen.listing import find_config
from fastgen.samplers.draw import draw
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.student import Student, save_teacher
from fastgen.teacher import Teacher, read_denoiser
from fastgen.trainers.engine.checkpoint import Checkpoints
from fastgen.trainers.engine.method import find_method, methods

HALF, WHOLE = 3, 6  # the steps of a smoke run, which saves half-way


MLP = "{family: mlp, width: 16, depth: 1}"
# In place of what a default config says, where it says it: the contract does not depend on the network.
SMALL = {"net": MLP, "smoke_teacher": MLP, "data": "{kind: synthetic, size: 4, channels: 1, classes: 3}"}


def load(name, out):
    config = find_config(name)
    tree = read_yaml(config)
    # A method of text networks brings a tiny one of its own, and texts.
    text = isinstance(tree.get("smoke_teacher"), str)
    small = [] if text else [f"{key}={value}" for key, value in SMALL.items() if key in tree]
    return load_run(config, [f"out={out}", *small], smoke=True)


def trained(name, stages):
    """The stages that train this method, those that make its teacher or its pairs left out."""
    found = [stage for stage in stages if stage.stage == "train" and stage.method.name == name]
    assert found, f"configs/{name}/default.yaml has no stage with method {name}"
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each method's smoke run from start to end, made once."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "run"
            config, stages = load(name, out)
            execute(config, stages, Context(config, out, "cpu"), resume=False)
            made[name] = (out, stages)
        return made[name]

    return run


def weights(model):
    """Every tensor of a model folder, by file and name."""
    files = {str(file.relative_to(model)): load_file(file) for file in model.rglob("*.safetensors")}
    return {f"{file}:{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def texts(folder):
    """Conditions for three samples of a network that reads text; None for any other."""
    codec = read_denoiser(folder)[0].codec
    return None if codec is None else codec.encode_prompts(["a fox", "a boat", "a street"])


@pytest.mark.parametrize("name", methods())
def test_smoke_training_moves_every_network(name, whole):
    out, stages = whole(name)
    for stage in trained(name, stages):
        checkpoints = Checkpoints(out / stage.name / "checkpoints")
        early, late = (checkpoints.load(step)["networks"] for step in (HALF, WHOLE))
        for network, tensors in late.items():
            moved = [key for key, value in tensors.items() if not torch.equal(value, early[network][key])]
            assert moved, f"{stage.name}: '{network}' stood still"
            assert all(value.isfinite().all() for value in tensors.values())


# lcm runs on a network for texts; tests/trainers/test_lcm_unet.py resumes a small one.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "lcm" else ()) for name in methods()]
)
def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(name, whole, tmp_path):
    out, stages = whole(name)
    asked = []

    def interrupt():
        asked.append(1)
        return len(asked) % 4 == 0  # within every training stage, and not where it saves anyway

    stops, finished = 0, False
    while not finished:
        config, again = load(name, tmp_path / "run")
        try:
            execute(config, again, Context(config, tmp_path / "run", "cpu", interrupt), resume=stops > 0)
            finished = True
        except Stopped:
            stops += 1
    assert stops >= len(trained(name, stages))
    for stage in trained(name, stages):
        expected, found = (weights(root / stage.name / "model") for root in (out, tmp_path / "run"))
        assert expected and expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), (stage.name, key)


@pytest.mark.parametrize("name", methods())
def test_saved_and_loaded_model_draws_the_same_samples(name, whole, tmp_path):
    out, stages = whole(name)
    folder = out / trained(name, stages)[-1].name / "model"
    rows, cond = torch.arange(3), texts(folder)
    if find_method(name).makes == "teacher":
        denoiser, _ = read_denoiser(folder)
        save_teacher(denoiser, tmp_path / "again", {})
        models = [Teacher(denoiser), Teacher(read_denoiser(tmp_path / "again")[0])]
        steps = [2]
    else:
        student = Student.load(folder)
        student.save(tmp_path / "again")
        models, steps = [student, Student.load(tmp_path / "again")], list(student.sampler.times)
    for n in steps:
        one, other = (draw(model, rows, seed=0, steps=n, cond=cond) for model in models)
        assert torch.equal(one, other) and one.isfinite().all()
        assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("name", methods())
def test_exported_model_holds_the_weights_of_the_last_step(name, whole):
    out, stages = whole(name)
    for stage in trained(name, stages):
        state = Checkpoints(out / stage.name / "checkpoints").load(WHOLE)
        source = state["ema"][stage.loop.ema[0].name] if stage.loop.ema else state["networks"]["student"]
        denoiser, _ = read_denoiser(out / stage.name / "model")
        exported = denoiser.state_dict()
        assert exported.keys() == source.keys()
        for key, value in source.items():
            assert torch.equal(value, exported[key]), (stage.name, key)
