"""Whatever instant a run dies at, the resumed weights are those of the run that never stopped."""

from __future__ import annotations

from functools import partial

import torch

from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from tests.crash import dies_at
from tests.toys import Points, TwoNetworks, toy


def train(out, seed=0):
    config = LoopConfig(steps=9, batch=4, save_every=3, keep=1, log_every=1, ema=[AverageConfig(decay=0.9)])
    # A network that starts elsewhere shows what a resume forgets; without a checkpoint it starts as the first did.
    begun = any((out / "checkpoints").glob("step-*/COMPLETE"))
    loop = Loop(TwoNetworks(toy(seed if begun else 0)), Points(), config, out, seed=3)
    loop.resume()
    loop.run()
    return loop


def test_every_crash_point_resumes_bit_for_bit(tmp_path):
    expected = train(tmp_path / "whole").state()
    n = 0
    while dies_at(n, partial(train, tmp_path / f"cut-{n}")):
        state = train(tmp_path / f"cut-{n}", seed=5).state()
        for kind in ("networks", "ema"):
            for name, tensors in expected[kind].items():
                for key, value in tensors.items():
                    assert torch.equal(value, state[kind][name][key]), (n, name, key)
        assert state["drawn"] == expected["drawn"]
        left = [path.name for path in (tmp_path / f"cut-{n}" / "checkpoints").iterdir()]
        assert left == ["step-00000009"], f"leftovers after crash {n}: {left}"
        n += 1
    assert n > 20, "the crash points were not reached"
