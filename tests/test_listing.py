"""What `fastgen list` finds is what there is, and configs are found by file, by name and by method."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import yaml

import fastgen.trainers
from fastgen.errors import UserError
from fastgen.listing import WHAT, config_names, find_config, listing
from fastgen.samplers.ode import SOLVERS
from fastgen.stages.config import load_run
from fastgen.teacher import families
from fastgen.trainers.engine.method import find_method, methods


def names(what):
    return [row["name"] for row in listing(what)]


def test_methods_are_the_files_of_trainers():
    assert names("methods") == methods()
    modules = {module.name for module in pkgutil.iter_modules(fastgen.trainers.__path__) if not module.ispkg}
    assert set(methods()) == modules - {"pairs"}
    for row in listing("methods"):
        method = find_method(row["name"])
        assert row["makes"] == method.makes
        good = "stands" if method.makes == "student" else "trains a teacher"
        assert row["status"] == (f"experimental: {method.experimental}" if method.experimental else good)


def test_teachers_and_samplers_are_those_the_program_knows():
    assert names("teachers") == families()
    assert {row["name"]: row["about"] for row in listing("samplers")} == SOLVERS


def test_every_row_says_what_it_is():
    for what in WHAT:
        rows = listing(what)
        assert rows, what
        for row in rows:
            assert row["about"] and "\n" not in row["about"], (what, row)


def test_an_unknown_list_is_told():
    with pytest.raises(UserError, match="did you mean 'teachers'"):
        listing("teacher")


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in listing("configs")}


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_valid_and_say_what_they_are(name, rows):
    path = config_names()[name]
    head = yaml.safe_load(path.read_text())
    assert path == find_config(name) and path.is_file()
    assert len(head["about"].split()) >= 15 and head["out"].startswith("runs/")
    assert head["status"].startswith(("measured (", "smoke", "published settings, not run here"))
    _, stages = load_run(path, ["teacher=PATH"])
    _, small = load_run(path, [], smoke=True)
    assert stages and {stage.name for stage in stages} <= {stage.name for stage in small}
    row = rows[name]
    assert row["status"] == head["status"] and row["about"] in " ".join(head["about"].split())


def test_a_method_is_its_default_config():
    for method in methods():
        assert find_config(method) == config_names()[f"{method}/default"]
        _, stages = load_run(find_config(method), ["teacher=PATH"])
        assert method in {stage.method.name for stage in stages if stage.stage == "train"}


def test_files_are_found_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text("a: 1")
    assert find_config("mine.yml").read_text() == "a: 1"
    for name, expected in (
        ("other.yaml", "other.yaml: no such file"),
        ("reflo", "did you mean 'reflow'"),
        ("reflow/mixtur", "did you mean 'reflow/mixture'"),
        ("zzz", "known: consistency, consistency/"),
    ):
        with pytest.raises(UserError, match=expected):
            find_config(name)


def test_listing_reads_no_module_it_lists(monkeypatch):
    """Some of them need torch, which takes seconds."""
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    for what in WHAT:
        assert listing(what)
