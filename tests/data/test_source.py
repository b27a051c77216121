from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgen.data.digits import Digits
from fastgen.data.source import Source, shuffled
from fastgen.data.synthetic import Synthetic


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 10, 64, 97, 1023, 1024, 1400, 1797, 10007])
def test_every_epoch_has_each_index_once(n):
    for epoch in (0, 1, 2, 1000):
        rows = np.arange(epoch * n, (epoch + 1) * n)
        assert sorted(shuffled(7, rows, n)) == list(range(n))


def test_a_place_belongs_to_its_row_whatever_the_batch():
    data = Synthetic((1, 2, 2), rows=1400)
    source = Source(data, seed=3)
    rows = torch.arange(900, 4000)  # parts of three epochs
    whole = source.index(rows)
    parts = torch.empty_like(whole)
    for rank in range(3):
        for part in torch.arange(rank, len(rows), 3).split(37):
            parts[part] = source.index(rows[part])
    assert torch.equal(whole, parts)
    assert torch.equal(Source(data, 3).index(rows.flip(0)), whole.flip(0))


def test_get_returns_the_samples_of_the_indices():
    data = Digits()
    source = Source(data, seed=0)
    rows = torch.tensor([0, 5000, 1399, 1400])
    batch, truth = source.get(rows), data.get(source.index(rows))
    assert torch.equal(batch["x0"], truth["x0"]) and torch.equal(batch["label"], truth["label"])


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [tuple(shuffled(seed, np.arange(e * 50, e * 50 + 50), 50)) for seed in (0, 1, 2**63) for e in range(20)]
    assert len(set(orders)) == 60


def chi_square(counts: np.ndarray) -> float:
    """Distance from uniform in standard deviations of the chi-square."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [4, 5, 7, 10, 30])
def test_small_sets_are_shuffled_evenly(n):
    epochs = 20_000
    orders = shuffled(11, np.arange(epochs * n), n).reshape(epochs, n)
    for place in (0, n // 2, n - 1):
        assert abs(chi_square(np.bincount(orders[:, place], minlength=n))) < 4
    pairs = np.zeros((n, n))
    np.add.at(pairs, (orders[:, 0], orders[:, 1]), 1)
    assert abs(chi_square(pairs[~np.eye(n, dtype=bool)])) < 4
    across = np.zeros((n, n))
    np.add.at(across, (orders[:-1, -1], orders[1:, 0]), 1)
    assert abs(chi_square(across)) < 4


@pytest.mark.parametrize("n", [1400, 50_000])
def test_large_sets_keep_no_trace_of_their_order(n):
    """Correlations are below 5 standard deviations; fixed points and neighbours kept are Poisson with mean 1."""
    epochs = 100 if n < 10_000 else 30
    orders = shuffled(5, np.arange(epochs * n), n).reshape(epochs, n)
    places = np.arange(n)
    for order in orders:
        assert abs(np.corrcoef(order, places)[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / math.sqrt(n)
    assert 0.5 < (orders == places).sum(1).mean() < 1.5
    assert 0.5 < (np.diff(orders, axis=1) == 1).sum(1).mean() < 1.5


def test_memory_does_not_grow_with_the_data():
    index = shuffled(1, np.array([0, 10**12 - 1, 10**12, 7 * 10**15]), 10**12)
    assert ((index >= 0) & (index < 10**12)).all() and len(set(index.tolist())) == 4


def test_misuse_is_an_error():
    with pytest.raises(ValueError, match="count from 0"):
        Source(Digits(), 0).index(torch.tensor([-1]))
    with pytest.raises(ValueError, match="at least one"):
        Source(Synthetic((1, 2, 2), rows=0), 0)
