"""Pairs, their way between paths, and every meaning of a network's output, against formulas written out again."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.paths import EDM, VP, Pair, Path, Prediction, RectifiedFlow, TrigFlow, carry

DOUBLE = torch.float64
SD = VP()
ZERO_SNR = VP(zero_snr=True)


def tensor(*values: float, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def times(path: Path, n: int) -> torch.Tensor:
    """From one end of the path to the other, both included."""
    return torch.linspace(path.end, path.start, n, dtype=DOUBLE)


def pair_of(seed: int = 0, *shape: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (4, 3, 2)
    return Pair(*(torch.randn(shape, generator=generator, dtype=DOUBLE) for _ in range(2)))


def test_a_step_through_the_pair_is_euler_and_ddim() -> None:
    x0, eps = pair_of().x0, pair_of().eps
    rf, t, s = RectifiedFlow(), torch.full((4,), 0.7, dtype=DOUBLE), torch.full((4,), 0.4, dtype=DOUBLE)
    x = rf.mix(x0, eps, t)
    assert torch.allclose(x, 0.3 * x0 + 0.7 * eps, rtol=1e-14)
    assert torch.allclose(Pair(x0, eps).at(*rf.levels(s)), x + (0.4 - 0.7) * (eps - x0), atol=1e-14)
    # DDIM, 2010.02502 equation 12 with eta = 0, between indices 600 and 200.
    (a, q), (a2, q2) = ([float(v) for v in SD.levels(tensor(i))] for i in (600, 200))
    x = a * x0 + q * eps
    ddim = a2 * (x - q * eps) / a + q2 * eps
    assert torch.allclose(Pair(x0, eps).at(*SD.levels(tensor(200.0).expand(4))), ddim, atol=1e-13)
    assert torch.equal(Pair(x0, eps).at(tensor(1.0)[0], tensor(0.0)[0]), x0)


def test_lerp_takes_one_weight_or_one_per_sample() -> None:
    a, b = pair_of(0), pair_of(1)
    for w in (0.0, 1.0, 4.5):
        assert torch.allclose(a.lerp(b, w).x0, (1 - w) * a.x0 + w * b.x0, atol=1e-14)
    w = tensor(0, 1, 2, -3)
    mixed = a.lerp(b, w)
    for i in range(4):
        assert torch.allclose(mixed.eps[i], a.eps[i] + w[i] * (b.eps[i] - a.eps[i]), atol=1e-14)
        assert torch.allclose(mixed.velocity[i], mixed.eps[i] - mixed.x0[i], atol=0)
    assert torch.equal(a.lerp(b, 0.0).x0, a.x0)


def test_wide_times_do_not_widen_samples() -> None:
    """float64 levels with float32 samples would hand a network float64 input."""
    x0, eps = pair_of().x0.float(), pair_of().eps.float()
    t = times(RectifiedFlow(), 4)
    assert RectifiedFlow().mix(x0, eps, t).dtype == torch.float32
    assert Pair(x0, eps).lerp(Pair(eps, x0), t).x0.dtype == torch.float32
    assert Pair(x0.half(), eps.half()).at(*RectifiedFlow().levels(t)).dtype == torch.float32
    assert RectifiedFlow().mix(x0.double(), eps.double(), t.float()).dtype == DOUBLE
    pair = Prediction(kind="flow").to_pair(eps, x0, *RectifiedFlow().levels(t))
    assert pair.x0.dtype == pair.eps.dtype == torch.float32


def test_carry_matches_the_closed_forms_and_returns() -> None:
    x, t = pair_of().x0, tensor(1.0, 300.5, 700, 999)
    alpha, sigma = SD.levels(t)
    scale = (alpha + sigma)[:, None, None]
    x_rf, t_rf = carry(x, t, SD, RectifiedFlow())
    assert torch.allclose(t_rf, sigma / (alpha + sigma), rtol=1e-13) and torch.allclose(x_rf, x / scale, rtol=1e-13)
    x_trig, angle = carry(x, t, SD, TrigFlow(sd=0.5))
    assert torch.allclose(angle, torch.atan2(sigma, 0.5 * alpha), rtol=1e-13)
    assert torch.allclose(x_trig, x / (alpha**2 + (sigma / 0.5) ** 2).sqrt()[:, None, None], rtol=1e-13)
    back, t_back = carry(x_rf, t_rf, RectifiedFlow(), SD)
    assert torch.allclose(back, x, rtol=1e-12) and torch.allclose(t_back, t, rtol=1e-12)
    # Pure noise on a zero-SNR table: nothing is divided by alpha = 0.
    x_rf, t_rf = carry(x[:1], tensor(999), ZERO_SNR, RectifiedFlow())
    assert torch.equal(x_rf, x[:1]) and t_rf.item() == 1


# --- predictions

S, M = 0.5, 1e-5
KINDS = {
    "eps": (Prediction(kind="eps"), SD),
    "x0": (Prediction(kind="x0"), EDM()),
    "v": (Prediction(kind="v"), ZERO_SNR),
    "flow": (Prediction(kind="flow"), RectifiedFlow()),
    "trellis": (Prediction(kind="flow", sigma_min=M), RectifiedFlow(sigma_min=M)),
    "trig": (Prediction(kind="trig", sd=S), TrigFlow(sd=S)),
    "edm": (Prediction(kind="edm", sd=S), EDM()),
}
# y and the way back, written out as in the papers: a, q are the levels, t the angle of TrigFlow.
FORMULAS = {
    "eps": (lambda x0, eps, a, q: eps, lambda x, y, a, q: ((x - q * y) / a, y)),
    "x0": (lambda x0, eps, a, q: x0, lambda x, y, a, q: (y, (x - a * y) / q)),
    "v": (lambda x0, eps, a, q: a * eps - q * x0, lambda x, y, a, q: (a * x - q * y, q * x + a * y)),
    "flow": (lambda x0, eps, a, q: eps - x0, lambda x, y, a, q: (x - q * y, x + a * y)),
    "trellis": (lambda x0, eps, a, q: (1 - M) * eps - x0, lambda x, y, a, q: ((1 - M) * x - q * y, x + a * y)),
    # F = cos(t) eps - sin(t) x0 / sd; x0 = cos(t) x - sin(t) sd F; eps = (sin(t) x + cos(t) sd F) / sd
    "trig": (
        lambda x0, eps, a, q: a * eps - q / S * x0 / S,
        lambda x, y, a, q: (a * x - q * y, (q / S * x + a * S * y) / S),
    ),
    # D = c_skip x + c_out F, eps = (x - D) / sigma
    "edm": (
        lambda x0, eps, a, q: (x0 - S**2 / (q**2 + S**2) * (x0 + q * eps)) * (q**2 + S**2).sqrt() / (q * S),
        lambda x, y, a, q: (
            (d := S**2 / (q**2 + S**2) * x + q * S / (q**2 + S**2).sqrt() * y),
            (x - d) / q,
        ),
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def inner_times(name: str, path: Path) -> torch.Tensor:
    """All of the path, but the end where the prediction says nothing of the pair's other half."""
    return times(path, 11)[1:] if name == "x0" else times(path, 11)


