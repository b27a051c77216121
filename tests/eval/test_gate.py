"""The gate passes an honest student and fails every fake by the check that was made for it.

The honest generator stands in for a trained one: training digits moved part of the way towards a near digit of the
same class, with a little noise: new images of the right distribution. Its "one-step teacher" is blurred class means.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fastgen import noise
from fastgen.data.digits import Digits
from fastgen.eval import gate
from fastgen.eval.fakes import FAKES
from fastgen.eval.gate import Judge, Seen
from fastgen.eval.protocol import classifier_for, whole

N = 1000


@cache
def judge() -> Judge:
    train = Digits("train")
    return Judge(classifier_for(train), whole(train)["x0"], whole(Digits("held_out"))["x0"])


@cache
def honest(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = whole(Digits("train")).values()
    rows = torch.arange(N)
    index = noise.integers(seed, "pick", rows, len(images))
    flat = images.flatten(1)
    distance = torch.cdist(flat[index], flat)
    distance[labels[index][:, None] != labels] = torch.inf
    near = distance.topk(4, largest=False).indices[rows, 1 + noise.integers(seed, "near", rows, 3)]
    w = 0.35 + 0.3 * noise.uniform(seed, "w", rows)[:, None, None, None]
    made = torch.lerp(images[index], images[near], w) + 0.05 * noise.normal(seed, "noise", rows, (1, 8, 8))
    return made.clamp(-1, 1), labels[index]


@cache
def blurred() -> torch.Tensor:
    images, labels = whole(Digits("train")).values()
    means = torch.stack([images[labels == k].mean(0) for k in range(10)])
    return means[honest()[1]] + 0.1 * noise.normal(2, "noise", torch.arange(N), (1, 8, 8))


@cache
def references() -> tuple[Seen, Seen]:
    """What stands for the teacher at many steps and at one."""
    return judge().see(honest()[0]), judge().see(blurred())


def checks(made: torch.Tensor, asked: torch.Tensor, *, deterministic: bool = False) -> dict[str, gate.Check]:
    (teacher, one), seen = references(), judge().see(made)
    found = gate.common_checks(judge(), seen, teacher, one, deterministic=deterministic)
    return found | gate.shares_check(seen, teacher, 10) | gate.agreement_check(seen, teacher, asked)


def test_an_honest_student_passes_every_check():
    made, asked = honest()
    student = made + 0.05 * noise.normal(3, "student", torch.arange(N), (1, 8, 8))
    found = checks(student, asked, deterministic=True)
    assert set(found) == set(gate.BOUNDS), "every check was made"
    assert not [(name, check) for name, check in found.items() if not check.passed]


@pytest.mark.parametrize("name", FAKES)
def test_every_fake_fails_its_own_check_by_half_as_much_again(name):
    fake, expected = FAKES[name]
    images, labels = whole(Digits("train")).values()
    made, asked = fake(images, labels, N, 0)
    check = checks(made, asked)[expected]
    assert not check.passed
    if expected == "class_shares":
        assert check.value > 1.5 * check.bound
    elif expected == "gap_closed":
        assert 1 - check.value > 1.5 * (1 - check.bound)
    else:
        assert check.value < check.bound / 1.5


def test_blurred_means_fail_the_gap_and_a_stranger_to_the_teacher_fails_the_rmse():
    assert not checks(blurred(), honest()[1])["gap_closed"].passed
    other = honest(seed=5)[0]
    assert not checks(other, honest()[1], deterministic=True)["rmse_ratio"].passed


def test_disobeyed_labels_are_seen():
    made, asked = honest()
    swapped = made.clone()
    swapped[::10] = made[(asked != asked[0]).nonzero().squeeze(1)[: len(swapped[::10])]].flip(0)
    assert not checks(swapped, asked)["label_agreement"].passed


def test_gap_closed_runs_from_one_step_to_many():
    assert gate.gap_closed(90.0, 2.0, 90.0) == 0
    assert gate.gap_closed(90.0, 2.0, 2.0) == 1
    assert gate.gap_closed(90.0, 2.0, 24.0) == 0.75
