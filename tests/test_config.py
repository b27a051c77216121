"""Configs: every way to mistype one ends in one line that names the key; what is right survives unchanged."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from fastgen.config import Model, config_hash, dump_yaml, override, plain, read_yaml, validate
from fastgen.errors import UserError, suggestion


class Optim(Model):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Reflow(Model):
    name: Literal["reflow"] = "reflow"
    bandwidth: float = 0.25


class MeanFlow(Model):
    name: Literal["meanflow"] = "meanflow"
    ratio: float = 0.75
    optim: Optim = Optim()


class Stage(Model):
    name: str
    steps: int = Field(default=100, ge=1)
    method: Annotated[Reflow | MeanFlow, Field(discriminator="name")] = Reflow()


class Run(Model):
    out: str = "out"
    seed: int = 0
    ema: float | None = None
    resume: bool = False
    batch: int | list[int] = 64
    loop: Optim = Optim()
    stages: tuple[Stage, ...] = ()
    named: dict[str, Optim] = Field(default={})

    @field_validator("seed")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 0:
            raise ValueError("Seeds are not negative")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Run:
        if self.resume and self.out == "nowhere":
            raise ValueError("nothing to resume")
        return self


STAGES = [{"name": "pairs", "steps": 5}, {"name": "reflow", "steps": 7, "method": {"name": "meanflow"}}]


def message(tree: Any) -> str:
    with pytest.raises(UserError) as caught:
        validate(Run, tree, "run.yaml")
    text = str(caught.value)
    assert text.startswith("run.yaml: ") and "\n" not in text
    return text.removeprefix("run.yaml: ")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"sed": 1}, "unknown key 'sed' (did you mean 'seed'?)"),
        ({"loop": {"lrr": 1}}, "unknown key 'loop.lrr' (did you mean 'lr'?)"),
        (
            {"stages": [{"name": "a"}, {"name": "b", "stepps": 3}]},
            "unknown key 'stages.1.stepps' (did you mean 'steps'?)",
        ),
        ({"named": {"fast": {"beta": 1}}}, "unknown key 'named.fast.beta' (did you mean 'betas'?)"),
        ({"zzz": 1}, "unknown key 'zzz' (known: batch, ema, loop, named, out, resume, seed, stages)"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tree: dict, expected: str) -> None:
    assert message(tree) == expected


def test_a_key_inside_a_union_is_told_as_written_with_the_keys_of_its_own_member() -> None:
    """pydantic's location holds the member's tag; the fields of the first member would be the wrong advice."""
    method = {"name": "meanflow", "ratoi": 1}
    expected = "unknown key 'stages.0.method.ratoi' (did you mean 'ratio'?)"
    assert message({"stages": [{"name": "a", "method": method}]}) == expected
    method = {"name": "meanflow", "optim": {"beta": 1}}
    assert "unknown key 'stages.0.method.optim.beta' (did you mean 'betas'?)" in message(
        {"stages": [{"name": "a", "method": method}]}
    )
    assert message({"stages": [{"name": "a", "method": {"name": "reflow", "ratio": 1}}]}).endswith(
        "'stages.0.method.ratio' (known: bandwidth, name)"
    )


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"loop": {"lr": "fast"}}, ["'loop.lr': input should be a valid number", "got 'fast'"]),
        ({"seed": 1.5}, ["'seed'", "fractional part", "got 1.5"]),
        ({"seed": "1e3"}, ["'seed'", "got '1e3'"]),
        ({"seed": -1}, ["'seed': seeds are not negative, got -1"]),
        ({"loop": 3}, ["'loop'", "got 3"]),
        ({"loop": {"betas": [0.9]}}, ["'loop.betas.1' is missing"]),
        ({"batch": "many"}, ["'batch'", "got 'many'"]),
        ({"batch": [1, "x"]}, ["'batch", "got"]),
        ({"resume": "maybe"}, ["'resume'", "got 'maybe'"]),
        ({"stages": [{"steps": 3}]}, ["'stages.0.name' is missing and has no default"]),
        ({"stages": [{"name": "a", "steps": 0}]}, ["'stages.0.steps'", "greater than or equal to 1", "got 0"]),
        ({"stages": [{"name": "a", "method": {"name": "reflw"}}]}, ["'stages.0.method'", "'reflow'", "'meanflow'"]),
        ({"stages": [{"name": "a", "method": {}}]}, ["'stages.0.method'", "'name'"]),
        ({"ema": float("nan")}, ["'ema'", "finite"]),
        ({"ema": float("inf")}, ["'ema'", "finite"]),
        ({"out": ["x" * 200]}, ["'out'", "..."]),
        ({"resume": True, "out": "nowhere"}, ["nothing to resume"]),
        ([], ["valid dictionary", "got []"]),
        (None, ["got None"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key(tree: Any, parts: list[str]) -> None:
    text = message(tree)
    assert all(part in text for part in parts), text
    assert "''" not in text and len(text) < 250


def test_a_mistake_of_the_whole_model_names_no_empty_key() -> None:
    assert message({"resume": True, "out": "nowhere"}).startswith("nothing to resume")


def test_yaml_floats_of_both_spellings_are_numbers(tmp_path: FilePath) -> None:
    """YAML 1.1 reads 1e-4 as a text and 1.0e-4 as a number."""
    for text in ("1e-4", "1.0e-4", "0.0001", "'1e-4'"):
        (tmp_path / "run.yaml").write_text(f"loop: {{lr: {text}}}")
        assert validate(Run, read_yaml(tmp_path / "run.yaml"), "run.yaml").loop.lr == 1e-4
        assert validate(Run, override({}, [f"loop.lr={text}"]), "run.yaml").loop.lr == 1e-4


def test_configs_are_frozen_and_finite() -> None:
    run = Run()
    with pytest.raises(ValidationError):
        run.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Optim(lr=float("nan"))


# --- overrides


def test_overrides_reach_every_depth() -> None:
    tree = {"loop": {"lr": 1}, "stages": copy.deepcopy(STAGES), "ema": None}
    before = copy.deepcopy(tree)
    found = override(
        tree,
        [
            "seed=3",
            "loop.lr=1e-4",
            "loop.betas=[0.5, 0.9]",
            "stages.reflow.steps=9",
            "stages.reflow.method.ratio=0.5",
            "stages.pairs.method.name=meanflow",
            "named.fast.lr=2",
            "out=a=b",
        ],
    )
    assert tree == before  # a copy
    run = validate(Run, found, "run")
    assert (run.seed, run.loop.lr, run.loop.betas, run.out) == (3, 1e-4, (0.5, 0.9), "a=b")
    assert [(s.name, s.steps) for s in run.stages] == [("pairs", 5), ("reflow", 9)]
    assert run.stages[1].method.ratio == 0.5 and run.stages[0].method.name == "meanflow"
    assert run.named["fast"].lr == 2


def test_an_override_may_replace_a_whole_element_or_nothing() -> None:
    found = override({"stages": copy.deepcopy(STAGES)}, ["stages.pairs={name: pairs, steps: 1}", "out=", "ema=null"])
    assert found["stages"] == [{"name": "pairs", "steps": 1}, STAGES[1]]
    assert found["out"] is None and found["ema"] is None
    assert override({"ema": None}, ["ema.x=1"]) == {"ema": {"x": 1}}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed", "'seed': an override has the form key=value"),
        ("=3", "'=3': an override has the form key=value"),
        ("out=[1", "'out=[1': the value is not YAML"),
        ("out=!!python/object/apply:os.system [ls]", "the value is not YAML"),
        ("seed.low=3", "'seed.low': 'seed' is a value, it has no keys below it"),
        ("stages.reflw.steps=3", "'stages.reflw.steps': nothing here is named 'reflw' (did you mean 'reflow'?)"),
        ("stages.other=3", "'stages.other': nothing here is named 'other' (known: pairs, reflow)"),
        ("stages.reflow.steps.x=3", "'stages.reflow.steps.x': 'steps' is a value"),
        ("stages.0.steps=3", "nothing here is named '0'"),
    ],
)
def test_impossible_overrides_are_told_in_one_line(assignment: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        override({"seed": 1, "stages": copy.deepcopy(STAGES)}, [assignment])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistyped_override_is_found_by_the_model() -> None:
    with pytest.raises(UserError, match=r"unknown key 'loop\.lrr'"):
        validate(Run, override({}, ["loop.lrr=3"]), "run")


# --- files


def test_malformed_files_are_told_in_one_line(tmp_path: FilePath) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(UserError, match=r"run\.yaml: no such file"):
        read_yaml(file)
    with pytest.raises(UserError, match="not readable as YAML"):
        read_yaml(tmp_path)
    for content in (b"a: [1", b"a: b: c", b"\xff\xfe\xff", b"x: !!python/name:os.system"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not readable as YAML") as caught:
            read_yaml(file)
        assert "\n" not in str(caught.value)
    for content in ("", "- 1", "text", "3"):
        file.write_text(content)
        with pytest.raises(UserError, match="a config is a mapping"):
            read_yaml(file)


def test_files_are_utf8_whatever_the_locale(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_bytes("out: résumé".encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert read_yaml(tmp_path / "run.yaml") == {"out": "résumé"}


def test_a_date_in_a_file_stays_a_text_through_an_override(tmp_path: FilePath) -> None:
    (tmp_path / "run.yaml").write_text("out: 2024-01-31")
    assert validate(Run, override(read_yaml(tmp_path / "run.yaml"), ["seed=1"]), "run").out == "2024-01-31"


def test_a_config_survives_its_own_yaml(tmp_path: FilePath) -> None:
    run = validate(Run, {"loop": {"lr": 1e-5}, "stages": STAGES, "out": "1e-4", "ema": 0.1 + 0.2}, "run")
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    again = validate(Run, read_yaml(tmp_path / "run.yaml"), "run")
    assert again == run and config_hash(again) == config_hash(run)
    assert validate(Run, plain(run), "run") == run
    assert [line.split(":")[0] for line in dump_yaml(run).splitlines()][:2] == ["out", "seed"]


def test_hashes_depend_on_contents_alone() -> None:
    run = Run(seed=3)
    assert config_hash(run) == config_hash(plain(run)) == config_hash(dict(reversed(plain(run).items())))
    assert config_hash(run) == config_hash(validate(Run, {"seed": 3, "loop": {"lr": "1e-3"}}, "run"))
    assert len({config_hash(Run(seed=seed)) for seed in range(10)}) == 10
    assert config_hash({"a": 1}) == "f9d86028c6e0d64e"  # in files since the first version: never change it
    assert config_hash(Run(loop=Optim(betas=(0.9, 0.99)))) != config_hash(Run())


def test_suggestions() -> None:
    assert suggestion("refow", ["reflow", "sim"]) == "did you mean 'reflow'?"
    assert suggestion("xyz", ["b", "a"]) == "known: a, b"
    assert suggestion("xyz", []) == "known: none"
