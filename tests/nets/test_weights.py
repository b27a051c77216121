"""Weights are loaded whole or refused, naming the file and the first tensor at fault."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastgen.errors import UserError
from fastgen.nets.weights import load_weights


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_was_saved_is_loaded(file):
    source, goal = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(source.state_dict(), file)
    load_weights(goal, file)
    assert torch.equal(goal.weight, source.weight) and torch.equal(goal.bias, source.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "no tensor 'bias'"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' has no place"),
        (lambda t: t.update(weight=torch.zeros(2, 4)), r"tensor 'weight' is \(2, 4\), the network's \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(file, change, message):
    goal = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in goal.state_dict().items()}
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as error:
        load_weights(goal, file)
    assert str(file) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in goal.state_dict().items())


def test_half_precision_is_widened_and_said(file, caplog):
    source, goal = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file({name: tensor.half() for name, tensor in source.state_dict().items()}, file)
    load_weights(goal, file)
    assert goal.weight.dtype == torch.float32 and torch.equal(goal.weight, source.weight.half().float())
    assert "float16" in caplog.text and str(file) in caplog.text
