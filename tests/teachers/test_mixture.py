"""The closed-form teacher against a second derivation, its own gradients, and samples."""

from __future__ import annotations

import json
import math
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Path, RectifiedFlow, TrigFlow
from fastgen.teacher import read_denoiser
from fastgen.teachers.mixture import Mixture, MixtureConfig, build

DOUBLE = torch.float64
PATHS = [RectifiedFlow(), RectifiedFlow(sigma_min=1e-5), TrigFlow(sd=0.5), EDM(), VP(), VP(zero_snr=True)]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
LABELS = torch.tensor([0, 1, 0])


def example(dimension: int = 3, labels: Tensor | None = LABELS, seed: int = 0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(3, dimension, generator=generator, dtype=DOUBLE)
    roots = torch.randn(3, dimension, dimension, generator=generator, dtype=DOUBLE)
    covs = 0.2 * roots @ roots.transpose(-1, -2) + 0.05 * torch.eye(dimension, dtype=DOUBLE)
    return Mixture(torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE), means, covs, labels)


def posterior(
    mixture: Mixture, x: Tensor, alpha: float, sigma: float, label: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(E[x0 | x], E[eps | x], ln p(x)) of one point by full matrix inverses and scipy-free normal densities.

    Not the eigenbasis of the implementation: joint covariance of (x0, x) and Gaussian conditioning.
    """
    inside = [k for k in range(3) if label in (None, mixture.num_classes) or mixture.labels[k] == label]
    prior = torch.stack([mixture.weights[k] for k in inside])
    prior = prior / prior.sum()
    densities, x0s, noises = [], [], []
    for k in inside:
        m, s = mixture.means[k], mixture.covs[k]
        total = alpha**2 * s + sigma**2 * torch.eye(len(m), dtype=DOUBLE)
        inverse, offset = torch.linalg.inv(total), x - alpha * m
        densities.append(-0.5 * (offset @ inverse @ offset + torch.logdet(total) + len(m) * math.log(2 * math.pi)))
        x0s.append(m + alpha * s @ inverse @ offset)
        noises.append(sigma * inverse @ offset)
    joint = prior.log() + torch.stack(densities)
    share = (joint - joint.logsumexp(0)).exp()
    return share @ torch.stack(x0s), share @ torch.stack(noises), joint.logsumexp(0)


@every_path
@pytest.mark.parametrize("dimension", [1, 3])
def test_the_posterior_matches_gaussian_conditioning(path: Path, dimension: int) -> None:
    mixture = example(dimension)
    t = path.end + (path.start - path.end) * torch.linspace(0, 1, 8, dtype=DOUBLE)
    alpha, sigma = path.levels(t)
    x = torch.randn(8, dimension, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    x = alpha[:, None] * x + sigma[:, None] * x.flip(0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])  # 2 is the null label
    for label in (labels, None):
        cond = None if label is None else {"label": label}
        pair, log = mixture(x, t, cond, on=path), mixture.log_prob(x, t, cond, on=path)
        for i in range(8):
            expected = posterior(
                mixture, x[i], float(alpha[i]), float(sigma[i]), None if label is None else int(label[i])
            )
            for found, value in zip((pair.x0[i], pair.eps[i], log[i]), expected, strict=True):
                assert torch.allclose(found, value, rtol=1e-9, atol=1e-10)
    error = alpha[:, None] * pair.x0 + sigma[:, None] * pair.eps - x
    assert error.abs().max() < 1e-11 * (1 + x.abs().max())


@every_path
@pytest.mark.parametrize("label", [None, 0, 1, 2])
def test_the_score_is_the_gradient_of_the_log_density(path: Path, label: int | None) -> None:
    mixture = example()
    t = path.end + (path.start - path.end) * torch.tensor([0.001, 0.3, 0.7, 1.0], dtype=DOUBLE)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=DOUBLE).requires_grad_()
    cond = None if label is None else {"label": torch.full((4,), label)}
    gradient = torch.autograd.grad(mixture.log_prob(x, t, cond, on=path).sum(), x)[0]
    assert torch.allclose(mixture.score(x, t, cond, on=path), gradient, rtol=1e-9, atol=1e-9)


def test_one_density_whatever_the_path() -> None:
    """p_t at equal alpha : sigma differs by the volume of the scale alone."""
    mixture, t = example(), torch.tensor([300.5], dtype=DOUBLE)
    alpha, sigma = VP().levels(t)
    x = torch.randn(1, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    scale = alpha + sigma
    found = mixture.log_prob(x / scale, sigma / scale, on=RectifiedFlow())
    assert found.item() == pytest.approx((mixture.log_prob(x, t, on=VP()) + 3 * scale.log()).item(), rel=1e-12)


def test_both_ends_are_finite_and_exact() -> None:
    mixture, rf = example(), RectifiedFlow()
    x = torch.randn(2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))
    clean = mixture(x, torch.zeros(2, dtype=DOUBLE), on=rf)
    assert torch.allclose(clean.x0, x, atol=1e-13) and torch.equal(clean.eps, torch.zeros_like(x))
    noisy = mixture(x, torch.ones(2, dtype=DOUBLE), on=rf)
    assert torch.allclose(noisy.eps, x, atol=1e-13)
    assert torch.allclose(noisy.x0, mixture.moments()[0].expand(2, 3), atol=1e-13)
    far = mixture(1e4 * x, torch.full((2,), 1e-3, dtype=DOUBLE), on=rf)
    assert torch.isfinite(far.x0).all() and torch.isfinite(far.eps).all()


def test_the_pair_has_the_dtype_of_x_and_float64_inside() -> None:
    mixture, t = example(), torch.tensor([0.2, 0.9])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    pair = mixture(x, t)
    exact = mixture(x.double(), t.double())
    assert pair.x0.dtype == pair.eps.dtype == torch.float32
    assert torch.equal(pair.x0, exact.x0.float()) or (pair.x0 - exact.x0).abs().max() < 1e-6
    assert exact.x0.dtype == DOUBLE and mixture.log_prob(x, t).dtype == DOUBLE
    assert mixture(x.bfloat16(), t.bfloat16()).x0.dtype == torch.float32
    assert mixture(x, torch.tensor([10, 900]), on=VP()).x0.dtype == torch.float32


def test_samples_have_the_exact_moments_and_shares() -> None:
    mixture, n = example(), 40_000
    x = mixture.sample(0, "x0", torch.arange(n)).double()
    mean, cov = mixture.moments()
    assert ((x.mean(0) - mean).abs() < 4 * (cov.diagonal() / n).sqrt()).all()
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - cov).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_conditional_samples_come_from_their_class() -> None:
    """Components so far apart that each sample tells its own; the null label is the whole mixture."""
    mixture = example()
    mixture = Mixture(mixture.weights, 40 * mixture.means, mixture.covs, LABELS)
    n = 6000
    for label, expected in ((0, [0.4, 0.0, 0.6]), (1, [0.0, 1.0, 0.0]), (2, [0.2, 0.5, 0.3]), (None, [0.2, 0.5, 0.3])):
        cond = None if label is None else {"label": torch.full((n,), label)}
        shares = mixture.mode_shares(mixture.sample(0, "x0", torch.arange(n), cond))
        assert sum(shares.tolist()) == pytest.approx(1)
        for share, value in zip(shares.tolist(), expected, strict=True):
            assert abs(share - value) <= 4 * math.sqrt(value * (1 - value) / n)


def test_mode_shares_measure_distance_in_the_covariance() -> None:
    """Nearer to the narrow mode in plain distance, nearer to the wide one in its own units."""
    covs = torch.stack([0.01 * torch.eye(2), 4.0 * torch.eye(2)])
    mixture = Mixture(torch.ones(2), torch.tensor([[0.0, 0.0], [3.0, 0.0]]), covs)
    assert mixture.mode_shares(torch.tensor([[1.0, 0.0]])).tolist() == [0, 1]
    assert mixture.mode_shares(torch.tensor([[0.1, 0.0]] * 3 + [[3.0, 0.0]])).tolist() == [0.75, 0.25]


def test_samples_depend_on_their_row_alone() -> None:
    mixture, rows = example(), torch.tensor([5, 0, 10**10])
    whole = mixture.sample(0, "x0", rows)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat([mixture.sample(0, "x0", row[None]) for row in rows]), whole)
    assert not torch.equal(mixture.sample(0, "other", rows), whole)


def test_posterior_means_agree_with_monte_carlo() -> None:
    """E[x0 | x] by weighting 200,000 prior samples with p(x | x0): no algebra shared with the formulas."""
    mixture, n, alpha, sigma = example(2), 200_000, 0.6, 0.7
    x0 = mixture.sample(0, "x0", torch.arange(n)).double()
    x = torch.tensor([0.3, -0.4], dtype=DOUBLE)
    weight = (-(x - alpha * x0).square().sum(1) / (2 * sigma**2)).softmax(0)
    mean = weight @ x0
    error = (weight @ (x0 - mean).square()).sqrt() * weight.square().sum().sqrt()
    t = torch.tensor([sigma / (alpha + sigma)], dtype=DOUBLE)
    found = mixture((x / (alpha + sigma))[None], t, on=RectifiedFlow()).x0[0]
    assert ((found - mean).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0, -1.0]}, "positive weights"),
        ({"weights": [1.0, 0.0]}, "positive weights"),
        ({"weights": [1.0]}, "need 2 positive weights"),
        ({"means": [[0.0, 0.0], [1.0]]}, "differ in length"),
        ({"means": []}, "means must be"),
        ({"means": [[], []]}, "means must be"),
        ({"covs": [[[1.0]], [[1.0]]]}, "covariances 2 x 2"),
        ({"covs": [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]]}, "positive definite"),
        ({"covs": [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.9], [0.0, 1.0]]]}, "symmetric"),
        ({"covs": [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]}, "positive definite"),
        ({"labels": [0]}, "labels must be 2 numbers"),
        ({"labels": [0, 2]}, "each class"),
        ({"labels": [-1, 0]}, "each class"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(change: dict, message: str) -> None:
    good = {"weights": [0.5, 0.5], "means": [[0.0, 0.0], [1.0, 1.0]], "covs": [[[1.0, 0.0], [0.0, 1.0]]] * 2}
    assert build(MixtureConfig(**good)).shape == (2,)
    with pytest.raises(UserError, match=message) as caught:
        build(MixtureConfig(**good | change))
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_are_errors_not_nan() -> None:
    mixture, x, t = example(), torch.zeros(1, 3), torch.tensor([0.5])
    for label in (3, -1):
        with pytest.raises(IndexError):
            mixture(x, t, {"label": torch.tensor([label])})


def test_writing_and_reading_keep_every_bit(tmp_path: FilePath) -> None:
    """0.1 and 0.3 are not float32 numbers: a detour through float32 would show."""
    for labels in (None, LABELS):
        mixture = example(labels=labels)
        folder = tmp_path / str(labels is None)
        folder.mkdir()
        mixture.write(folder)
        again, facts = read_denoiser(folder)
        assert isinstance(again, Mixture) and facts == {}
        for name in ("means", "covs"):
            assert torch.equal(getattr(again, name), getattr(mixture, name))
        assert torch.allclose(again.weights, mixture.weights, rtol=1e-15)  # normalised twice
        assert again.num_classes == mixture.num_classes == (None if labels is None else 2)
        cond = None if labels is None else {"label": torch.tensor([1])}
        x, t = torch.ones(1, 3, dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE)
        assert torch.allclose(again(x, t, cond).x0, mixture(x, t, cond).x0, rtol=1e-14)


def test_a_damaged_file_is_named(tmp_path: FilePath) -> None:
    for text in ("{", "[]", json.dumps({"weights": [1.0], "mean": [[0.0]], "covs": [[[1.0]]]})):
        (tmp_path / "mixture.json").write_text(text)
        with pytest.raises(UserError, match=r"mixture\.json"):
            read_denoiser(tmp_path)


def test_weights_are_normalised_and_unlabelled_mixtures_have_no_null() -> None:
    mixture = Mixture(torch.tensor([2.0, 6.0]), torch.zeros(2, 1), torch.ones(2, 1, 1))
    assert mixture.weights.tolist() == [0.25, 0.75]
    assert mixture.null is None and mixture.num_classes is None
    assert example().null["label"].tolist() == [2]
