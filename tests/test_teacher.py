"""Guidance, frozenness, and the reading of model folders."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import cond as conditions
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import VP, Prediction, RectifiedFlow, TrigFlow
from fastgen.student import save_teacher
from fastgen.teacher import Teacher, families, family, read_denoiser
from fastgen.teachers.mixture import Mixture

T = torch.tensor([0.2, 0.5, 0.9])
X = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]])
LABEL = {"label": torch.tensor([0, 1, 0])}
NULL = {"label": torch.tensor([2, 2, 2])}


class Labelled(Denoiser):
    """A network with a weight, dropout and a label embedding; counts its calls and keeps the last batch's labels."""

    family = "labelled"

    def __init__(self, num_classes: int | None = 2) -> None:
        net = nn.ModuleDict({"label": nn.Embedding(3, 2), "linear": nn.Linear(2, 2), "dropout": nn.Dropout(0.5)})
        super().__init__(net, RectifiedFlow(), Prediction(kind="flow"), shape=(2,), num_classes=num_classes)
        self.calls = 0

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        self.calls += 1
        self.labels = None if cond is None else cond["label"].tolist()
        shift = 0 if cond is None else self.net["label"](cond["label"])
        return self.net["dropout"](self.net["linear"](x) * time[:, None] + shift)


@pytest.fixture
def network() -> Labelled:
    torch.manual_seed(0)
    return Labelled()


def test_guidance_is_the_formula_in_every_target(network: Labelled) -> None:
    teacher = Teacher(network)
    null, conditional = network(X, T, NULL), network(X, T, LABEL)
    for w in (2.5, -1.0, torch.tensor(2.5), torch.tensor([2.5, 0.0, 1.0])):
        found = teacher(X, T, LABEL, guidance=w)
        column = w[:, None] if isinstance(w, Tensor) and w.ndim else w
        for name in ("x0", "eps", "velocity"):
            unguided, wanted = getattr(null, name), getattr(conditional, name)
            assert torch.allclose(getattr(found, name), unguided + column * (wanted - unguided), atol=1e-6)


def test_guidance_one_and_none_cost_one_pass_and_zero_is_the_null(network: Labelled) -> None:
    teacher = Teacher(network)
    for w in (None, 1, 1.0):
        network.calls = 0
        assert torch.equal(teacher(X, T, LABEL, guidance=w).x0, network(X, T, LABEL).x0)
        assert network.calls == 2 and network.labels == [0, 1, 0]
    assert torch.allclose(teacher(X, T, LABEL, guidance=0.0).x0, network(X, T, NULL).x0, atol=1e-6)
    network.calls = 0
    teacher(X, T, LABEL, guidance=3.0)
    assert network.calls == 1 and network.labels == [2, 2, 2, 0, 1, 0]  # both halves in one batch


def test_a_default_guidance_holds_until_another_is_asked_for(network: Labelled) -> None:
    teacher = Teacher(network, guidance=4.0)
    assert torch.equal(teacher(X, T, LABEL).x0, teacher(X, T, LABEL, guidance=4.0).x0)
    assert torch.equal(teacher(X, T, LABEL, guidance=1).x0, network(X, T, LABEL).x0)
    assert not torch.allclose(teacher(X, T, LABEL).x0, network(X, T, LABEL).x0)
    assert torch.equal(teacher(X, T).x0, network(X, T).x0)  # no condition, nothing to guide towards


def test_views_of_a_teacher_pass_guidance_on(network: Labelled) -> None:
    teacher, angle = Teacher(network), torch.tensor([0.2, 0.9, 1.4])
    found = teacher.on(TrigFlow())(X, angle, LABEL, guidance=2.0)
    assert torch.equal(found.x0, teacher(X, angle, LABEL, guidance=2.0, on=TrigFlow()).x0)
    null, conditional = (network(X, angle, cond, on=TrigFlow()) for cond in (NULL, LABEL))
    assert torch.allclose(found.eps, 2 * conditional.eps - null.eps, atol=1e-6)


def test_wide_guidance_does_not_widen_the_pair(network: Labelled) -> None:
    assert Teacher(network)(X, T, LABEL, guidance=T.double()).x0.dtype == torch.float32


def test_a_teacher_is_frozen_whatever_its_owner_does(network: Labelled) -> None:
    teacher = Teacher(network)
    owner = nn.ModuleDict({"teacher": teacher, "student": nn.Dropout()})
    owner.train()
    assert owner["student"].training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(X, T, LABEL).x0, teacher(X, T, LABEL).x0)
    x = X.clone().requires_grad_()
    teacher(x, T, LABEL, guidance=2.0).x0.sum().backward()  # but not cut off: methods differentiate in x and t
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_guidance_without_a_null_condition_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance=3\.0"):
        Teacher(Labelled(num_classes=None), guidance=3.0)
    with pytest.raises(UserError, match="guidance"):
        Teacher(Labelled(num_classes=None))(X, T, LABEL, guidance=3.0)


