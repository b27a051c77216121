"""Collapse made visible: how far weights move, and whether samples still look like data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgen.errors import RunFailed

STUCK_LIMIT = 5  # measured updates in a row that moved nothing

# Ratios of the samples' statistic to the data's (or plain shares), outside which a warning is logged.
BANDS = {
    "sample_std": (0.5, 1.5),
    "sample_distance": (0.5, 1.5),
    "sample_saturation": (-1.0, 0.25),
}


class UpdateMonitor:
    """The update-to-weight ratio |dw| / |w| of what is trained of each network, and a stop for what does not move."""

    def __init__(self, trained: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.trained = trained
        self._ratio: dict[str, float] = {}
        self._stuck = dict.fromkeys(trained, 0)

    @contextlib.contextmanager
    def measure(self, name: str, lr: float, step: int) -> Iterator[None]:
        """Wrap one optimiser step: copies the weights, so only every `log_every`-th update is measured."""
        parameters = self.trained[name]
        before = [p.detach().clone() for p in parameters]
        size = torch.stack(torch._foreach_norm(before)).norm()
        yield
        torch._foreach_sub_(before, [p.detach() for p in parameters])
        moved = torch.stack(torch._foreach_norm(before)).norm()
        self._ratio[name] = float(moved / size.clamp_min(1e-12))
        self._stuck[name] = self._stuck[name] + 1 if self._ratio[name] == 0 and lr > 0 else 0
        if self._stuck[name] >= STUCK_LIMIT:
            raise RunFailed(
                f"step {step}: the weights of '{name}' have not moved in {STUCK_LIMIT} measured updates; "
                "its loss does not depend on it, or the learning rate is 0"
            )

    def values(self, name: str) -> dict[str, float]:
        """The newest measurement, to be logged."""
        return {f"update_ratio/{name}": self._ratio[name]} if name in self._ratio else {}


def sample_statistics(samples: Tensor, data: Tensor) -> dict[str, float]:
    """Samples against data, both [N, ...]: ratio of standard deviations, ratio of mean pairwise distances, and the
    difference of the shares of saturated values (|x| > 0.99, for images in [-1, 1])."""

    def distance(x: Tensor) -> Tensor:
        return torch.pdist(x.flatten(1).float()).mean()

    def saturation(x: Tensor) -> Tensor:
        return (x.abs() > 0.99).float().mean()

    return {
        "sample_std": float(samples.std() / data.std()),
        "sample_distance": float(distance(samples) / distance(data)),
        "sample_saturation": float(saturation(samples) - saturation(data)),
    }


def left_band(statistics: Mapping[str, float]) -> list[str]:
    """One line for every statistic outside its band."""
    return [
        f"{name} = {statistics[name]:.3g} left [{low}, {high}]: the student may be collapsing"
        for name, (low, high) in BANDS.items()
        if name in statistics and not low <= statistics[name] <= high
    ]
