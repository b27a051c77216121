"""Metrics against closed forms, hand-worked cases and direct loops."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from fastgen.errors import RunFailed
from fastgen.eval import metrics
from fastgen.eval.metrics import Moments, Result, frechet


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def law(mean: list[float], cov: list[list[float]]) -> Moments:
    return Moments.exact(torch.tensor(mean), torch.tensor(cov, dtype=torch.float64))


def test_frechet_of_known_gaussians():
    eye, mean = torch.eye(16, dtype=torch.float64), torch.full((16,), 0.5)
    # 16 * 0.5^2 + 16 * (2 - 1)^2
    assert frechet(Moments.exact(torch.zeros(16), eye), Moments.exact(mean, 4 * eye)) == pytest.approx(20, abs=1e-12)
    narrow, wide = law([0, 0], [[4, 0], [0, 1]]), law([0, 0], [[1, 0], [0, 4]])
    assert frechet(narrow, wide) == pytest.approx(2, abs=1e-12)
    # The same ellipse turned by 45 degrees does not commute with the first: its root is no product of roots.
    turned = law([0, 0], [[2.5, 1.5], [1.5, 2.5]])
    assert frechet(narrow, turned) == pytest.approx(0.9446148618625845, abs=1e-12)


def test_frechet_in_one_dimension():
    x, y = draw(300, 1), 0.3 + 2.5 * draw(200, 1, seed=1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet(x, y) == pytest.approx(float(expected), abs=1e-12)


def test_frechet_to_itself_is_zero():
    assert abs(frechet(draw(500, 40), draw(500, 40))) < 1e-6


def test_frechet_follows_rotation_scale_and_order():
    x, y = draw(300, 12), draw(400, 12, seed=1) @ draw(12, 12, seed=2) + 1
    reference = frechet(x, y)
    turn = torch.linalg.qr(draw(12, 12, seed=3)).Q
    assert frechet(x @ turn, y @ turn) == pytest.approx(reference, rel=1e-8)
    assert frechet(3 * x, 3 * y) == pytest.approx(9 * reference, rel=1e-8)
    assert frechet(x.flip(0), y) == pytest.approx(reference, rel=1e-10)
    assert frechet(y, x) == pytest.approx(reference, rel=1e-10)


def test_moments_of_shards_are_those_of_the_whole():
    x = 5 + draw(1000, 7) @ draw(7, 7, seed=1)
    left, right = Moments(), Moments()
    for part in x[:610].split(64):  # the last batch is short, another one empty
        left.update(part)
    right.update(x[:0]).update(x[610:])
    both = Moments().merge(left).merge(right).merge(Moments())
    assert both.count == 1000
    torch.testing.assert_close(both.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(both.cov, torch.cov(x.T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Moments.of(x).cov, torch.cov(x.T), rtol=1e-10, atol=1e-10)


def test_a_large_mean_cancels_nothing():
    """Sums of squares of numbers near 1e8 keep no digit of a variance near 1."""
    x = draw(2000, 3)
    moments = Moments()
    for part in (x + 1e8).split(100):
        moments.update(part)
    torch.testing.assert_close(moments.cov, torch.cov(x.T), rtol=1e-6, atol=1e-6)


def test_moments_refuse_what_they_cannot_answer():
    with pytest.raises(ValueError, match="no features"):
        _ = Moments().mean
    with pytest.raises(ValueError, match="two samples"):
        _ = Moments.of(torch.ones(1, 2)).cov
    with pytest.raises(ValueError, match="exact"):
        law([0.0], [[1.0]]).update(torch.ones(3, 1))
    with pytest.raises(ValueError, match="widths differ: 2 and 3"):
        frechet(draw(9, 2), draw(9, 3))


def test_features_that_are_not_finite_end_the_run():
    x = draw(10, 2)
    x[[3, 4], 1] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    with pytest.raises(RunFailed, match="2 of 10 samples"):
        frechet(x, draw(10, 2))


def test_bias_of_few_samples_obeys_its_law():
    """E[FD] = D/N + D(D + 1)/(4N) = 0.042 for N samples of the reference law itself."""
    exact = Moments.exact(torch.zeros(16), torch.eye(16))
    values = [frechet(draw(2000, 16, seed=seed), exact) for seed in range(8)]
    assert 0.035 < sum(values) / 8 < 0.050


def test_frechet_infinity_removes_the_bias():
    x, exact = 1.1 * draw(8000, 64), Moments.exact(torch.zeros(64), torch.eye(64))
    assert frechet(x, exact) > 0.72  # the truth is 64 * 0.1^2 = 0.64
    assert metrics.frechet_infinity(x, exact, seed=0) == pytest.approx(0.64, abs=0.06)


def test_three_routes_to_the_root_agree():
    x, y = draw(300, 20), draw(250, 20, seed=1) @ draw(20, 20, seed=2)
    eigh, svd = frechet(x, y, "eigh"), frechet(x, y, "svd")
    cov1, cov2 = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(cov1 @ cov2).real.clamp_min(0).sqrt().sum()
    direct = (x.mean(0) - y.mean(0)).square().sum() + cov1.trace() + cov2.trace() - 2 * root
    assert eigh == pytest.approx(float(direct), rel=1e-8)
    assert svd == pytest.approx(float(direct), rel=1e-8)
    assert frechet(x, y) == eigh


def test_few_samples_warn_and_take_the_svd():
    x, y = draw(30, 200), 1.5 * draw(25, 200, seed=1)
    with pytest.warns(UserWarning, match="25 samples in 200 dimensions"):
        auto = frechet(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert auto == frechet(x, y, "svd")
        assert auto == pytest.approx(frechet(x, y, "eigh"), abs=1e-3)
        assert frechet(Moments.of(x), y) == frechet(x, y, "eigh")
        with pytest.raises(ValueError, match="raw features"):
            frechet(Moments.of(x), y, "svd")


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="route 'sqrtm'"):
        frechet(draw(9, 2), draw(9, 2), "sqrtm")


def test_kid_by_hand():
    # k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1: 1 + 8 - 2
    assert metrics.kid(torch.zeros(2, 1), torch.ones(2, 1), subsets=3) == (7.0, 0.0)


def test_kid_is_the_loop_of_the_paper():
    x, y = draw(6, 3), draw(6, 3, seed=1)
    same = [(a @ b / 3 + 1) ** 3 for s in (x, y) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]
    cross = [(a @ b / 3 + 1) ** 3 for a in x for b in y]
    mean, deviation = metrics.kid(x, y, subsets=1)
    assert mean == pytest.approx(float(sum(same) / 30 - 2 * sum(cross) / 36), rel=1e-12)
    assert deviation == 0.0


def test_kid_of_halves_is_within_its_deviation_of_zero():
    x = draw(2000, 16)
    mean, deviation = metrics.kid(x[:1000], x[1000:], subsets=20, subset_size=200)
    assert abs(mean) < 2 * deviation
    assert metrics.kid(x[:1000], x[1000:] + 0.5, subsets=20, subset_size=200)[0] > 20 * deviation


def test_kid_repeats_and_leaves_the_global_generator_alone():
    x, y = draw(50, 4), draw(60, 4, seed=1)
    state = torch.get_rng_state()
    first = metrics.kid(x, y, subsets=3, subset_size=20, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == metrics.kid(x, y, subsets=3, subset_size=20, seed=5)
    assert first != metrics.kid(x, y, subsets=3, subset_size=20, seed=6)
    with pytest.raises(ValueError, match="subset_size 51"):
        metrics.kid(x, y, subset_size=51)


def test_precision_and_recall_by_hand():
    real, fake = torch.tensor([[0.0], [1], [2], [3], [100]]), torch.tensor([[0.5], [2.5], [1000]])
    # k = 1: real radii 1, 1, 1, 1, 97, so 0.5 and 2.5 lie inside, 1000 does not; generated radii 2, 2, 997.5, and
    # together they cover all that is real (100 lies 900 from 1000).
    assert metrics.precision_recall(real, fake, k=1) == (pytest.approx(2 / 3), 1.0)
    # The other way round both quantities change places.
    assert metrics.precision_recall(fake, real, k=1) == (1.0, pytest.approx(2 / 3))


def test_precision_and_recall_of_fakes():
    real = draw(200, 8)
    assert metrics.precision_recall(real, real[:50])[0] == 1.0
    collapsed = real[:1].expand(50, -1)
    assert metrics.precision_recall(real, collapsed) == (1.0, pytest.approx(1 / 200))
    assert metrics.precision_recall(real, real + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="k 3"):
        metrics.precision_recall(real, real[:3])


def test_precision_and_recall_in_blocks_are_those_of_the_definition():
    real, fake = draw(metrics.CHUNK + 40, 5), 1.3 * draw(metrics.CHUNK + 90, 5, seed=1) + 0.4
    expected = []
    for x, manifold in ((fake, real), (real, fake)):
        radii = torch.stack([(m - manifold).norm(dim=1).sort().values[3] for m in manifold])
        expected.append(torch.stack([((m - manifold).norm(dim=1) <= radii).any() for m in x]).double().mean().item())
    assert metrics.precision_recall(real, fake, k=3) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert 0.2 < min(expected) < max(expected) < 1


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0], [10, 0]])
    x = torch.tensor([[3.0, 4], [10, 1], [0, 0]])  # 5, 1 and a copy, 0
    assert metrics.nearest_distance(x, reference) == pytest.approx(1.0)
    many = draw(2000, 6).float() + 7
    assert metrics.nearest_distance(many[: metrics.CHUNK + 300], many) == 0.0
    distances = torch.stack([(a - many[600:]).norm(dim=1).min() for a in many[:600]])
    assert metrics.nearest_distance(many[:600], many[600:]) == pytest.approx(float(distances.quantile(0.5)), rel=1e-5)


def test_class_shares():
    assert metrics.class_shares(torch.tensor([0, 2, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]
    for labels in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            metrics.class_shares(labels, 4)


def test_label_agreement():
    assert metrics.label_agreement(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.label_agreement(torch.tensor([0, 1]), torch.tensor([0]))


def test_rmse():
    assert metrics.rmse(torch.zeros(2, 2), torch.tensor([[1.0, 1], [1, 5]])) == pytest.approx(7**0.5)
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.rmse(torch.zeros(2, 1), torch.zeros(2))


def test_mmd2_by_hand():
    # Bandwidth 1: k(0, 1) = e^-0.5 within both sets and across.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    near, mid, far = math.exp(-0.5), math.exp(-2), math.exp(-4.5)
    expected = 2 * near - 2 * (mid + far + near + mid) / 4
    assert metrics.mmd2(x, y, bandwidth=1) == pytest.approx(expected, rel=1e-12)
    assert metrics.mmd2(2 * x, 2 * y, bandwidth=2) == pytest.approx(expected, rel=1e-12)


def test_mmd2_and_energy_are_unbiased_over_several_blocks():
    """N = 1300 is three blocks: a diagonal left in would add about 1/N = 8e-4 per set, far more than the spread."""
    x, y = draw(1300, 2), draw(1300, 2, seed=1)
    kernel = lambda a, b: (-(a[:, None] - b).square().sum(2) / 0.5).exp()  # noqa: E731
    within = sum((kernel(s, s).sum() - 1300) / (1300 * 1299) for s in (x, y))
    assert metrics.mmd2(x, y, 0.5) == pytest.approx(float(within - 2 * kernel(x, y).mean()), abs=1e-12)


def test_biased_mmd2_counts_the_diagonal_and_sums_its_kernels():
    x, y, bandwidths = draw(700, 2), draw(600, 2, seed=1) + 0.3, (0.3, 1.0, 3.0)

    def mean(a, b):
        squares = (a[:, None] - b).square().sum(2)
        return sum((-squares / (2 * h * h)).exp().mean() for h in bandwidths)

    expected = float(mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert metrics.mmd2_biased(x, y, bandwidths) == pytest.approx(expected, abs=1e-12)
    assert metrics.mmd2_biased(x, x.flip(0), bandwidths) == pytest.approx(0, abs=1e-12)


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    # 2 * (3 + 5 + 2 + 4) / 4 - 1 - 2
    assert metrics.energy_distance(x, y) == pytest.approx(4.0, rel=1e-12)
    far = metrics.energy_distance(draw(1000, 2), draw(1000, 2, seed=1) + 1)
    assert far > 0.3 > 10 * abs(metrics.energy_distance(draw(1000, 2), draw(1000, 2, seed=1)))


def test_sliced_w2():
    x = draw(500, 1)
    assert metrics.sliced_w2(x, (x + 2).flip(0)) == pytest.approx(2, rel=1e-12)
    x, v = draw(400, 3), torch.tensor([3.0, 0, 4])
    # A shift by v is seen as theta.v, whose mean square over directions is |v|^2 / 3.
    assert metrics.sliced_w2(x, x + v, projections=4000) == pytest.approx(5 / 3**0.5, rel=0.03)
    assert metrics.sliced_w2(x, x + v, seed=1) != metrics.sliced_w2(x, x + v, seed=2)
    with pytest.raises(ValueError, match="equally large"):
        metrics.sliced_w2(x, x[:10])


def test_a_result_names_what_it_depends_on():
    facts = {"n_gen": 5000, "n_ref": 1400, "extractor": "digits-classifier", "extractor_sha256": "ab" * 32}
    result = Result(metric="FD-digits-classifier", value=2.7345, floor=1.8712, seed=3, **facts)
    text = str(result)
    for part in ("FD-digits-classifier", "2.735", "5000", "1400", "abab", "floor 1.871", "seed 3"):
        assert part in text
    assert json.loads(json.dumps(result.to_dict())) == {**result.to_dict(), **facts, "value": 2.7345, "seed": 3}
    with pytest.raises(AttributeError):
        result.value = 0.0


def test_a_result_that_is_not_a_number_is_null_in_json():
    facts = {"n_gen": 9, "n_ref": 9, "extractor": None, "extractor_sha256": None, "floor": None, "seed": 0}
    result = Result(metric="rmse", value=math.nan, **facts)
    assert json.dumps(result.to_dict(), allow_nan=False)
    assert result.to_dict()["value"] is None
    assert "extractor none" in str(result) and "floor none" in str(result)
