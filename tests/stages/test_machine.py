"""The stage machine on stages without mathematics: what is done, skipped, resumed, refused, repeated and recorded."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from fastgen import files
from fastgen.config import config_hash
from fastgen.errors import RunFailed, Stopped, UserError
from fastgen.stages import machine, records
from fastgen.stages.config import Run, Stage
from fastgen.stages.context import Context
from fastgen.stages.machine import execute


class Note(Stage):
    """Writes its text and the texts it reads; `log` tells which stages worked."""

    stage: str = "note"
    text: str = "a"
    tone: str = "calm"
    init: str | None = None
    teacher: str | None = None

    incidental = frozenset({"tone"})

    def work(self, run, folder):
        LOG.append(self.name)
        if self.text == "fail":
            raise FAILURE[0]
        read = [run.artefact(reference) for reference in self.inputs().values()]
        told = [path if isinstance(path, dict) else (path / "text").read_text() for path in read]
        files.make_folder(folder / "made")
        files.write_atomic(folder / "made" / "text", f"{self.text}{told}")
        return {"output": "made", "length": len(self.text)}


LOG: list[str] = []
FAILURE: list[Exception] = []
CHAIN = [{"name": "one"}, {"name": "two", "init": "one"}, {"name": "three", "init": "two"}]


@pytest.fixture(autouse=True)
def fresh():
    LOG.clear()
    FAILURE.clear()


def go(out, stages=CHAIN, *, resume=False, start=None, interrupt=lambda: False, **head):
    stages = [Note(**{"stage": "note", **stage}) for stage in stages]
    run = Run(out=str(out), stages=[{}], **head)
    context = Context(run, out, "cpu", interrupt=interrupt)
    LOG.clear()
    execute(run, stages, context, resume=resume, start=start)
    return context


def changed(name, **values):
    return [{**stage, **values} if stage["name"] == name else stage for stage in CHAIN]


def refuse(*args, **options):
    with pytest.raises(UserError) as caught:
        go(*args, **options)
    return str(caught.value)


def test_record_names_config_settings_and_hashes_of_inputs_and_output(tmp_path):
    go(tmp_path / "run", seed=7)
    record = json.loads((tmp_path / "run" / "two" / "stage.json").read_text())
    one = files.sha256(tmp_path / "run" / "one" / "made")
    assert record["key"]["inputs"] == {"one": one} and record["key"]["run"] == {"seed": 7}
    assert record["key"]["config"]["text"] == "a"
    assert (record["name"], record["stage"], record["output"], record["length"]) == ("two", "note", "made", 1)
    assert record["sha256"] == files.sha256(tmp_path / "run" / "two" / "made") and record["seconds"] > 0


def test_resolved_config_is_written_and_is_a_config(tmp_path):
    go(tmp_path / "run", seed=3)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text)["seed"] == 3 and text.startswith("# ")


def test_finished_stages_are_skipped_and_keep_their_seconds(tmp_path):
    first = go(tmp_path / "run")
    assert LOG == ["one", "two", "three"]
    again = go(tmp_path / "run", resume=True)
    assert LOG == [] and again.seconds == first.seconds


def test_a_run_goes_on_where_it_failed(tmp_path):
    FAILURE.append(RunFailed("no"))
    with pytest.raises(RunFailed):
        go(tmp_path / "run", changed("two", text="fail"))
    assert LOG == ["one", "two"]
    go(tmp_path / "run", resume=True, start="two")
    assert LOG == ["two", "three"]


def test_a_run_in_the_folder_is_refused_without_resume(tmp_path):
    go(tmp_path / "run")
    assert "--resume" in refuse(tmp_path / "run")


def test_another_config_is_refused_by_key_before_anything_is_touched(tmp_path):
    go(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    message = refuse(tmp_path / "run", changed("two", text="b"), resume=True, about="other")
    assert "two: finished with another text (a, now b)" in message and "--from two" in message
    assert LOG == [] and (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_another_setting_of_the_run_is_refused_where_it_matters(tmp_path):
    go(tmp_path / "run", seed=1)
    assert "finished with another seed (1, now 2)" in refuse(tmp_path / "run", resume=True, seed=2)
    go(tmp_path / "run", resume=True, seed=1, guidance=3.0)  # no Note reads it


def test_a_begun_stage_is_held_to_what_it_was_begun_with(tmp_path):
    FAILURE.append(RunFailed("no"))
    with pytest.raises(RunFailed):
        go(tmp_path / "run", changed("two", text="fail"))
    message = refuse(tmp_path / "run", changed("two", text="b"), resume=True)
    assert "two: begun with another text (fail, now b)" in message


def test_what_changes_nothing_may_change(tmp_path):
    go(tmp_path / "run")
    go(tmp_path / "run", changed("two", tone="loud"), resume=True)
    assert LOG == []


def test_changed_input_is_refused_naming_it(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "text").write_text("x")
    stages, head = changed("two", teacher="teacher"), {"teacher": str(tmp_path / "teacher")}
    go(tmp_path / "run", stages, **head)
    (tmp_path / "teacher" / "text").write_text("y")
    message = refuse(tmp_path / "run", stages, resume=True, **head)
    assert "two: finished with another content of 'teacher'" in message


def test_from_repeats_that_stage_and_the_later_ones_only(tmp_path):
    go(tmp_path / "run")
    (tmp_path / "run" / "two" / "leftover").write_text("")
    go(tmp_path / "run", changed("three", text="c"), start="two")
    assert LOG == ["two", "three"] and not (tmp_path / "run" / "two" / "leftover").exists()
    assert (tmp_path / "run" / "three" / "made" / "text").read_text().startswith("c")
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_refused_from_removes_nothing(tmp_path):
    go(tmp_path / "run")
    message = refuse(tmp_path / "run", changed("one", text="b"), start="three")
    assert "one: finished with another text" in message
    assert (tmp_path / "run" / "three" / "stage.json").exists()
    assert "did you mean 'three'" in refuse(tmp_path / "run", start="tree")
    assert "holds no run to repeat" in refuse(tmp_path / "empty", start="two")


def test_a_stage_is_removed_out_of_sight_first(tmp_path, monkeypatch):
    """Killed half-way through the removal, a stage must not look finished."""
    go(tmp_path / "run")

    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else killed())
        go(tmp_path / "run", start="two")
    assert not (tmp_path / "run" / "two").exists()
    go(tmp_path / "run", resume=True)
    assert LOG == ["two"]  # three read the same content as before


@pytest.mark.parametrize("start", [None, "two"])
def test_what_no_run_made_is_left_alone(tmp_path, start):
    (tmp_path / "run" / "two").mkdir(parents=True)
    (tmp_path / "run" / "two" / "mine").write_text("precious")
    if start:
        (tmp_path / "run" / "config.yaml").write_text(machine.CONFIG_HEAD)
    assert "two: something that no run of fastgen made" in refuse(tmp_path / "run", start=start)
    assert (tmp_path / "run" / "two" / "mine").read_text() == "precious" and LOG == []


def test_a_config_of_the_users_own_is_not_replaced(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    assert "config.yaml: not written by fastgen" in refuse(tmp_path, resume=True)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([{"name": "one", "init": "two"}, {"name": "two"}], "init=two is not made before this stage"),
        ([{"name": "one", "init": "one"}], "init=one is not made before this stage"),
        ([{"name": "one"}, {"name": "two", "init": "on"}], "'on': neither a stage of this run nor an existing path"),
        ([{"name": "one"}, {"name": "two", "init": ""}], "'': neither a stage"),
        ([{"name": "one"}, {"name": "two", "teacher": "teacher"}], "teacher is not set: add teacher=PATH"),
    ],
)
def test_references_are_held_to_the_order_before_anything_runs(tmp_path, stages, expected):
    assert expected in refuse(tmp_path / "run", stages)
    assert LOG == [] and not (tmp_path / "run").exists()


def test_a_missing_teacher_is_told_by_its_path(tmp_path):
    stages = [{"name": "one", "teacher": "teacher"}]
    assert "teacher=nowhere: no such file" in refuse(tmp_path / "run", stages, teacher="nowhere")


def test_checks_come_before_the_first_stage_and_only_for_what_is_not_done(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Note, "check", lambda self, run: asked.append((self.name, list(LOG))))
    go(tmp_path / "run")
    assert asked == [("one", []), ("two", []), ("three", [])]
    asked.clear()
    go(tmp_path / "run", start="three")
    assert asked == [("three", [])]


def test_a_users_mistake_in_the_first_stage_leaves_nothing(tmp_path):
    FAILURE.append(UserError("bad"))
    with pytest.raises(UserError, match="bad"):
        go(tmp_path / "run", changed("one", text="fail"))
    assert LOG == ["one"] and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="bad"):
        go(tmp_path / "run", changed("two", text="fail"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "one"]
    go(tmp_path / "run", resume=True)
    assert LOG == ["two", "three"]


def test_a_signal_between_stages_stops_there_and_is_resumable(tmp_path):
    with pytest.raises(Stopped, match="one is done, two not begun"):
        go(tmp_path / "run", interrupt=lambda: True)
    assert LOG == ["one"]
    go(tmp_path / "run", resume=True)
    assert LOG == ["two", "three"]


def test_a_signal_in_the_last_stage_lets_the_run_end(tmp_path):
    go(tmp_path / "run", interrupt=lambda: "three" in LOG)
    assert LOG == ["one", "two", "three"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        RunFailed("step-2: no space left on the device"),  # as files.py tells it; torch.save leaves no errno behind
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_an_exhausted_machine_says_what_was_saved(tmp_path, failure):
    FAILURE.append(failure)
    with pytest.raises(RunFailed) as caught:
        go(tmp_path / "run", changed("two", text="fail"))
    assert "stage two: " in str(caught.value) and "saved: the stages one" in str(caught.value)
    assert "no space left" in str(caught.value) or "out of memory" in str(caught.value)


def test_a_programming_error_is_not_dressed_up(tmp_path):
    FAILURE.append(ZeroDivisionError("mine"))
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "run", changed("two", text="fail"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"key": {}}'])
def test_a_damaged_record_is_told(tmp_path, text):
    go(tmp_path / "run")
    (tmp_path / "run" / "one" / "stage.json").write_text(text)
    assert "one/stage.json: " in refuse(tmp_path / "run", resume=True)


def test_many_workers_may_begin_one_stage(tmp_path, monkeypatch):
    """Each writes the record under a name of its own, so none finds it half written or gone."""
    context = go(tmp_path / "run", [{"name": "one"}])
    real, written = os.replace, []
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(old), real(old, new)))
    for _ in range(2):
        machine.begin(Note(stage="note", name="one"), context)
    assert len(set(written)) == len(written) >= 2
    assert not list((tmp_path / "run" / "one").glob(".tmp-*"))


def test_closed_form_teacher_is_hashed_by_its_description(tmp_path):
    context = go(tmp_path / "run", [{"name": "one", "teacher": "teacher"}], teacher={"family": "mixture"})
    assert context.sha256("teacher") == config_hash({"family": "mixture"})
    with pytest.raises(UserError, match="closed-form teacher, which has no weights"):
        context.path("teacher")


def test_an_unfinished_stage_is_no_input(tmp_path):
    context = go(tmp_path / "run")
    (tmp_path / "run" / "one" / "stage.json").unlink()
    with pytest.raises(UserError, match="stage 'one' is not done yet"):
        context.artefact("one")
