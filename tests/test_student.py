"""Sampler specs and student folders: nothing is lost, nothing half-read."""

from __future__ import annotations

import json
import math
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
import yaml

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.files import is_complete
from fastgen.paths import EDM, VP, RectifiedFlow, TrigFlow
from fastgen.student import SamplerSpec, Student, card, save_teacher
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture

SPEC = SamplerSpec(path=RectifiedFlow(), times={1: (1.0,), 2: (1.0, 0.6), 4: (0.9, 0.7, 0.5, 0.1)}, renoise=True)
FACTS = {"method": "reflow", "license": "mit", "metrics": {"fd": 2.5}, "guidance": None}


def mixture() -> Mixture:
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.7, 0.0], [0.0, 0.1]]], dtype=torch.float64)
    return Mixture(torch.tensor([0.1, 0.9]), torch.tensor([[0.1, 0.3], [-0.7, 1 / 3]]), covs, torch.arange(2))


def small_mlp() -> Denoiser:
    torch.manual_seed(0)
    model = mlp.build(mlp.MLPConfig(width=8, depth=1, path="TrigFlow"), (2,), 3)
    return shaken(model)


def shaken(model: Denoiser) -> Denoiser:
    """Fresh networks answer zero: every weight is moved, so that each one must come back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


MAKERS = {"mixture": mixture, "mlp": small_mlp}  # the other families' own tests save and load theirs


@pytest.mark.parametrize("name", MAKERS)
def test_a_student_folder_gives_the_same_student(name: str, tmp_path: FilePath) -> None:
    student = Student(MAKERS[name](), SPEC, FACTS)
    student.save(tmp_path / "student")
    again = Student.load(tmp_path / "student")
    assert again.sampler == SPEC and again.facts == FACTS
    assert again.denoiser.describe() == student.denoiser.describe()
    state = student.denoiser.state_dict()
    assert again.denoiser.state_dict().keys() == state.keys()
    x = torch.randn(3, *student.denoiser.shape, generator=torch.Generator().manual_seed(1))
    t, cond = torch.tensor([0.1, 0.5, 1.0]), None
    if student.denoiser.num_classes:
        cond = {"label": torch.tensor([0, 1, student.denoiser.num_classes])}
    again.denoiser.eval()
    assert torch.equal(again.denoiser(x, t, cond, on=TrigFlow()).x0, student.denoiser(x, t, cond, on=TrigFlow()).x0)


def test_saving_again_replaces_and_a_failure_leaves_the_old_one(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "deep" / "student"
    Student(mixture(), SPEC, {"method": "one"}).save(place)
    Student(mixture(), SPEC, {"method": "two"}).save(place)
    assert Student.load(place).facts == {"method": "two"}
    with pytest.raises(ValueError, match="JSON compliant"):
        Student(mixture(), SPEC, {"loss": math.nan}).save(place)
    assert Student.load(place).facts == {"method": "two"}
    assert [path.name for path in place.parent.iterdir()] == ["student"]


def test_a_teacher_folder_is_not_a_student(tmp_path: FilePath) -> None:
    save_teacher(mixture(), tmp_path / "ours", {})
    (tmp_path / "bare").mkdir()
    mixture().write(tmp_path / "bare")
    for folder in ("ours", "bare"):
        with pytest.raises(UserError, match=r"a teacher, not a student.*load_teacher"):
            Student.load(tmp_path / folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"sampler": {}},
        {"sampler": None},
        {"sampler": {**SPEC.to_dict(), "times": {"1": [0.2, 0.4]}}},
        {"sampler": {**SPEC.to_dict(), "times": {"one": [0.2]}}},
        {"sampler": {**SPEC.to_dict(), "path": {"name": "Line"}}},
        {"sampler": {**SPEC.to_dict(), "order": 2}},
    ],
)
def test_a_damaged_sampler_is_told_in_one_line(damage: dict[str, Any], tmp_path: FilePath) -> None:
    Student(mixture(), SPEC, {}).save(tmp_path / "student")
    facts = tmp_path / "student" / "fastgen.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | damage))
    with pytest.raises(UserError, match=r"fastgen\.json: damaged") as caught:
        Student.load(tmp_path / "student")
    assert "\n" not in str(caught.value)


def test_an_incomplete_folder_is_refused(tmp_path: FilePath) -> None:
    Student(mixture(), SPEC, {}).save(tmp_path / "student")
    assert is_complete(tmp_path / "student")
    (tmp_path / "student" / "COMPLETE").unlink()
    with pytest.raises(UserError, match="not complete"):
        Student.load(tmp_path / "student")


def test_weights_that_do_not_fit_are_refused(tmp_path: FilePath) -> None:
    Student(small_mlp(), SPEC, {}).save(tmp_path / "student")
    weights = tmp_path / "student" / "net" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Student.load(tmp_path / "student")
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        Student.load(tmp_path / "student")


def test_a_spec_survives_json() -> None:
    specs = [
        SPEC,
        SamplerSpec(path=VP(zero_snr=True), times={2: (999.0, 499.0)}, init="unit"),
        SamplerSpec(path=EDM(), times={1: (80.0,)}, two_time=True),
        SamplerSpec(path=TrigFlow(sd=0.5), times={1: (math.pi / 2,), 2: (math.pi / 2, 1.1)}),
    ]
    for spec in specs:
        again = SamplerSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec and hash(again) == hash(spec)
        assert again.at(max(spec.times)) == spec.times[max(spec.times)]
    assert len({*specs}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": {}}, "at least one"),
        ({"times": {0: ()}}, "0 steps"),
        ({"times": {2: (1.0,)}}, "2 steps need 2 falling times"),
        ({"times": {2: (0.5, 0.7)}}, "falling"),
        ({"times": {2: (0.5, 0.5)}}, "falling"),
        ({"times": {2: (math.nan, 0.5)}}, "falling"),
        ({"times": {1: (math.nan,)}}, "leave the path"),
        ({"times": {1: (1.1,)}}, "leave the path"),
        ({"times": {1: (-0.1,)}}, "leave the path"),
        ({"times": {1: (999.0,)}}, r"leave the path, 1\.0 \.\. 0\.0"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**{"path": RectifiedFlow(), "times": {1: (1.0,)}} | change)


def test_step_counts_outside_the_list_name_those_inside() -> None:
    assert SPEC.at(2) == (1.0, 0.6)
    with pytest.raises(UserError, match=r"steps=3: this student was made for 1, 2, 4"):
        SPEC.at(3)


def test_the_card_tells_terms_and_origin_in_valid_markdown() -> None:
    facts = {"method": "reflow", "license": "other: see\nLICENSE", "base_model": "a/b", "note": "one | two\nthree"}
    text = card(Student(mixture(), SPEC, facts))
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "fastgen", "license": facts["license"], "base_model": "a/b"}
    assert r"| note | one \| two three |" in body.splitlines()
    assert "# A 1, 2, 4-step student by reflow" in body
    unlicensed = card(Student(mixture(), SPEC, {}))
    assert "the teacher's terms apply" in unlicensed and "license: other" in unlicensed


def test_what_a_network_is_told_besides_its_time_survives_the_folder(tmp_path):
    torch.manual_seed(0)
    denoiser = mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), 3)
    torch.nn.init.normal_(denoiser.net.modulation.weight)
    torch.nn.init.normal_(denoiser.net.outer.weight)
    x, t, cond = torch.randn(4, 2), torch.rand(4), {"label": torch.arange(4) % 3, "guidance": torch.rand(4) * 5}
    before = denoiser(x, t, cond).x0
    denoiser.add_gap()
    denoiser.add_guidance()
    assert torch.equal(denoiser(x, t, cond, r=t / 2).x0, before)  # nothing changes until it is trained
    for name in ("gap", "guidance"):
        torch.nn.init.normal_(denoiser.extra[name].outer.weight)
    spec = SamplerSpec(path=RectifiedFlow(), times={1: (1.0,)}, two_time=True, guidance=3.0)
    Student(denoiser, spec, {}).save(tmp_path / "s")
    loaded = Student.load(tmp_path / "s")
    assert loaded.denoiser.two_time and loaded.denoiser.takes_guidance and loaded.sampler == spec
    after = loaded.denoiser(x, t, cond, r=t / 2).x0
    assert torch.equal(after, denoiser(x, t, cond, r=t / 2).x0) and not torch.allclose(after, before)
    assert not torch.allclose(after, loaded.denoiser(x, t, cond).x0)
    assert not torch.allclose(after, loaded.denoiser(x, t, {"label": cond["label"]}, r=t / 2).x0)
