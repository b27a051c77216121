"""The MLP family: it learns on every path, and its folder brings back the same network or says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from fastgen.cond import repeat
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import TrigFlow
from fastgen.student import save_teacher
from fastgen.teacher import family, read_denoiser
from fastgen.teachers import mlp

PATHS = ["RectifiedFlow", "TrigFlow", "EDM", "VP"]


def small(path: str = "RectifiedFlow", shape=(2,), num_classes: int | None = None, **options) -> mlp.MLPDenoiser:
    torch.manual_seed(0)
    denoiser = mlp.build(mlp.MLPConfig(width=32, depth=2, path=path, **options), shape, num_classes)
    for layer in (denoiser.net.modulation, denoiser.net.outer):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return denoiser


@pytest.mark.parametrize("path", PATHS)
def test_time_reaches_the_network_in_its_range_and_rises_with_noise(path):
    denoiser = small(path)
    t = torch.tensor([denoiser.path.end, (denoiser.path.start + denoiser.path.end) / 2, denoiser.path.start])
    low, middle, high = denoiser.time_input(t).tolist()
    assert -2 <= low < middle < high <= 1.2


@pytest.mark.parametrize("path", PATHS)
def test_the_pair_closes_on_its_own_path(path):
    denoiser = small(path).double()
    t = torch.linspace(0.1, 0.9, 5).double() * denoiser.path.start
    x = torch.randn(5, 2).double()
    pair = denoiser(x, t)
    torch.testing.assert_close(pair.at(*denoiser.path.levels(t)), x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("RectifiedFlow", None), ("VP", "eps"), ("VP", "v"), ("VP", "x0"), ("EDM", None), ("TrigFlow", None)],
)
def test_it_learns_a_single_gaussian_on_every_path(path, prediction):
    """The loss in the network's own target ends close to its least value, known in closed form for N(0.5, 0.3^2)."""
    denoiser = small(path, prediction=prediction)
    where, kind = denoiser.path, denoiser.prediction
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    losses, floors = [], []
    for _ in range(200):
        t = where.start * torch.rand(256).clamp_min(0.05)
        x0, eps = 0.5 + 0.3 * torch.randn(256, 2), torch.randn(256, 2)
        alpha, sigma = where.levels(t)
        x, (a1, q1) = where.mix(x0, eps, t), kind.coefficients(alpha, sigma)
        target = a1[:, None] * x0 + q1[:, None] * eps
        given = kind.from_pair(denoiser(x, t), alpha, sigma)
        loss = (given - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # Var[a1 x0 + q1 eps | x] of a Gaussian: the part of the target that x does not tell.
        variance = alpha**2 * 0.09 + sigma**2
        floors.append(((alpha * q1 - a1 * sigma) ** 2 * 0.09 / variance).mean().item())
    excess = sum(losses[-50:]) / 50 - sum(floors[-50:]) / 50
    assert excess < 0.05 * max(losses[0], 1.0)


@pytest.mark.parametrize("path", PATHS)
def test_a_folder_brings_back_the_same_network(tmp_path, path):
    denoiser = small(path, shape=(1, 4, 4), num_classes=3)
    save_teacher(denoiser, tmp_path / "teacher", {})
    again, facts = read_denoiser(tmp_path / "teacher")
    assert facts["kind"] == "teacher" and type(again) is mlp.MLPDenoiser
    assert again.describe() == denoiser.describe()
    x, t = torch.randn(3, 1, 4, 4), torch.full((3,), 0.3 * denoiser.path.start)
    for cond in ({"label": torch.tensor([0, 1, 3])}, None):
        assert torch.equal(again(x, t, cond).x0, denoiser(x, t, cond).x0)


def test_no_condition_is_the_null_label():
    denoiser = small(num_classes=3)
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(denoiser(x, t).x0, denoiser(x, t, repeat(denoiser.null, 3)).x0)
    assert not torch.equal(denoiser(x, t).x0, denoiser(x, t, {"label": torch.tensor([0, 1, 2])}).x0)


def test_a_second_time_is_refused():
    with pytest.raises(ValueError, match="one time"):
        small()(torch.randn(2, 2), torch.rand(2), r=torch.rand(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "net/model.safetensors").unlink(), "model.safetensors: no such file"),
        (
            lambda f: (f / "net/model.safetensors").write_bytes((f / "net/model.safetensors").read_bytes()[:-9]),
            "not a whole",
        ),
        (lambda f: (f / "net/config.json").write_text("{"), "not readable as JSON"),
        (lambda f: edit(f / "net/config.json", width=64), "config and weights do not match"),
        (lambda f: edit(f / "net/config.json", depth=3), "no tensor 'blocks.2"),
        (lambda f: edit(f / "net/config.json", wdth=64), "unknown key 'wdth'"),
        (lambda f: edit(f / "net/config.json", shape=[3]), "shape or num_classes differ"),
        (lambda f: (f / "fastgen.json").unlink(), "not a checkpoint that any family knows"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    folder = tmp_path / "teacher"
    save_teacher(small(), folder, {})
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_denoiser(folder)


def edit(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "options",
    [
        {"path": "VP", "prediction": "flow"},
        {"prediction": "eps"},
        {"path": "DDPM"},
        {"width": 4},
        {"depth": 0},
        {"dropout": 1.0},
    ],
)
def test_configs_that_make_no_network_are_refused(options):
    with pytest.raises(ValidationError):
        mlp.MLPConfig(**options)


def test_the_trig_target_shares_the_paths_sd():
    denoiser = small("TrigFlow")
    assert isinstance(denoiser, Denoiser) and denoiser.path == TrigFlow() and denoiser.prediction.sd == denoiser.path.sd


def test_it_is_a_family():
    assert family("mlp") is mlp and mlp.NetConfig is mlp.MLPConfig
    assert mlp.NetConfig(family="mlp").prediction is None
