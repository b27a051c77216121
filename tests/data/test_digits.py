from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastgen.data.digits import Digits
from fastgen.errors import UserError


def test_the_splits_are_disjoint_and_together_everything():
    train, held_out, everything = (Digits(split).get(torch.arange(n)) for split, n in SIZES)
    for name in ("x0", "label"):
        torch.testing.assert_close(torch.cat([train[name], held_out[name]]), everything[name], rtol=0, atol=0)
    assert [len(Digits(split)) for split, _ in SIZES] == [1400, 397, 1797]


SIZES = (("train", 1400), ("held_out", 397), ("all", 1797))


def test_samples_have_the_promised_shape_type_and_range():
    data = Digits()
    batch = data.get(torch.tensor([5, 0, 1399, 5]))
    assert data.shape == batch["x0"].shape[1:] == (1, 8, 8) and data.num_classes == 10
    assert (batch["x0"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    steps = (batch["x0"] + 1) * 8  # back to ink levels: whole numbers from 0 to 16
    assert torch.equal(steps, steps.round()) and steps.min() == 0 and steps.max() == 16
    assert torch.equal(batch["x0"][0], batch["x0"][3])


def test_they_are_the_digits_that_scikit_learn_ships():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    truth = sklearn.load_digits()
    ours = Digits("all").get(torch.arange(1797))

    def hashes(images, labels):
        rows = zip(images.astype(np.uint8).reshape(1797, 64), labels.astype(np.uint8), strict=True)
        return sorted(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest() for image, label in rows)

    levels = ((ours["x0"] + 1) * 8).numpy()
    assert hashes(levels, ours["label"].numpy()) == hashes(truth.images, truth.target)


def test_each_class_has_its_share_in_both_splits():
    for split, n in SIZES[:2]:
        share = torch.bincount(Digits(split).get(torch.arange(n))["label"], minlength=10) / n
        assert (share - 0.1).abs().max() < 0.04, split


def test_an_unknown_split_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"data\.split=heldout.*did you mean 'held_out'"):
        Digits("heldout")
