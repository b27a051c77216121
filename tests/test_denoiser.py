"""Denoisers through views: an exact posterior dressed as a network of every kind must come back on every path."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Denoiser, conventions
from fastgen.paths import EDM, VP, Path, Prediction, RectifiedFlow, TrigFlow
from fastgen.teachers.mixture import Mixture

DOUBLE = torch.float64
SD, ZERO_SNR, RF = VP(), VP(zero_snr=True), RectifiedFlow()
SD_LAST = 0.935957542327556  # the rectified-flow time of Stable Diffusion's index 999


def mixture() -> Mixture:
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.2]], dtype=DOUBLE)
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.4]]], dtype=DOUBLE)
    return Mixture(weights, means, covs)


class Dressed(Denoiser):
    """A network that answers exactly, in the terms of its path and prediction, and remembers what it was given."""

    family = "dressed"

    def __init__(self, path: Path, prediction: Prediction, **options: Any) -> None:
        super().__init__(None, path, prediction, shape=(2,), **options)
        self.exact = mixture()

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        self.given = {"x": x, "time": time, "extra": extra}
        t = time / self.time_scale
        t = (4 * t).exp() if self.log_time else t
        levels = self.path.levels(t)
        scale = self.prediction.input_scale(*levels)
        pair = self.exact(x if scale is None else x / scale[:, None].to(x.dtype), t, on=self.path)
        return self.prediction.from_pair(pair, *levels).to(x.dtype)


NETWORKS = {
    "sd_eps": (SD, Prediction(kind="eps"), {}),
    "sd_v": (SD, Prediction(kind="v"), {}),
    "zero_snr_v": (ZERO_SNR, Prediction(kind="v"), {}),
    "zero_snr_x0": (ZERO_SNR, Prediction(kind="x0"), {}),
    "rf": (RF, Prediction(kind="flow"), {"time_scale": 1000.0}),
    "trellis": (RectifiedFlow(sigma_min=1e-5), Prediction(kind="flow", sigma_min=1e-5), {"time_scale": 1000.0}),
    "trig": (TrigFlow(sd=0.5), Prediction(kind="trig", sd=0.5), {}),
    "edm": (EDM(), Prediction(kind="edm", sd=0.5), {"log_time": True}),
    "edm_x0": (EDM(), Prediction(kind="x0"), {"log_time": True}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
VIEWS = [SD, ZERO_SNR, RF, TrigFlow(), TrigFlow(sd=0.5), EDM(), RectifiedFlow(sigma_min=1e-5)]


def network(name: str) -> Dressed:
    path, prediction, options = NETWORKS[name]
    return Dressed(path, prediction, **options)


def tensor(*values: float, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def points(n: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(dtype)


def shared_times(own: Path, on: Path, n: int = 9) -> Tensor:
    """Times of `on` at levels inside both paths: evenly spaced in the angle of (alpha, sigma), ends left out."""
    ends = [
        [torch.atan2(sigma, alpha) for alpha, sigma in (p.levels(tensor(p.end)), p.levels(tensor(p.start)))]
        for p in (own, on)
    ]
    low, high = max(ends[0][0], ends[1][0]), min(ends[0][1], ends[1][1])
    angle = low + (high - low) * torch.linspace(0, 1, n + 2, dtype=DOUBLE)[1:-1]
    return on.time(angle.cos(), angle.sin())


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The first jvp of a process makes torch compile its decompositions, which takes seconds."""
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


@every_network
@pytest.mark.parametrize("on", VIEWS, ids=str)
def test_every_view_of_every_network_is_the_exact_posterior(name: str, on: Path) -> None:
    model = network(name)
    t = shared_times(model.path, on)
    x = points(len(t)) * on.levels(t)[1][:, None]
    found, exact = model.on(on)(x, t), model.exact(x, t, on=on)
    assert torch.allclose(found.x0, exact.x0, rtol=1e-8, atol=1e-9)
    assert torch.allclose(found.eps, exact.eps, rtol=1e-8, atol=1e-7)
    assert found.x0.dtype == DOUBLE and model.given["x"].dtype == model.given["time"].dtype == DOUBLE


