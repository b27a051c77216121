"""Budgets and rates that cannot be are refused where the config is read, and a diverged run keeps what was good."""

from __future__ import annotations

import pytest
import torch

from fastgen.config import validate
from fastgen.errors import RunFailed, UserError
from fastgen.trainers.engine.loop import Loop, LoopConfig
from tests.commands import IMAGES, refused, write_config
from tests.toys import ManyBackwards, Points, toy


@pytest.mark.parametrize(
    "key",
    ["steps", "batch", "micro", "clip", "save_every", "keep", "keep_every", "log_every", "preview_every", "bad_limit"],
)
def test_zero_and_less_are_no_budgets(key, tmp_path):
    for value in (0, -1):
        with pytest.raises(UserError, match=f"'{key}': input should be greater"):
            validate(LoopConfig, {key: value}, "loop")
    config = write_config(tmp_path / "c.yaml", IMAGES)
    message = refused(tmp_path / "run", "distill", config, f"stages.teacher.loop.{key}=0")
    assert f"stages.teacher: 'loop.{key}': input should be greater than" in message


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"optim": {"lr": -1}}, "optim.lr"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas.1"),
        ({"optim": {"eps": 0}}, "optim.eps"),
        ({"optim": {"weight_decay": -1}}, "optim.weight_decay"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup"),
        ({"ema": [{"decay": 1}]}, "ema.0.decay"),
        ({"ema": [{"kind": "halflife", "halflife": 0}]}, "ema.0.halflife"),
    ],
)
def test_rates_that_cannot_be_are_named(tree, key):
    with pytest.raises(UserError, match=f"'{key}': input should be"):
        validate(LoopConfig, tree, "loop")


class Breaks(ManyBackwards):
    """Loses its loss from row 40 on."""

    def loss(self, batch):
        for loss, logs in super().loss(batch):
            yield loss * (float("nan") if int(batch.rows[0]) >= 40 else 1.0), logs


def test_the_last_good_checkpoint_is_one_of_before_the_trouble(tmp_path):
    config = LoopConfig(steps=30, batch=8, save_every=1, keep=2, bad_limit=10)
    loop = Loop(Breaks(toy()), Points(), config, tmp_path, seed=0)
    with pytest.raises(RunFailed, match=r"last good checkpoint is .*step-00000005;"):
        loop.run()
    assert loop.checkpoints.steps() == [4, 5]
    state = loop.checkpoints.load(5)
    assert state["bad"] == 0 and all(torch.isfinite(v).all() for v in state["networks"]["student"].values())
