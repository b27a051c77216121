"""Pairs against the ODE itself; their noise, labels and guidance; what a killed or a shared run leaves; refusals."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from fastgen import noise
from fastgen.data.shards import PairShards, read_manifest
from fastgen.denoiser import Denoiser
from fastgen.errors import Stopped, UserError
from fastgen.paths import VP, Pair, Prediction
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.pairs import PairsConfig, draw_labels, make_pairs
from tests.data.pair_sets import hashes
from tests.trainers.truth import end_points, mixture

CLASSES = [0, 1, 1]  # of the three components
FEW = PairsConfig(num=12, steps=2, per_shard=4, batch=4)


def made(teacher, config, folder, **options):
    make_pairs(teacher, config, folder, **{"seed": 3, **options})
    data = PairShards(folder)
    return data, data.get(torch.arange(len(data)))


# Twice the largest error found; Heun's falls fourfold, Euler's twofold when the steps double.
@pytest.mark.parametrize(
    ("solver", "steps", "atol"),
    [("heun", 50, 4e-3), ("heun", 100, 1.2e-3), ("euler", 500, 1e-2), ("dpm++", 100, 4e-3), ("unipc", 100, 2e-3)],
)
@pytest.mark.filterwarnings("ignore:__array__")  # diffusers' schedulers under numpy 2
def test_end_points_are_those_of_the_exact_ode(solver, steps, atol, tmp_path):
    config = PairsConfig(num=48, solver=solver, steps=steps, per_shard=16, batch=16)
    _, pairs = made(Teacher(mixture()), config, tmp_path)
    error = float((pairs["x0"] - end_points(pairs["eps"], [0, 1, 2])).abs().max())
    assert atol / 4 < error < atol  # the lower bound tells the solvers apart


def test_noise_is_made_again_from_the_rows(tmp_path):
    config = PairsConfig(num=10, steps=2, per_shard=4, batch=3)
    _, pairs = made(Teacher(mixture()), config, tmp_path, seed=3, tag="second round")
    assert pairs["row"].tolist() == list(range(10))
    assert torch.equal(pairs["eps"], noise.normal(3, "second round", torch.arange(10), (2,)))
    teacher = Teacher(mixture())
    x = pairs["eps"]  # Heun with two steps, by hand
    for t, following in ((1.0, 0.5), (0.5, 0.0)):
        v = teacher(x, torch.full((10,), t)).velocity
        ahead = x + (following - t) * v
        if following:
            ahead = x + (following - t) * (v + teacher(ahead, torch.full((10,), following)).velocity) / 2
        x = ahead
    torch.testing.assert_close(pairs["x0"], x, atol=1e-6, rtol=1e-6)


def test_each_class_and_the_null_label_go_to_their_own_end_points(tmp_path):
    config = PairsConfig(num=60, steps=100, null_share=0.3, per_shard=60, batch=60)
    _, pairs = made(Teacher(mixture(CLASSES)), config, tmp_path)
    for label, components in ((0, [0]), (1, [1, 2]), (2, [0, 1, 2])):
        here = pairs["label"] == label
        assert here.sum() >= 5
        expected = end_points(pairs["eps"][here], components)
        torch.testing.assert_close(pairs["x0"][here].double(), expected, atol=6e-4, rtol=0)


def test_guidance_of_the_config_is_applied_and_told(tmp_path):
    config = PairsConfig(num=24, steps=200, guidance=1.7, null_share=0.2, per_shard=24, batch=24)
    data, pairs = made(Teacher(mixture(CLASSES)), config, tmp_path)
    assert data.manifest.guidance == 1.7
    for label, components in ((0, [0]), (1, [1, 2]), (2, [0, 1, 2])):
        here = pairs["label"] == label
        expected = end_points(pairs["eps"][here], components, guidance=1.7)
        torch.testing.assert_close(pairs["x0"][here].double(), expected, atol=6e-4, rtol=0)
        plain = end_points(pairs["eps"][here], components)
        assert label == 2 or (pairs["x0"][here] - plain).abs().max() > 0.1, "guidance changed nothing"


def test_the_teachers_own_guidance_holds_where_the_config_says_nothing(tmp_path):
    one, pairs = made(Teacher(mixture(CLASSES), guidance=1.7), FEW, tmp_path / "own")
    other, same = made(Teacher(mixture(CLASSES)), FEW.model_copy(update={"guidance": 1.7}), tmp_path / "told")
    assert torch.equal(pairs["x0"], same["x0"])
    assert one.manifest == other.manifest and one.manifest.guidance == 1.7


@pytest.mark.parametrize("null_share", [0.0, 0.1, 1.0])
def test_labels_are_uniform_and_dropped_as_often_as_asked(null_share):
    n, teacher = 20_000, Teacher(mixture([0, 1, 2]))
    label = draw_labels(teacher, torch.arange(n), 3, "pairs", null_share)["label"]
    dropped = int((label == 3).sum())
    assert abs(dropped - null_share * n) <= 4 * (n * null_share * (1 - null_share)) ** 0.5
    kept = torch.bincount(label, minlength=4)[:3]
    assert null_share == 1 or chisquare(kept.numpy()).pvalue > 1e-3
    # A row's label is its own, whichever rows come with it.
    assert torch.equal(draw_labels(teacher, torch.arange(7, 20), 3, "pairs", null_share)["label"], label[7:20])


def test_labels_drops_and_noise_are_independent():
    n, teacher = 20_000, Teacher(mixture([0, 1, 2]))
    rows = torch.arange(n)
    kept = draw_labels(teacher, rows, 3, "pairs", 0.0)["label"]
    dropped = draw_labels(teacher, rows, 3, "pairs", 0.3)["label"] == 3
    eps = noise.normal(3, "pairs", rows, (2,))
    columns = torch.stack([kept.float(), dropped.float(), *eps.T])
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 4 / n**0.5


def test_unconditional_teacher_has_no_labels(tmp_path):
    data, pairs = made(Teacher(mixture()), FEW, tmp_path)
    assert set(pairs) == {"x0", "eps", "row"}
    assert data.manifest.model_extra["null_share"] is None


def test_teacher_without_a_null_label_keeps_every_label_and_says_so(tmp_path):
    network = mlp.build(mlp.MLPConfig(width=16, depth=1), (2,), 3)
    network.null_label = False
    data, pairs = made(Teacher(network), FEW.model_copy(update={"null_share": 1.0}), tmp_path)
    assert pairs["label"].max() <= 2 and data.manifest.model_extra["null_share"] is None


@pytest.mark.parametrize("labels", [None, "no null"])
def test_guidance_without_a_null_condition_is_refused(labels, tmp_path):
    network = mixture() if labels is None else mlp.build(mlp.MLPConfig(width=16, depth=1), (2,), 3)
    network.null_label = labels is None
    with pytest.raises(UserError, match=r"pairs.guidance=2.0 has no effect"):
        make_pairs(Teacher(network), PairsConfig(guidance=2.0), tmp_path / "set", seed=0)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "bad", [{"num": 0}, {"steps": 0}, {"per_shard": 0}, {"batch": 0}, {"null_share": 1.1}, {"limit": 0.0}]
)
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PairsConfig(**bad)


def test_interrupted_and_resumed_is_the_uninterrupted_set(tmp_path):
    teacher, config = Teacher(mixture(CLASSES)), PairsConfig(num=22, steps=2, per_shard=4, batch=3)
    make_pairs(teacher, config, tmp_path / "whole", seed=3)
    told, asked = [], []

    def interrupt() -> bool:
        asked.append(1)
        return len(asked) % 3 == 0

    for _ in range(2):
        with pytest.raises(Stopped, match=r"2 of \d missing shards made"):
            make_pairs(
                teacher, config, tmp_path / "cut", seed=3, interrupt=interrupt, advance=lambda *at: told.append(at)
            )
    make_pairs(teacher, config, tmp_path / "cut", seed=3, advance=lambda *at: told.append(at))
    assert told == [(0, 6), (1, 6), (2, 6), (0, 4), (1, 4), (2, 4), (0, 2), (1, 2), (2, 2)]
    assert len(hashes(tmp_path / "cut")) == 6
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    before = hashes(tmp_path / "whole")
    make_pairs(teacher, config, tmp_path / "whole", seed=3, advance=lambda *at: told.append(at))
    assert told[-1] == (0, 0) and hashes(tmp_path / "whole") == before


def test_three_workers_make_what_one_makes(tmp_path):
    teacher, config = Teacher(mixture(CLASSES)), PairsConfig(num=22, steps=2, per_shard=4, batch=3)
    make_pairs(teacher, config, tmp_path / "one", seed=3)
    there: set[str] = set()
    for worker in (2, 0, 1):
        make_pairs(teacher, config, tmp_path / "three", seed=3, worker=worker, workers=3)
        there |= {f"shard-{i:06d}.safetensors" for i in range(worker, 6, 3)}
        assert hashes(tmp_path / "three").keys() == there
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    assert PairShards(tmp_path / "three").sha256 == PairShards(tmp_path / "one").sha256


class Broken(Denoiser):
    """The mixture, but for rows whose first noise is known: they become NaN, infinite, or too large."""

    family = "broken"

    def __init__(self, values: dict[float, float]) -> None:
        truth = mixture()
        super().__init__(None, truth.path, Prediction(kind="flow"), shape=(2,))
        self.truth, self.values = truth, values

    def forward(self, x, t, cond=None, *, on=None, r=None):
        pair = self.truth(x, t, cond, on=on)
        x0 = pair.x0.clone()
        for first, value in self.values.items():
            x0[:, 0] = torch.where(x[:, 0] == first, value, x0[:, 0])
        return Pair(x0, pair.eps)


def test_rows_that_are_not_finite_or_too_large_are_left_out(tmp_path):
    eps = noise.normal(3, "pairs", torch.arange(12), (2,))
    values = {float(eps[1, 0]): float("nan"), float(eps[6, 0]): float("inf"), float(eps[7, 0]): 21.0}
    config = FEW.model_copy(update={"steps": 1})
    data, pairs = made(Teacher(Broken(values)), config, tmp_path / "broken")
    assert data.rejected == [1, 6, 7]
    assert pairs["row"].tolist() == [0, 2, 3, 4, 5, 8, 9, 10, 11]
    assert pairs["x0"].isfinite().all()
    _, whole = made(Teacher(mixture()), config, tmp_path / "whole")
    assert torch.equal(pairs["x0"], whole["x0"][pairs["row"]]), "a bad row spoilt its neighbours"
    assert torch.equal(pairs["eps"], eps[pairs["row"]])


def test_runs_of_a_vp_teacher_begin_on_noise_of_unit_variance(tmp_path):
    """One DDIM step from index 999: x0 = (z - sigma eps(z)) / alpha with z itself, not sigma z."""
    torch.manual_seed(0)
    network = mlp.build(mlp.MLPConfig(path="VP", prediction="eps", width=16, depth=1), (2,), None)
    torch.nn.init.normal_(network.net.outer.weight, std=0.3)
    config = PairsConfig(num=8, solver="euler", steps=1, per_shard=8, batch=8, limit=100)
    data, pairs = made(Teacher(network), config, tmp_path)
    alpha, sigma = (level[-1] for level in VP().table())
    with torch.no_grad():
        eps = network.raw(pairs["eps"], torch.full((8,), 999 * network.time_scale), None, None)
    torch.testing.assert_close(pairs["x0"], ((pairs["eps"] - sigma * eps) / alpha).float(), atol=1e-4, rtol=1e-4)
    assert read_manifest(data.folder).path["name"] == "VP"


def test_another_teacher_or_setting_cannot_write_into_the_set(tmp_path):
    make_pairs(Teacher(mixture(), sha256="a" * 64), FEW, tmp_path, seed=3)
    with pytest.raises(UserError, match="teacher="):
        make_pairs(Teacher(mixture(), sha256="b" * 64), FEW, tmp_path, seed=3)
    with pytest.raises(UserError, match="solver="):
        changed = FEW.model_copy(update={"solver": "euler"})
        make_pairs(Teacher(mixture(), sha256="a" * 64), changed, tmp_path, seed=3)