@every_network
def test_a_view_on_its_own_path_is_the_network_itself(name: str) -> None:
    """Also when the path is an equal one, not the same object: then no level is carried and nothing is rounded."""
    model = network(name)
    t = torch.linspace(model.path.end, model.path.start, 7, dtype=DOUBLE)[1:-1]
    own = model(points(5), t)
    for on in (model.path, NETWORKS[name][0], type(model.path)(**model.path.__dict__)):
        pair = model(points(5), t, on=on)
        assert torch.equal(pair.x0, own.x0) and torch.equal(pair.eps, own.eps)


def test_a_view_feeds_the_native_input_and_time() -> None:
    """Stable Diffusion asked on the rectified flow: x_vp = x (a + s), tau from the inverse table."""
    model = network("sd_eps")
    tau = tensor(1.0, 400.5, 900.0)
    alpha, sigma = SD.levels(tau)
    x = points(3)
    model.on(RF)(x, sigma / (alpha + sigma))
    assert torch.allclose(model.given["x"], x * (alpha + sigma)[:, None], rtol=1e-12)
    assert torch.allclose(model.given["time"], tau, rtol=1e-11)
    model = network("edm")
    model(x, tensor(0.002, 0.5, 80.0))
    assert torch.allclose(model.given["time"], tensor(0.002, 0.5, 80.0).log() / 4, rtol=1e-13)
    assert torch.allclose(model.given["x"], x / (tensor(0.002, 0.5, 80.0) ** 2 + 0.25).sqrt()[:, None], rtol=1e-13)
    model = network("trellis")
    model(x, tensor(0.0, 0.25, 1.0))
    assert model.given["time"].tolist() == [0, 250, 1000]


def test_above_the_last_level_x0_is_kept_and_the_pair_closes() -> None:
    model, x = network("sd_eps"), points(3)
    t = tensor(SD_LAST + 1e-6, 0.97, 1.0)
    found = model.on(RF)(x, t)
    # The network sees x scaled to the norm of its last level, at its last index.
    alpha, sigma = SD.levels(tensor(999.0))
    x_last = x * (torch.hypot(alpha, sigma) / torch.hypot(1 - t, t))[:, None]
    assert torch.allclose(found.x0, model.exact(x_last, tensor(999.0).expand(3), on=SD).x0, rtol=1e-9)
    assert torch.allclose((1 - t)[:, None] * found.x0 + t[:, None] * found.eps, x, atol=1e-13)
    assert torch.equal(found.eps[2], x[2])  # at t = 1 the noise is x itself, whatever the network said


def test_below_the_first_level_eps_is_kept_and_the_pair_closes() -> None:
    model, x = network("sd_eps"), points(3)
    t = tensor(0.0, 0.001, 0.0283)
    found = model.on(RF)(x, t)
    alpha, sigma = SD.levels(tensor(0.0))
    x_first = x * (torch.hypot(alpha, sigma) / torch.hypot(1 - t, t))[:, None]
    assert torch.allclose(found.eps, model.exact(x_first, tensor(0.0).expand(3), on=SD).eps, rtol=1e-9)
    assert torch.allclose((1 - t)[:, None] * found.x0 + t[:, None] * found.eps, x, atol=1e-13)
    assert torch.equal(found.x0[0], x[0])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", ["sd_eps", "sd_v", "zero_snr_v", "edm", "edm_x0", "trig", "trellis"])