@every_kind
def test_predictions_round_trip_and_match_the_papers(name: str) -> None:
    prediction, path = KINDS[name]
    target, solve = FORMULAS[name]
    t = inner_times(name, path)
    pair = pair_of(0, len(t), 6)
    alpha, sigma = path.levels(t)
    x, (a, q) = pair.at(alpha, sigma), (alpha[:, None], sigma[:, None])
    y = prediction.from_pair(pair, alpha, sigma)
    assert torch.allclose(y, target(pair.x0, pair.eps, a, q), rtol=1e-9, atol=1e-9)
    found, expected = prediction.to_pair(y, x, alpha, sigma), solve(x, y, a, q)
    for left, right in ((found.x0, pair.x0), (found.eps, pair.eps), (found.x0, expected[0]), (found.eps, expected[1])):
        assert torch.isfinite(left).all()
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@every_kind
def test_predictions_are_linear_so_guidance_is_too(name: str) -> None:
    prediction, path = KINDS[name]
    t = inner_times(name, path)[4:5].expand(4)
    null, conditional = pair_of(0), pair_of(1)
    levels = path.levels(t)
    guided = prediction.from_pair(null.lerp(conditional, 3.0), *levels)
    parts = [prediction.from_pair(pair, *levels) for pair in (null, conditional)]
    assert torch.allclose(guided, parts[0] + 3.0 * (parts[1] - parts[0]), atol=1e-10)


def test_zero_terminal_snr_v_at_the_last_level() -> None:
    x, y = pair_of().x0, pair_of().eps
    pair = Prediction(kind="v").to_pair(y, x, *ZERO_SNR.levels(tensor(999.0).expand(4)))
    assert torch.equal(pair.x0, -y) and torch.equal(pair.eps, x)


def test_an_edm_network_is_a_trigflow_network_of_the_other_sign() -> None:
    """With tan t = sigma / sd the two see the same input, c_in x = x_trig / sd, and F_trig = -F_edm."""
    x, y, sigma = pair_of().x0, pair_of().eps, tensor(0.01, 0.5, 3.0, 80.0)
    edm = Prediction(kind="edm", sd=S)
    ones = torch.ones_like(sigma)
    x_trig, t = carry(x, sigma, EDM(), TrigFlow(sd=S))
    scale = edm.input_scale(ones, sigma)
    assert torch.allclose(scale[:, None, None] * x, x_trig / S, rtol=1e-12)
    pair = edm.to_pair(y, x, ones, sigma)
    assert torch.allclose(Prediction(kind="trig", sd=S).from_pair(pair, *TrigFlow(sd=S).levels(t)), -y, rtol=1e-9)


def test_only_edm_scales_its_input() -> None:
    alpha, sigma = tensor(1.0), tensor(2.0)
    assert Prediction(kind="edm", sd=S).input_scale(alpha, sigma).item() == pytest.approx(1 / math.hypot(2, 0.5))
    assert all(Prediction(kind=kind).input_scale(alpha, sigma) is None for kind in ("eps", "x0", "v", "flow", "trig"))


def test_an_unknown_kind_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown prediction kind 'velocity'; known: eps, x0, v, flow, trig, edm"):
        Prediction(kind="velocity")
