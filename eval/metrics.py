"""Distances between sets of features or points: pure functions in float64, torch only.

Features are [N, D] tensors of any float type, one row per sample; they are lifted to float64 before any arithmetic,
because a Frechet distance in float32 is off by 1 and more once a covariance is singular. Numbers come back as Python
floats. Where a set is random (KID subsets, projections), a local generator is seeded by the argument, so that no call
changes another.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import RunFailed

# Rows of a distance matrix held at once: 512 x 5,000 float64 numbers are 20 MB.
CHUNK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number with all that decides whether two of them may be compared.

    `floor` is the same metric between two halves of real data (None where the metric has none), `extractor` and its
    hash are None for metrics of raw points, `n_ref` is None where a file of statistics does not say it. `resize` is how
    images reached the extractor's size, `backend` whose arithmetic and network it was, `interval` half the width of a
    95 % interval.
    """

    metric: str
    value: float
    n_gen: int
    n_ref: int | None
    extractor: str | None
    extractor_sha256: str | None
    floor: float | None
    seed: int | None
    resize: str = "none"
    reference_sha256: str | None = None
    backend: str = "own"
    interval: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a value that is not finite becomes None, since strict JSON has no NaN."""
        row = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    def __str__(self) -> str:
        extractor = f"{self.extractor} {self.extractor_sha256[:12]}" if self.extractor_sha256 else "none"
        floor = "none" if self.floor is None else f"{self.floor:.4g}"
        interval = "" if self.interval is None else f" +- {self.interval:.2g}"
        against = "" if self.n_ref is None else f" against {self.n_ref}"
        reference = f"reference {self.reference_sha256[:12]}, " if self.reference_sha256 else ""
        return (
            f"{self.metric} {self.value:.4g}{interval} (n {self.n_gen}{against}, {reference}extractor {extractor}, "
            f"resize {self.resize}, floor {floor}, seed {self.seed}, backend {self.backend})"
        )


def _rows(x: Tensor) -> Tensor:
    """[N, D] in float64, off devices that lack it; non-finite features end the run rather than poison a mean."""
    if x.ndim != 2:
        raise ValueError(f"features must be [N, D], got {list(x.shape)}")
    x = (x.cpu() if x.device.type == "mps" else x).detach().double()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise RunFailed(f"{bad} of {len(x)} samples have features that are not finite; the model has diverged")
    return x


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _rows(x), _rows(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}")
    return x, y


class Moments:
    """Running count, mean [D] and covariance [D, D] (divisor N - 1) of features that need not be held together.

    Batches and shards are joined by Chan, Golub and LeVeque's update (1979), which only ever squares differences from
    a mean: no cancellation when the mean is far larger than the spread, and any split gives the same numbers.
    """

    def __init__(self) -> None:
        self.count: float = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of one tensor [N, D]."""
        return cls().update(features)

    @classmethod
    def exact(cls, mean: Tensor, cov: Tensor) -> Moments:
        """Moments of a known law (a Gaussian or a mixture): its count is infinite and nothing can be added."""
        moments = cls()
        moments.count, moments._mean, moments._scatter = math.inf, mean.double(), cov.double()
        return moments

    @classmethod
    def known(cls, mean: Tensor, cov: Tensor, count: int) -> Moments:
        """Moments [D], [D, D] that were taken elsewhere, of so many samples: more can be added."""
        moments = cls()
        moments.count, moments._mean, moments._scatter = count, mean.double(), cov.double() * (count - 1)
        return moments

    @property
    def mean(self) -> Tensor:
        """[D]"""
        if self._mean is None:
            raise ValueError("no features were added")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """[D, D]"""
        if self._scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs two samples, got {self.count}")
        return self._scatter if math.isinf(self.count) else self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> Moments:
        """Add a batch [N, D], N >= 0."""
        x = _rows(features)
        if not len(x):
            return self
        batch = Moments()
        batch.count, batch._mean = len(x), x.mean(0)
        centred = x - batch._mean
        batch._scatter = centred.T @ centred
        return self.merge(batch)

    def merge(self, other: Moments) -> Moments:
        """Add what another shard or rank has seen."""
        if math.inf in (self.count, other.count):
            raise ValueError("exact moments cannot be added to")
        if not other.count:
            return self
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = other.count, other._mean, other._scatter
            return self
        assert other._scatter is not None
        total, delta = self.count + other.count, other.mean - self.mean
        weight = self.count * other.count / total
        self._scatter = self._scatter + other._scatter + torch.outer(delta, delta) * weight
        self._mean = self.mean + delta * (other.count / total)
        self.count = total
        return self