def test_every_pair_closes_at_every_level_of_a_view(name: str, dtype: torch.dtype) -> None:
    model, t = network(name), torch.linspace(0, 1, 33, dtype=dtype)
    x = points(33, dtype)
    pair = model.on(RF)(x, t)
    assert pair.x0.dtype == pair.eps.dtype == dtype
    assert torch.isfinite(pair.x0).all() and torch.isfinite(pair.eps).all()
    error = (1 - t)[:, None] * pair.x0 + t[:, None] * pair.eps - x
    assert error.abs().max() < (1e-10 if dtype == DOUBLE else 1e-4)


def test_edm_at_sigma_zero_returns_x() -> None:
    """Level 0 lies below EDM's last one, 0.002, whose logarithm is the network's time."""
    model, x = network("edm"), points(2)
    pair = model.on(RF)(x, tensor(0.0, 0.0))
    assert torch.equal(pair.x0, x) and torch.isfinite(pair.eps).all()
    assert torch.allclose(model.given["time"], tensor(0.002, 0.002).log() / 4)


def test_zero_terminal_snr_starts_at_pure_noise() -> None:
    model, x = network("zero_snr_v"), points(2)
    for on, t in ((RF, 1.0), (TrigFlow(sd=0.5), math.pi / 2), (ZERO_SNR, 999.0)):
        pair = model.on(on)(x, tensor(t, t))
        assert model.given["time"].tolist() == [999, 999]
        assert torch.allclose(pair.x0, model.exact.moments()[0].expand(2, 2), rtol=1e-12)  # E[x0] says all
        assert torch.allclose(pair.eps, x * (2 if on == TrigFlow(sd=0.5) else 1), rtol=1e-12)


@every_network
def test_gradients_through_views_are_finite_at_both_ends(name: str) -> None:
    model = network(name)
    for dtype in (torch.float32, DOUBLE):
        for on in (RF, TrigFlow(sd=0.5)):
            t = torch.tensor([on.end, 1e-7, 0.5 * on.start, on.start * (1 - 1e-7), on.start], dtype=dtype)
            x = points(5, dtype).requires_grad_()
            t.requires_grad_()
            pair = model.on(on)(x, t)
            for output in (pair.x0, pair.eps):
                gradients = torch.autograd.grad(output.square().sum(), (x, t), retain_graph=True)
                assert all(torch.isfinite(g).all() for g in gradients), (on, output is pair.eps)
            _, tangents = torch.func.jvp(
                lambda x, t, on=on: (lambda p: (p.x0, p.eps))(model.on(on)(x, t)),
                (x.detach(), t.detach()),
                (torch.ones_like(x), torch.ones_like(t)),
            )
            assert all(torch.isfinite(tangent).all() for tangent in tangents)


