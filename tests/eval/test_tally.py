"""One set against another, batch by batch: the same numbers as all at once."""

from __future__ import annotations

import pytest
import torch

from fastgen.data.digits import Digits
from fastgen.eval import metrics
from fastgen.eval.backends import Backend
from fastgen.eval.classifier import WEIGHTS
from fastgen.eval.extractors import Classifier, PooledPixels, RandomConv
from fastgen.eval.metrics import Moments
from fastgen.eval.tally import Reference, Tally, measure


@pytest.fixture(scope="module")
def digits():
    return {split: Digits(split).get(torch.arange(390))["x0"] for split in ("train", "held_out")}


def own(see):
    return Backend("own", see, metrics.frechet)


def values(rows):
    return {row.metric: row.value for row in rows}


def test_batches_make_no_difference(digits):
    see = Classifier.load(WEIGHTS)
    near = digits["train"].flatten(1).double()
    one = Tally.of(see, [digits["held_out"]], near)
    many = Tally.of(see, digits["held_out"].split(77), near)
    assert one.sha256 == many.sha256 != Tally.of(see, [digits["train"]]).sha256
    assert many.count == 390
    real = Reference.of_images(Tally.of(see, digits["train"].split(100)))
    first, second = (values(measure(tally, real, own(see), 0)) for tally in (one, many))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_each_row_is_what_its_function_gives(digits):
    see = Classifier.load(WEIGHTS)
    train, held = see(digits["train"]), see(digits["held_out"])
    near = digits["train"].flatten(1).double()
    gen = Tally.of(see, [digits["held_out"]], near)
    real = Reference.of_images(Tally.of(see, [digits["train"]]))
    rows = {row.metric: row for row in measure(gen, real, own(see), 3)}
    fd = rows[f"FD-{see.name}"]
    assert fd.value == pytest.approx(metrics.frechet(held, train))
    assert fd.floor == pytest.approx(metrics.frechet(train[::2], train[1::2]))
    assert rows["KID"].value == pytest.approx(metrics.kid(held, train)[0])
    assert rows["recall"].value == pytest.approx(metrics.precision_recall(train, held)[1])
    flat = digits["held_out"].flatten(1)
    assert rows["nearest"].value == pytest.approx(metrics.nearest_distance(flat, near))
    assert 8 < rows[f"IS-{see.name}"].value < 10  # ten classes, and a sure classifier
    assert {row.n_ref for name, row in rows.items() if not name.startswith("IS")} == {390}
    assert rows[f"IS-{see.name}"].n_ref is None
    for row in rows.values():
        assert (row.seed, row.extractor_sha256, row.n_gen) == (3, see.sha256, 390)
    assert fd.reference_sha256 == real.sha256 and fd.interval is None  # 390 images are no five blocks of 128


def test_the_interval_and_infinity_come_with_enough_images():
    see = PooledPixels((1, 4, 4))  # 16 features
    draw = lambda n, seed: torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1  # noqa: E731
    real = Reference.of_images(Tally.of(see, [draw(400, 1)]))
    rows = {row.metric: row for row in measure(Tally.of(see, draw(160, 0).split(50)), real, own(see), 0)}
    fd, infinite = rows["FD-pooled-pixels"], rows["FD-infinity-pooled-pixels"]
    assert 0 < fd.interval < fd.value
    assert infinite.value < fd.value  # the bias of few samples is taken off
    fewer = {row.metric: row for row in measure(Tally.of(see, [draw(79, 0)]), real, own(see), 0)}
    assert fewer["FD-pooled-pixels"].interval is None and "FD-infinity-pooled-pixels" not in fewer


def test_bare_statistics_leave_out_what_needs_features(digits):
    see = RandomConv(1)
    tally = Tally.of(see, [digits["train"]])
    real = Reference(Moments.exact(tally.moments.mean, tally.moments.cov), None, "ab" * 32)
    rows = measure(Tally.of(see, [digits["held_out"]]), real, own(see), None)
    assert [row.metric for row in rows] == ["FD-random-conv"]
    assert rows[0].n_ref is None and rows[0].reference_sha256 == "ab" * 32 and rows[0].floor is None
    assert rows[0].value == pytest.approx(metrics.frechet(see(digits["held_out"]), tally.moments))


def test_few_images_take_the_exact_route(digits):
    """Fewer images than features: with the features of both sets the singular covariances are handled exactly."""
    see = RandomConv(1)
    few = digits["held_out"][:20]
    with pytest.warns(UserWarning, match="20 samples in 256 dimensions"):
        real = Reference.of_images(Tally.of(see, [digits["train"]]))
        row = measure(Tally.of(see, [few]), real, own(see), 0)[0]
        assert row.value == pytest.approx(metrics.frechet(see(few), see(digits["train"]), "svd"), rel=1e-12)


def test_another_backend_gives_the_distance_alone(digits):
    see = RandomConv(1)
    real = Reference.of_images(Tally.of(see, [digits["train"]]))
    other = Backend("theirs 1.0", see, lambda a, b: 42.0)
    rows = measure(Tally.of(see, [digits["held_out"]]), real, other, 0)
    assert [(row.metric, row.value) for row in rows if row.backend == "theirs 1.0"] == [("FD-random-conv", 42.0)]
    assert {row.backend for row in rows[1:]} == {"own"}