def frechet(a: Moments | Tensor, b: Moments | Tensor, route: str = "auto") -> float:
    """Frechet distance between the Gaussians fitted to two sets, |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    a, b: Moments or raw features [N, D]. Dowson and Landau 1982; as a sample score Heusel et al. 2017 (1706.08500).
    route: "eigh" works on moments, tr (S1 S2)^(1/2) = sum sqrt eig(R S2 R) with R = S1^(1/2); "svd" on raw features,
    the nuclear norm of X1c X2c^T / sqrt((N1 - 1)(N2 - 1)), exact where the covariances are singular; "auto" takes svd
    when raw features are fewer than D. Fewer samples than D also warn: the distance is then mostly bias. Negative
    round-off eigenvalues are clamped; nothing is ever added to a diagonal.
    """
    first, second = (Moments.of(m) if isinstance(m, Tensor) else m for m in (a, b))
    fewest, width = min(first.count, second.count), len(first.mean)
    if len(second.mean) != width:
        raise ValueError(f"feature widths differ: {width} and {len(second.mean)}")
    if fewest < width:
        warnings.warn(
            f"Frechet distance of {fewest} samples in {width} dimensions: rank-deficient and biased upwards",
            stacklevel=2,
        )
    raw = [m for m in (a, b) if isinstance(m, Tensor)]
    if route == "auto":
        route = "svd" if len(raw) == 2 and fewest < width else "eigh"
    if route == "eigh":
        root = _root_trace_eigh(first.cov, second.cov)
    elif route == "svd":
        if len(raw) < 2:
            raise ValueError("the svd route needs the raw features of both sets, not their moments")
        root = _root_trace_svd(_rows(raw[0]) - first.mean, _rows(raw[1]) - second.mean)
    else:
        raise ValueError(f"unknown route '{route}'; known: auto, eigh, svd")
    shift = (first.mean - second.mean).square().sum()
    return float(shift + first.cov.trace() + second.cov.trace() - 2 * root)


