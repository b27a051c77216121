"""Generators that cheat, one for each thing a single distance cannot see. The gate must fail every one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen import noise

Fake = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def gaussians(images: Tensor, labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """One Gaussian per class with the class's own mean and covariance: right in two moments, wrong in every image.

    images [N, C, H, W] and labels [N] are the training split; returns n images and their labels, classes in turn.
    """
    rows = torch.arange(n)
    asked = rows % int(labels.max() + 1)
    made = torch.empty(n, *images.shape[1:])
    for label in asked.unique():
        own = images[labels == label].flatten(1).double()
        values, vectors = torch.linalg.eigh(own.T.cov())
        z = noise.normal(seed, "fake", rows[asked == label], (own.shape[1],)).double()
        drawn = own.mean(0) + (z * values.clamp_min(0).sqrt()) @ vectors.T
        made[asked == label] = drawn.float().reshape(-1, *images.shape[1:])
    return made.clamp(-1, 1), asked


def without_a_class(images: Tensor, labels: Tensor, n: int, seed: int, missing: int = 8) -> tuple[Tensor, Tensor]:
    """The training split with one class left out, drawn with replacement: a dropped mode."""
    kept = (labels != missing).nonzero().squeeze(1)
    index = kept[noise.integers(seed, "fake", torch.arange(n), len(kept))]
    return images[index], labels[index]


def copies(images: Tensor, labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training images themselves, drawn with replacement: memorisation."""
    index = noise.integers(seed, "fake", torch.arange(n), len(images))
    return images[index], labels[index]


# Each fake with the check that must catch it.
FAKES: dict[str, tuple[Fake, str]] = {
    "gaussians": (gaussians, "gap_closed"),
    "without_a_class": (without_a_class, "class_shares"),
    "copies": (copies, "nearest_ratio"),
}