@pytest.mark.parametrize("name", ["sd_v", "zero_snr_v", "trig", "edm", "rf"])
def test_the_tangent_in_time_of_a_view_is_the_exact_one(name: str) -> None:
    """Through the inverse table, the input's scale and the closing combination."""
    model, t, x = network(name), tensor(0.1234, 0.5123, 0.8456), points(3)
    for tangents in ((torch.zeros_like(x), torch.ones_like(t)), (torch.ones_like(x), torch.zeros_like(t))):
        found = torch.func.jvp(lambda x, t: model.on(RF)(x, t).velocity, (x, t), tangents)
        exact = torch.func.jvp(lambda x, t: model.exact(x, t, on=RF).velocity, (x, t), tangents)
        assert torch.allclose(found[0], exact[0], rtol=1e-8)
        assert torch.allclose(found[1], exact[1], rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x, t: model.on(RF)(x, t).eps, (x.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd_eps", "edm", "rf"])
def test_half_precision_samples_meet_wide_times_and_targets(name: str, half: torch.dtype) -> None:
    model = network(name)
    model.extra["gap"] = Column()
    for on in (None, RF):
        t = model.path.time(*RF.levels(tensor(0.3, 0.9))) if on is None else tensor(0.3, 0.9)
        pair = model(points(2, half), t.float(), on=on, r=0.5 * t.float())
        assert model.given["x"].dtype == half  # what the network's own weights are in
        assert model.given["time"].dtype == model.given["extra"].dtype == torch.float32
        assert pair.x0.dtype == pair.eps.dtype == torch.float32
    # A time that arrives in half precision is raised before any schedule sees it; so is an index given as an integer.
    assert torch.isfinite(model.on(RF)(points(2), tensor(0.3, 0.9).to(half), r=tensor(0.1, 0.2).to(half)).x0).all()
    assert model.given["time"].dtype == model.given["extra"].dtype == torch.float32
    network("sd_eps")(points(2), torch.tensor([999, 0]))


def test_wide_times_leave_samples_in_float32() -> None:
    for on in (None, RF, TrigFlow()):
        model = network("rf")
        pair = model(points(2, torch.float32), tensor(0.2, 0.8), on=on)
        assert pair.x0.dtype == pair.eps.dtype == model.given["x"].dtype == torch.float32


class Column(torch.nn.Module):
    """An embedding that is the number itself."""

    def forward(self, value: Tensor) -> Tensor:
        return value[:, None]


def test_a_second_time_reaches_the_network_as_a_difference_of_rectified_flow_times() -> None:
    model = network("rf")
    r = tensor(0.1, 0.6)
    with pytest.raises(ValueError, match="takes one time"):
        model(points(2), tensor(0.5, 0.9), r=r)
    model.extra["gap"] = Column()
    model(points(2), tensor(0.5, 0.9), r=r)
    assert torch.allclose(model.given["extra"], tensor(0.4, 0.3)[:, None])
    t = tensor(1.0, 1.2)
    model.on(TrigFlow())(points(2), t, r=r)
    expected = t.sin() / (t.sin() + t.cos()) - r.sin() / (r.sin() + r.cos())
    assert torch.allclose(model.given["extra"], expected[:, None], rtol=1e-12)
    model(points(2), tensor(0.5, 0.9))
    assert not model.given["extra"].any()


def test_a_guidance_weight_reaches_the_network_where_it_takes_one() -> None:
    model = network("rf")
    cond = {"guidance": tensor(2.0, 5.0)}
    model(points(2), tensor(0.5, 0.9), cond)
    assert model.given["extra"] is None and not model.takes_guidance
    model.extra["guidance"] = Column()
    model(points(2), tensor(0.5, 0.9), cond)
    assert torch.allclose(model.given["extra"], tensor(0.2, 0.5)[:, None]) and model.takes_guidance
    model.extra["gap"] = Column()
    model(points(2), tensor(0.5, 0.9), cond, r=tensor(0.1, 0.6))
    assert torch.allclose(model.given["extra"], tensor(0.6, 0.8)[:, None])


def test_contradictions_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        Dressed(ZERO_SNR, Prediction(kind="eps"))
    with pytest.raises(ValueError, match=r"sd 0\.5 on TrigFlow\(sd=1"):
        Dressed(TrigFlow(), Prediction(kind="trig"))
    with pytest.raises(NotImplementedError):
        Denoiser(None, RF, Prediction(kind="flow"), shape=(2,))(points(1), tensor(0.5))


@every_network
def test_the_description_survives_json(name: str) -> None:
    model = network(name)
    data = json.loads(json.dumps(model.describe()))
    again = Dressed(**{k: v for k, v in conventions(data).items() if k not in ("shape", "num_classes")})
    assert data["family"] == "dressed" and conventions(data)["shape"] == (2,)
    assert again.describe() == model.describe()
    t = shared_times(model.path, RF)
    assert torch.equal(again.on(RF)(points(len(t)), t).x0, model.on(RF)(points(len(t)), t).x0)


def test_the_null_condition_is_the_label_after_the_last() -> None:
    assert network("rf").null is None
    model = Dressed(RF, Prediction(kind="flow"), num_classes=10)
    assert model.null["label"].tolist() == [10] and model.null["label"].dtype == torch.int64
