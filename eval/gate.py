"""The gate: what a one-step student of a small-image teacher must show before anyone calls it good.

A single distance can be fooled: by a Gaussian per class, by data without one class, by copies of the training set.
Each check below catches one such fake, and all must hold. FD is taken in the features of a classifier.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.eval import metrics
from fastgen.eval.extractors import Classifier

# name: (bound, whether the value must be at least the bound)
BOUNDS: dict[str, tuple[float, bool]] = {
    "gap_closed": (0.95, True),  # (FD teacher@1 - FD student@1) / (FD teacher@1 - FD teacher@25)
    "recall_ratio": (0.9, True),  # recall of the student over recall of the teacher at 25 steps
    "nearest_ratio": (0.5, True),  # median distance to the nearest training image over that of held-out images
    "rmse_ratio": (0.35, False),  # RMSE to the teacher's end point over the one-step teacher's; deterministic methods
    "label_agreement": (-0.02, True),  # share of labels obeyed, student minus teacher at 25 steps
    "class_shares": (0.03, False),  # largest difference of a class's share from the teacher's, labels left out
}


@dataclass(frozen=True)
class Check:
    """One value against its bound."""

    value: float
    bound: float
    passed: bool

    @staticmethod
    def of(name: str, value: float) -> Check:
        bound, least = BOUNDS[name]
        return Check(value, bound, value >= bound if least else value <= bound)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """Images [N, C, H, W] as the judge sees them: the class it reads in each, int64 [N], and figures against the
    training split: FD, FD against held-out images, KID, precision, recall, median distance to the nearest image."""

    images: Tensor
    found: Tensor
    figures: dict[str, float]


class Judge:
    """Real data seen through one extractor: the training split is the reference, held-out images are the floor."""

    def __init__(self, extractor: Classifier, train: Tensor, held_out: Tensor) -> None:
        self.extractor, self.train = extractor, train
        self._train, self._held_out = extractor(train), extractor(held_out)
        self.held_out = self.see(held_out)

    def see(self, images: Tensor) -> Seen:
        """Everything that is measured of a set of images."""
        features = self.extractor(images)
        precision, recall = metrics.precision_recall(self._train, features)
        kid, kid_std = metrics.kid(features, self._train, subsets=20)
        figures = {
            "fd": metrics.frechet(features, self._train),
            "fd_held_out": metrics.frechet(features, self._held_out),
            "kid": kid,
            "kid_std": kid_std,
            "precision": precision,
            "recall": recall,
            "nearest": metrics.nearest_distance(images.flatten(1), self.train.flatten(1)),
        }
        return Seen(images, self.extractor.classify(images).argmax(-1), figures)

    def frechet(self, images: Tensor) -> float:
        """FD to the training split alone, for rows of which nothing else is asked."""
        return metrics.frechet(self.extractor(images), self._train)

    @property
    def floor(self) -> float:
        """FD of held-out real images to the training split: nothing honest is expected below it by much."""
        return self.held_out.figures["fd"]


def gap_closed(teacher_1: float, teacher_many: float, student: float) -> float:
    """The share of the teacher's loss from few steps that the student takes back."""
    return ratio(teacher_1 - student, teacher_1 - teacher_many)


def ratio(value: float, reference: float) -> float:
    """value / reference, and 0 where that is 0: nothing is shown by being as good as a teacher that reaches nothing."""
    return value / reference if reference else 0.0


def common_checks(
    judge: Judge, student: Seen, teacher: Seen, one_step: Seen, *, deterministic: bool
) -> dict[str, Check]:
    """The checks that hold with labels and without: all three sampled from the same noise and conditions."""
    values = {
        "gap_closed": gap_closed(*(seen.figures["fd"] for seen in (one_step, teacher, student))),
        "recall_ratio": ratio(student.figures["recall"], teacher.figures["recall"]),
        "nearest_ratio": student.figures["nearest"] / judge.held_out.figures["nearest"],
    }
    if deterministic:
        own, reference = (metrics.rmse(s.images, teacher.images) for s in (student, one_step))
        values["rmse_ratio"] = own / reference
    return {name: Check.of(name, value) for name, value in values.items()}


def agreement_check(student: Seen, teacher: Seen, asked: Tensor) -> dict[str, Check]:
    """Labels asked for, int64 [N], against labels found."""
    own, reference = (metrics.label_agreement(asked, seen.found) for seen in (student, teacher))
    return {"label_agreement": Check.of("label_agreement", own - reference)}


def shares_check(student: Seen, teacher: Seen, classes: int) -> dict[str, Check]:
    """Class histograms of samples made without a label."""
    own, reference = (metrics.class_shares(seen.found, classes) for seen in (student, teacher))
    return {"class_shares": Check.of("class_shares", float(torch.max((own - reference).abs())))}