def _root_trace_eigh(cov1: Tensor, cov2: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


def _root_trace_svd(x: Tensor, y: Tensor) -> Tensor:
    scale = math.sqrt((len(x) - 1) * (len(y) - 1))
    return torch.linalg.svdvals(x @ y.T).sum() / scale


def frechet_infinity(x: Tensor, reference: Moments | Tensor, seed: int, sizes: int = 15) -> float:
    """Frechet distance without the bias of few samples: the intercept of FD(N) = a / N + b.

    x: [N, D]; reference: moments or features. `sizes` random subsets without replacement, evenly from N/10 to N, and
    a least-squares line over 1/N (Chong and Forsyth 2020, 1911.07023). Subsets smaller than D warn, as in `frechet`.
    """
    x, generator = _rows(x), torch.Generator().manual_seed(seed)
    reference = Moments.of(reference) if isinstance(reference, Tensor) else reference
    counts = torch.linspace(len(x) / 10, len(x), sizes).round().long().tolist()
    subsets = [x[torch.randperm(len(x), generator=generator)[:n].to(x.device)] for n in counts]
    values = torch.tensor([frechet(Moments.of(s), reference) for s in subsets], dtype=torch.float64)
    design = torch.stack([1 / torch.tensor(counts, dtype=torch.float64), torch.ones(sizes, dtype=torch.float64)], 1)
    return float(torch.linalg.lstsq(design, values).solution[1])


def frechet_interval(x: Tensor, reference: Moments) -> float:
    """Half the width of a 95 % interval of the Frechet distance of x [N, D]: Student's t over five disjoint blocks.

    The blocks' own distances are biased upwards, all alike, so only their spread is used; a bootstrap would add to the
    bias, since its duplicates make a sample smaller than it looks.
    """
    values = torch.tensor([frechet(Moments.of(part), reference) for part in x.tensor_split(5)])
    return float(2.776 * values.std() / math.sqrt(5))  # t of 4 degrees of freedom, two-sided 95 %


def kid(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018, 1801.01401): (mean, standard deviation) over random subsets.

    x, y: [N, D] and [M, D]. Unbiased MMD^2 with k(u, v) = (u.v / D + 1)^3 on subsets without replacement; the value may
    be negative. subset_size None: 1000 as in the paper, or the whole smaller set where that has fewer; one larger than
    a set is a ValueError.
    """
    x, y = _pair(x, y)
    fewest = min(len(x), len(y))
    subset_size = min(1000, fewest) if subset_size is None else subset_size
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"subset_size {subset_size} must lie between 2 and the smaller set, {fewest}")
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        u, v = (s[torch.randperm(len(s), generator=generator)[:subset_size].to(s.device)] for s in (x, y))
        values[i] = _mmd2(u, v, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3)
    return float(values.mean()), float(values.std(correction=0))


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNK)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean [N, M] by matrix product, five times as fast as differences and, about the mean of y, nearly as exact.

    Rows nearer than 1e-6 of their norms count as equal: round-off would put copies a little apart, and features are
    float32 to begin with.
    """
    centre = y.mean(0)
    x, y = x - centre, y - centre
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = norms - 2 * x @ y.T
    return torch.where(squares > 1e-12 * norms, squares, 0).sqrt()


def _pair_mean(x: Tensor, y: Tensor | None, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean kernel value over all pairs; y None: over the pairs i != j of x."""
    other, total = (x if y is None else y), torch.zeros((), dtype=x.dtype, device=x.device)
    for i, part in enumerate(_blocks(x)):
        values = kernel(part, other)
        total += values.sum()
        if y is None:
            total -= values.diagonal(i * CHUNK).sum()
    return total / (len(x) * (len(x) - 1 if y is None else len(other)))


def _mmd2(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return _pair_mean(x, None, kernel) + _pair_mean(y, None, kernel) - 2 * _pair_mean(x, y, kernel)


def mmd2(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Unbiased squared MMD with k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2)) (Gretton et al. 2012, eq. 3).

    x, y: [N, D], [M, D]. May be negative.
    """
    x, y = _pair(x, y)
    return float(_mmd2(x, y, lambda a, b: (_distances(a, b).square() / (-2 * bandwidth**2)).exp()))


def mmd2_biased(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> float:
    """Biased squared MMD, pairs (i, i) included, with the sum of the kernels of `mmd2` (Gretton et al. 2012, eq. 5).

    x, y: [N, D], [M, D]. Never negative; two exact samples give about (1 / N + 1 / M) (K - E k) with K kernels.
    """
    x, y = _pair(x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = _distances(a, b).square()
        return torch.stack([(squares / (-2 * h**2)).exp() for h in bandwidths]).sum(0)

    def within(z: Tensor) -> Tensor:  # the mean over i != j, and the diagonal, where the kernels are 1
        return ((len(z) - 1) * _pair_mean(z, None, kernel) + len(bandwidths)) / len(z)

    return float(within(x) + within(y) - 2 * _pair_mean(x, y, kernel))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over pairs of different samples (Szekely and Rizzo 2013). May be negative.

    x, y: [N, D], [M, D].
    """
    x, y = _pair(x, y)
    return float(-_mmd2(x, y, _distances))


def sliced_w2(x: Tensor, y: Tensor, projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: root of the mean over random unit directions of the squared 1-D distance.

    x, y: [N, D] with equal N, so that the 1-D distance is exact: sorted against sorted (Bonneel et al. 2015).
    """
    x, y = _pair(x, y)
    if len(x) != len(y):
        raise ValueError(f"the sets must be equally large, got {len(x)} and {len(y)}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).square().mean().sqrt())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, 1904.06991): (precision, recall), both in [0, 1].

    real, fake: features [N, D], [M, D]. A set's manifold is the union of balls around its rows, each with the distance
    to the row's k-th nearest neighbour as radius. Precision: share of fake rows inside the real manifold; recall:
    share of real rows inside the generated manifold.
    """
    real, fake = _pair(real, fake)
    if k >= min(len(real), len(fake)):
        raise ValueError(f"k {k} must be smaller than both sets, got {len(real)} and {len(fake)} rows")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(x: Tensor, manifold: Tensor, k: int) -> float:
    # A row is its own nearest neighbour at distance 0: the k-th other one is the last of the k + 1 smallest.
    radii = torch.cat(
        [_distances(part, manifold).topk(k + 1, largest=False).values[:, k] for part in _blocks(manifold)]
    )
    # One distance from two products may differ in its last bits; a row on a ball's surface is inside.
    radii = radii * (1 + 1e-9)
    inside = torch.cat([(_distances(part, manifold) <= radii).any(1) for part in _blocks(x)])
    return float(inside.double().mean())


def nearest_distance(x: Tensor, reference: Tensor) -> float:
    """Median over rows of x of the Euclidean distance to the nearest reference row; nothing is excluded, so a row
    that is itself in the reference counts as 0. x, reference: [N, D], [M, D] (pixels: flatten first)."""
    return float(nearest_distances(x, reference).quantile(0.5))


def nearest_distances(x: Tensor, reference: Tensor) -> Tensor:
    """The same for each row of x: float64 [N]."""
    x, reference = _pair(x, reference)
    return torch.cat([_distances(part, reference).amin(1) for part in _blocks(x)])


def class_shares(labels: Tensor, n: int) -> Tensor:
    """Share of each of n classes among labels [N] in 0..n-1: float64 [n], summing to 1."""
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= n:
        raise ValueError(f"labels must be a non-empty tensor of values 0..{n - 1}")
    return torch.bincount(labels.flatten().cpu(), minlength=n).double() / labels.numel()


def label_agreement(asked: Tensor, found: Tensor) -> float:
    """Share of samples whose found label [N] is the asked one [N]."""
    if asked.shape != found.shape:
        raise ValueError(f"label shapes differ: {list(asked.shape)} and {list(found.shape)}")
    return float((asked.cpu() == found.cpu()).double().mean())


def rmse(x: Tensor, y: Tensor) -> float:
    """Root mean squared difference over all coordinates of two tensors of one shape."""
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {list(x.shape)} and {list(y.shape)}")
    x, y = ((v.cpu() if v.device.type == "mps" else v).detach().double() for v in (x, y))
    return float((x - y).square().mean().sqrt())
