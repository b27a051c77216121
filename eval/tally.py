"""One set of images against another, seen batch by batch: features are kept, images are not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.eval import metrics
from fastgen.eval.backends import Backend, metric_name
from fastgen.eval.extractors import Classifier, Extractor
from fastgen.eval.inception import InceptionExtractor, inception_score
from fastgen.eval.metrics import Moments, Result
from fastgen.eval.statistics import Statistics
from fastgen.images import to_uint8

K = 3  # the neighbour that sets a radius in precision and recall
NEIGHBOURS = 10_000  # rows of each set whose neighbours are counted, as in the ADM evaluator
SPLITS = 10


class Tally:
    """Features, their moments, class probabilities where the extractor has them, a hash of the 8-bit pixels in their
    order, and the distance of each image to the nearest of `near` (pixels, [M, C * H * W])."""

    def __init__(self, extractor: Extractor, near: Tensor | None = None) -> None:
        self.extractor, self.near = extractor, near
        self.moments, self.count = Moments(), 0
        self._features: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self._nearest: list[Tensor] = []
        self._digest = hashlib.sha256()

    def update(self, images: Tensor) -> None:
        """Add images [N, C, H, W] in [-1, 1]."""
        features = self.extractor(images).cpu()
        self.count += len(images)
        self.moments.update(features)
        self._features.append(features)
        self._digest.update(to_uint8(images).cpu().numpy().tobytes())
        if isinstance(self.extractor, Classifier):
            self._probabilities.append(self.extractor.classify(images).cpu())
        if self.near is not None:
            self._nearest.append(metrics.nearest_distances(images.flatten(1).cpu(), self.near))

    @classmethod
    def of(cls, extractor: Extractor, batches: Iterable[Tensor], near: Tensor | None = None) -> Tally:
        """The tally of all of some batches."""
        tally = cls(extractor, near)
        for images in batches:
            tally.update(images)
        return tally

    @property
    def features(self) -> Tensor:
        """float32 [N, D]"""
        return torch.cat(self._features)

    @property
    def probabilities(self) -> Tensor | None:
        """p(class | image), [N, classes], or None where the extractor is no classifier."""
        if isinstance(self.extractor, InceptionExtractor):
            parts = [self.extractor.probabilities(part) for part in self._features]
            return torch.cat(parts)
        return torch.cat(self._probabilities) if self._probabilities else None

    @property
    def nearest(self) -> float | None:
        """Median distance to the nearest reference image."""
        return float(torch.cat(self._nearest).quantile(0.5)) if self._nearest else None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Real images: moments, and features where they were images or a file of features. `floor` are the features of
    two sets of real images, whose distances are the best that can be hoped for; `nearest` is that of real images."""

    moments: Moments
    count: int | None
    sha256: str | None
    features: Tensor | None = None
    floor: tuple[Tensor, Tensor] | None = None
    nearest: float | None = None

    @classmethod
    def of_statistics(cls, found: Statistics) -> Reference:
        return cls(found.moments, found.count, found.sha256, found.features)

    @classmethod
    def of_images(cls, tally: Tally, held_out: Tally | None = None) -> Reference:
        """Against held-out images where there are some, else half against half."""
        features = tally.features
        floor = (held_out.features, features) if held_out else (features[::2], features[1::2])
        return cls(tally.moments, tally.count, tally.sha256, features, floor, held_out.nearest if held_out else None)


def measure(gen: Tally, real: Reference, backend: Backend, seed: int | None) -> list[Result]:
    """Every metric that the two sets allow; what is made of labels and prompts is the caller's."""
    see = gen.extractor
    base = Result(
        metric="",
        value=0.0,
        n_gen=gen.count,
        n_ref=real.count,
        extractor=see.name,
        extractor_sha256=see.sha256,
        floor=None,
        seed=seed,
        resize=getattr(see, "resize", "none"),
        reference_sha256=real.sha256,
    )
    rows = [_distance(gen, real, backend, base)]
    # A line through the distances of a tenth of the images and more needs that tenth to have full rank.
    if gen.count >= 10 * see.dim:
        value = metrics.frechet_infinity(gen.features, real.moments, seed=0)
        rows.append(replace(base, metric=metric_name("FD-infinity", see), value=value))
    rows += _pairwise(gen, real, base)
    probabilities = gen.probabilities
    if probabilities is not None and gen.count >= SPLITS:
        alone = replace(base, n_ref=None, reference_sha256=None)
        rows.append(replace(alone, metric=metric_name("IS", see), value=inception_score(probabilities, SPLITS)[0]))
    if gen.nearest is not None:
        rows.append(replace(base, metric="nearest", value=gen.nearest, floor=real.nearest))
    return rows


def _distance(gen: Tally, real: Reference, backend: Backend, base: Result) -> Result:
    """The Frechet distance; its interval where every fifth of the images has full rank."""
    few = min(gen.count, real.moments.count) < gen.extractor.dim
    if backend.name == "own" and few and real.features is not None:
        value = metrics.frechet(gen.features, real.features)  # exact for singular covariances
    else:
        value = backend.frechet(gen.moments, real.moments)
    floor = None if real.floor is None else metrics.frechet(*real.floor)
    interval = metrics.frechet_interval(gen.features, real.moments) if gen.count >= 5 * gen.extractor.dim else None
    name = metric_name("FD", gen.extractor)
    return replace(base, metric=name, value=value, floor=floor, interval=interval, backend=backend.name)


def _pairwise(gen: Tally, real: Reference, base: Result) -> list[Result]:
    """KID, precision and recall, which need the features of both sets."""
    if real.features is None:
        return []
    halves = real.floor if real.floor is not None and min(map(len, real.floor)) > K else None
    floor = None if halves is None else metrics.kid(*halves)[0]
    rows = [replace(base, metric="KID", value=metrics.kid(gen.features, real.features)[0], floor=floor)]
    fake, true = gen.features[:NEIGHBOURS], real.features[:NEIGHBOURS]
    if min(len(fake), len(true)) <= K:
        return rows
    values = metrics.precision_recall(true, fake, K)
    floors: tuple[float | None, float | None] = (None, None)
    if halves is not None:
        other, same = (part[:NEIGHBOURS] for part in halves)
        floors = metrics.precision_recall(same, other, K)
    counted = replace(base, n_gen=len(fake), n_ref=len(true))
    for name, value, least in zip(("precision", "recall"), values, floors, strict=True):
        rows.append(replace(counted, metric=name, value=value, floor=least))
    return rows