def test_guidance_on_a_mixture_is_the_tilted_score() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    mixture = Mixture(
        torch.ones(2), torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.stack([eye, 0.5 * eye]), torch.arange(2)
    )
    t, x = T.double(), X.double().requires_grad_()
    log = [mixture.log_prob(x, t, cond).sum() for cond in (NULL, LABEL)]
    null, conditional = (torch.autograd.grad(value, x)[0] for value in log)
    found = Teacher(mixture)(x.detach(), t, LABEL, guidance=2.5).eps
    assert torch.allclose(found, -t[:, None] * (null + 2.5 * (conditional - null)), atol=1e-12)


def test_conditions_are_trees_of_tensors() -> None:
    text = torch.arange(12.0).reshape(2, 3, 2)
    cond = {"label": torch.tensor([0, 1]), "text": text}
    both = conditions.concat(conditions.select(cond, slice(1, 2)), cond)
    assert both["label"].tolist() == [1, 0, 1] and torch.equal(both["text"][1:], text)
    assert conditions.repeat(conditions.select(cond, torch.tensor([1])), 3)["text"].shape == (3, 3, 2)
    assert conditions.to(cond, "meta")["text"].device.type == "meta"
    assert conditions.concat(None, None) is conditions.select(None, slice(0)) is conditions.repeat(None, 2) is None
    for other in (None, {"label": torch.tensor([0])}):
        with pytest.raises(ValueError, match="conditions differ"):
            conditions.concat(cond, other)


# --- folders


@pytest.fixture
def folder(tmp_path: FilePath) -> FilePath:
    mixture = Mixture(torch.ones(2), torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.eye(2).expand(2, 2, 2))
    save_teacher(mixture, tmp_path / "teacher", {"license": "mit"})
    return tmp_path / "teacher"


def test_a_teacher_folder_is_read_back(folder: FilePath) -> None:
    denoiser, data = read_denoiser(folder)
    assert isinstance(denoiser, Mixture) and data["kind"] == "teacher" and data["facts"] == {"license": "mit"}
    assert denoiser.means.tolist() == [[2, 0], [-2, 0]]


def test_a_folder_whose_replacement_was_interrupted_is_put_back(folder: FilePath) -> None:
    folder.rename(folder.with_name(".tmp-old-teacher"))
    assert isinstance(read_denoiser(folder)[0], Mixture)
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "COMPLETE").unlink(), "not complete"),
        (lambda f: (f / "mixture.json").unlink(), r"mixture\.json: no such file"),
        (lambda f: (f / "fastgen.json").write_text("{"), r"fastgen\.json: not readable"),
        (lambda f: (f / "fastgen.json").write_text("[]"), "not written by fastgen"),
        (lambda f: (f / "fastgen.json").write_text("{}"), "not written by fastgen"),
        (lambda f: change(f, format=99), r"format 99.*upgrade"),
        (lambda f: change(f, denoiser={}), r"fastgen\.json: damaged"),
        (lambda f: change(f, denoiser=[]), r"fastgen\.json: damaged"),
        (lambda f: change(f, denoiser={"family": "mixtur"}), "did you mean 'mixture'"),
        (lambda f: (f / "fastgen.json").rename(f / "mixture2.json") and (f / "mixture.json").unlink(), "any family"),
    ],
)
def test_damaged_folders_are_told_in_one_line(folder: FilePath, damage: Any, message: str) -> None:
    read_denoiser(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_denoiser(folder)
    assert str(folder) in str(caught.value) or "mixtur" in str(caught.value)
    assert "\n" not in str(caught.value)


def change(folder: FilePath, **entries: Any) -> None:
    data = json.loads((folder / "fastgen.json").read_text())
    (folder / "fastgen.json").write_text(json.dumps(data | entries))


def test_wrong_places_are_told_in_one_line(folder: FilePath, tmp_path: FilePath) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_denoiser(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a file, and no \.safetensors"):
        read_denoiser(folder / "fastgen.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a checkpoint that any family knows"):
        read_denoiser(tmp_path / "empty")


def test_families_are_found_by_file_name() -> None:
    assert "mixture" in families() and "__init__" not in families()
    assert family("mixture").Mixture is Mixture
    with pytest.raises(UserError, match="did you mean 'mixture'"):
        family("mixtures")


def test_a_damaged_convention_is_told_in_one_line(tmp_path: FilePath) -> None:
    """Every entry that a description needs, missing or of a wrong kind."""
    from fastgen.teachers.mlp import MLPConfig, build

    place = tmp_path / "mlp"
    save_teacher(build(MLPConfig(width=8, depth=1, path="VP"), (2,), None), place, {})
    good = json.loads((place / "fastgen.json").read_text())["denoiser"]
    assert read_denoiser(place)[0].path == VP()
    for key in good:
        for entry in ({k: v for k, v in good.items() if k != key}, good | {key: {"name": "?"}}):
            change(place, denoiser=entry)
            with pytest.raises(UserError) as caught:
                read_denoiser(place)
            assert "\n" not in str(caught.value)
