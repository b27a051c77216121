"""TRELLIS's sampler: its times, where it guides, and its end on flows that are known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.samplers.flow_euler import FlowEuler, from_pipeline, sample
from fastgen.sparse import Voxels
from fastgen.teacher import Teacher

S = 1e-5


class Linear(Denoiser):
    """v = a x, with a the condition's value: cond["image"] [B, 1, 1]."""

    family = "linear"

    def __init__(self) -> None:
        path, kind = RectifiedFlow(sigma_min=S), Prediction(kind="flow", sigma_min=S)
        super().__init__(None, path, kind, shape=(2,))
        self.asked: list[tuple[float, int]] = []

    def raw(self, x: Any, time: Tensor, cond: Any, extra: Tensor | None) -> Any:
        self.asked.append((float(time[0]), len(time)))
        a = cond["image"][:, 0]
        return x * (x.rows(a) if isinstance(x, Voxels) else a)

    @property
    def has_null(self) -> bool:
        return True

    def unconditional(self, cond: Any) -> Any:
        return {"image": torch.zeros_like(cond["image"])}


def given(a: float, n: int) -> dict[str, Tensor]:
    return {"image": torch.full((n, 1, 1), a, dtype=torch.float64)}


def ragged() -> Voxels:
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [1, 0, 0, 0]], dtype=torch.int32)
    return Voxels(torch.arange(6, dtype=torch.float64).reshape(3, 2), coords, 2)


def test_times_and_where_they_are_guided():
    image, text = FlowEuler(**IMAGE), FlowEuler(**TEXT)
    assert image.times()[:4] == pytest.approx((1, 0.98630137, 0.97183099, 0.95652174))
    assert (image.guided, text.guided) == (19, 15)
    assert [text.weight(t) for t in text.times()[:5]] == [1, 1, 1, 1, 8.5]  # near noise, not yet
    assert FlowEuler(steps=2, rescale_t=3.0).times() == (1, 0.75)
    assert FlowEuler(steps=4, rescale_t=3.0).times() == pytest.approx((1, 0.9, 0.75, 0.5))
    assert FlowEuler(**TEXT | {"steps": 1}).guided == 0  # the only evaluation lies outside the interval


def test_the_interval_holds_both_its_ends():
    demo = FlowEuler(**IMAGE | {"steps": 12})
    assert demo.times()[9] == 0.5 and demo.weight(0.5) == demo.weight(1.0) == 6
    assert demo.weight(0.4999999) == 1 and demo.guided == 10


@pytest.mark.parametrize("r", [1.0, 3.0])
@pytest.mark.parametrize("noise", [torch.randn(2, 3, dtype=torch.float64), ragged()])
def test_the_end_of_a_linear_flow_is_a_product(r, noise):
    """x = noise prod(1 - (t_i - t_{i+1}) a)."""
    settings = FlowEuler(steps=7, rescale_t=r)
    times = [*settings.times(), 0.0]
    expected = noise * float(torch.tensor([1 - (s - t) * 0.3 for s, t in pairwise(times)]).double().prod())
    found = sample(Linear(), noise, settings, given(0.3, len(noise)))
    torch.testing.assert_close(bare(found), bare(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", [torch.randn(2, 3, dtype=torch.float64), ragged()])
def test_guidance_doubles_the_batch_inside_the_interval_only(noise):
    settings, denoiser = FlowEuler(steps=4, rescale_t=3.0, cfg_strength=5.0, cfg_interval=(0.5, 0.9)), Linear()
    found = sample(denoiser, noise, settings, given(0.3, len(noise)))
    assert denoiser.asked == [(1.0, 2), (pytest.approx(0.9), 4), (0.75, 4), (0.5, 4)]
    factor, times = 1.0, [*settings.times(), 0.0]
    for s, t, a in zip(times[:-1], times[1:], [0.3, 1.8, 1.8, 1.8], strict=True):
        factor *= 1 - (s - t) * a
    torch.testing.assert_close(bare(found), bare(noise * factor), rtol=1e-9, atol=1e-12)


def test_the_end_lies_at_sigma_min():
    """One step from noise: x0 + sigma_min eps = noise - v exactly, and not the clean prediction."""
    noise = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(
        sample(Linear(), noise, FlowEuler(steps=1), given(0.3, 2)), 0.7 * noise, rtol=1e-12, atol=0
    )


def test_a_teacher_without_a_null_condition_is_not_guided():
    class Bare(Linear):
        has_null = False

    with pytest.raises(UserError, match="no null condition"):
        sample(Bare(), torch.randn(2, 3), FlowEuler(cfg_strength=5.0), given(0.3, 2))
    assert sample(Teacher(Bare()), torch.randn(2, 3), FlowEuler(steps=2), given(0.3, 2)).shape == (2, 3)


NAME = "FlowEulerGuidanceIntervalSampler"
IMAGE: dict[str, Any] = {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
TEXT: dict[str, Any] = {"steps": 25, "cfg_strength": 7.5, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0}


def test_settings_of_a_pipeline():
    assert from_pipeline(NAME, IMAGE, "pipeline.json") == FlowEuler(**IMAGE)
    assert from_pipeline("FlowEulerSampler", {"steps": 3}, "here").guided == 0
    assert from_pipeline("FlowEulerCfgSampler", {"cfg_strength": 2.0}, "here").guided == 25


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("FlowEuler", {}, "no sampler is called 'FlowEuler' (did you mean 'FlowEulerSampler'?)"),
        (NAME, {"step": 3}, "unknown key 'step' (did you mean 'steps'?)"),
        ("FlowEulerSampler", {"cfg_strength": 2.0}, "'cfg_strength' is no setting of FlowEulerSampler"),
        (NAME, {"steps": 0}, "'steps'"),
        (NAME, {"rescale_t": 0.0}, "'rescale_t'"),
        (NAME, {"cfg_interval": [0.9, 0.5]}, "'cfg_interval': an interval of times is [low, high]"),
    ],
)
def test_mistakes_are_told_in_one_line(name, params, told):
    with pytest.raises(UserError) as refusal:
        from_pipeline(name, params, "pipeline.json")
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


def bare(x: Any) -> Tensor:
    return x.feats if isinstance(x, Voxels) else x
