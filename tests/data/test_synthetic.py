from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgen.data.synthetic import Synthetic


def test_an_image_against_its_formula():
    data = Synthetic((3, 4, 6), num_classes=5, rows=100)
    batch = data.get(torch.tensor([17]))
    k, phase = 17 % 5, 2 * math.pi * (17 * (math.sqrt(5) - 1) / 2 % 1)
    for c, i, j in [(0, 0, 0), (1, 3, 5), (2, 2, 1)]:
        along = j / 6 * math.cos(math.pi * k / 5) + i / 4 * math.sin(math.pi * k / 5)
        tint = 0.6 + 0.4 * math.cos(2 * math.pi * (k / 5 + c / 3))
        assert batch["x0"][0, c, i, j].item() == pytest.approx(tint * math.sin(4 * math.pi * along + phase), abs=1e-6)
    assert batch["label"].tolist() == [k]


def test_the_batch_does_not_matter_and_images_differ():
    data = Synthetic((1, 8, 8), num_classes=3)
    whole = data.get(torch.arange(64))
    assert torch.equal(whole["x0"][[40, 3]], data.get(torch.tensor([40, 3]))["x0"])
    assert len(torch.unique(whole["x0"], dim=0)) == 64 and whole["x0"].abs().max() <= 1


def test_a_nearest_mean_of_power_spectra_tells_the_classes():
    data = Synthetic((3, 16, 16), num_classes=4)
    batch = data.get(torch.arange(200))
    spectra = torch.fft.fft2(batch["x0"]).abs().flatten(1).numpy()
    labels = batch["label"].numpy()
    means = np.stack([spectra[:100][labels[:100] == k].mean(0) for k in range(4)])
    guess = ((spectra[100:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == labels[100:]).mean() > 0.99


def test_unlabelled_and_out_of_range():
    data = Synthetic((2, 4, 4), rows=10)
    assert data.num_classes is None and set(data.get(torch.arange(10))) == {"x0"}
    with pytest.raises(IndexError):
        data.get(torch.tensor([10]))


def test_texts_stand_in_the_place_of_labels_and_name_the_class():
    data, plain = (
        Synthetic((3, 8, 8), num_classes=3, rows=7, captions=True),
        Synthetic((3, 8, 8), num_classes=3, rows=7),
    )
    assert data.num_classes is None and len(data.captions) == 7 and len(set(data.captions)) == 3
    assert data.captions[4] == data.captions[1] != data.captions[2]
    found = data.get(torch.arange(7))
    assert torch.equal(found["x0"], plain.get(torch.arange(7))["x0"]) and "label" not in found
    assert found["original"].tolist() == [[8, 8]] * 7 and not found["corner"].any()
    assert data.content_sha256 == Synthetic((3, 8, 8), 3, 7, captions=True).content_sha256
    assert len({Synthetic((3, n, 8), k, r).content_sha256 for n in (8, 9) for k in (3, 4) for r in (7, 8)}) == 8
