"""Draws of a run's closed-form teacher as training data."""

from __future__ import annotations

import pytest
import torch

from fastgen.data.closed_form import MixtureSamples
from fastgen.errors import UserError
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.inputs import training_data
from tests.commands import POINTS, write_config
from tests.trainers.truth import mixture


def test_rows_are_exact_draws_that_depend_on_their_number_alone():
    data = MixtureSamples(mixture(), 4000)
    index = torch.arange(4000)
    x0 = data.get(index)["x0"]
    assert x0.shape == (4000, 2) and x0.dtype == torch.float32 and len(data) == 4000
    assert torch.equal(data.get(index[[7, 3000]])["x0"], x0[[7, 3000]])
    mean, cov = mixture().moments()
    assert torch.allclose(x0.double().mean(0), mean, atol=0.08)
    assert torch.allclose(x0.double().T.cov(), cov, atol=0.12)
    with pytest.raises(IndexError):
        data.get(torch.tensor([4000]))


def test_labels_come_in_turn_and_are_those_of_the_draws():
    data = MixtureSamples(mixture(labels=[0, 1, 1]), 300)
    rows = data.get(torch.arange(300))
    assert rows["label"].tolist() == [i % 2 for i in range(300)] and data.num_classes == 2
    own, other = (mixture(components=kept).log_prob(rows["x0"], torch.zeros(300)) for kept in ([0], [1, 2]))
    assert ((own > other) == (rows["label"] == 0)).float().mean() > 0.98


def test_a_run_without_a_closed_form_teacher_is_refused(tmp_path):
    config = write_config(tmp_path / "c.yaml", POINTS, data={"kind": "closed_form", "rows": 50})
    run, _ = load_run(config, [f"out={tmp_path / 'out'}"])
    given = training_data(Context(run, tmp_path, "cpu"))
    assert given is not None and len(given) == 50 and given.shape == (2,)
    run = run.model_copy(update={"teacher": None})
    with pytest.raises(UserError, match="teacher is not set"):
        training_data(Context(run, tmp_path, "cpu"))
