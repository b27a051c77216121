"""`fastgen bench`: rows one by one, reasons in place of figures, and one line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgen import bench as app
from fastgen.bench import Book, Options, bench, numbers, run, words
from fastgen.errors import RunFailed, UserError
from fastgen.eval.subject import Subject
from fastgen.student import Student, save_teacher
from fastgen.zoo import fresh
from fastgen.zoo.tiny import shrunk
from tests.commands import call
from tests.eval.models import pixel_denoiser, spec, text_denoiser, text_student

QUICK = ("--iterations", "2", "--warmup", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student of 8 x 8 pixels, and a teacher of 6 x 6."""
    folder = tmp_path_factory.mktemp("models")
    save_teacher(pixel_denoiser(), folder / "teacher", {})
    save_teacher(pixel_denoiser(6), folder / "small", {})
    Student(pixel_denoiser(), spec(1, 2), {"method": "reflow"}).save(folder / "student")
    return folder


@pytest.fixture
def text(monkeypatch):
    """Any path opens a text-to-image model: names that begin with "teacher" a teacher."""

    def load(path, device):
        return app.Teacher(text_denoiser()) if path.startswith("teacher") else text_student(1, 2)

    monkeypatch.setattr(app, "_load", load)


def options(**changes):
    return Options(**{"model": "student", "device": "cpu", "iterations": 2, "warmup": 1, **changes})


def mistake(*said):
    ended = call("bench", *said)
    assert ended.code == 2 and not ended.out, ended
    assert ended.message.startswith("fastgen: ") and "Traceback" not in ended.err
    return ended.message


def test_every_scope_batch_and_step_count_is_a_row(text):
    rows = list(bench(options(batch=(1, 3), scopes=("net", "e2e", "bare"))))
    cells = [(row.scope, row.batch, row.steps) for row in rows]
    assert cells == [(scope, batch, n) for scope in ("net", "e2e", "bare") for batch in (1, 3) for n in (1, 2)]
    for row in rows:
        assert row.unavailable is None and row.calls == 2 and row.warmup == 1 and row.nfe == row.steps
        assert row.images_per_s == pytest.approx(row.batch / row.p50_ms * 1000)
        assert set(row.stages_ms) == ({"text", "net", "decode", "copy"} if row.scope == "e2e" else set())
        assert (row.peak_alloc_mib, row.mfu, row.energy_j_per_img) == (None, None, None)  # no GPU, no claim
    by_cell = {(row.scope, row.batch, row.steps): row.gflop for row in rows}
    assert by_cell["net", 3, 2] == pytest.approx(6 * by_cell["net", 1, 1])
    assert by_cell["bare", 3, 2] == by_cell["e2e", 3, 2] > by_cell["net", 3, 2]


def test_the_other_model_goes_first_and_its_guidance_is_its_own(text):
    rows = list(
        bench(options(vs="teacher", teacher_steps=3, guidance=4.0, scopes=("net",), variants=("eager", "bf16")))
    )
    told = [(row.variant, row.role, row.steps, row.guidance) for row in rows]
    expected = [("vs", 3, 4.0), ("model", 1, None), ("model", 2, None)]
    assert told == [(variant, *one) for variant in ("eager", "bf16") for one in expected]
    for teacher, *students in (rows[:3], rows[3:]):
        assert teacher.speed_up is None
        for row in students:
            assert row.speed_up == pytest.approx(teacher.p50_ms / row.p50_ms)
            assert row.dtype == teacher.dtype == ("bfloat16" if row.variant == "bf16" else "float32")
    assert rows[0].gflop == pytest.approx(2 * 3 * rows[1].gflop)


def test_what_is_not_available_is_a_row_with_its_reason(text):
    names = ("eager", "cuda-graph", "sdpa-efficient")
    rows = list(bench(options(vs="teacher", scopes=("net",), steps=(1,), variants=names)))
    reasons = {(row.variant, row.role): row.unavailable for row in rows}
    assert len(rows) == len(reasons) == 6
    assert reasons["eager", "model"] is None
    for role in ("model", "vs"):
        assert "needs a CUDA GPU" in reasons["cuda-graph", role]
        assert reasons["sdpa-efficient", role].startswith("RuntimeError")
    absent = [row for row in rows if row.unavailable]
    assert all(row.p50_ms is None and row.gflop is None and row.speed_up is None for row in absent)
    assert "not compared: student was not measured" in " ".join(absent[1].notes)


def test_a_cell_that_fails_leaves_the_others(text, monkeypatch):
    measured = Subject.measured

    def failing(self, row, cell, work):
        if cell.batch == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(self, row, cell, work)

    monkeypatch.setattr(Subject, "measured", failing)
    rows = list(bench(options(batch=(1, 64, 2), scopes=("net",), steps=(1,))))
    assert [row.unavailable for row in rows] == [None, "out of memory", None]


def test_a_row_is_in_the_file_before_the_next_is_measured(text, tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    for i, row in enumerate(run(options(), json_to=str(file), repeats=1), start=1):
        lines = file.read_text().splitlines()
        assert len(lines) == i and json.loads(lines[-1])["scope"] == row.scope
    list(run(options(scopes=("net",)), json_to=str(file), repeats=1))
    assert len(Book(file).read()) == i + 2  # another command adds its own


KILLED = """
import os, signal, sys
from pathlib import Path
from fastgen import bench
from fastgen.eval.subject import Subject
from tests.eval.models import text_student

measured, left = Subject.measured, [2]

def deadly(*told):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return measured(*told)

Subject.measured = deadly
bench._load = lambda path, device: text_student(1, 2)
options = bench.Options(model="student", device="cpu", iterations=2, warmup=1)
list(bench.run(options, json_to=sys.argv[1], repeats=1))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_keeps_the_finished_rows(tmp_path):
    file, root = tmp_path / "rows.jsonl", Path(__file__).resolve().parent.parent
    child = subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=root)
    assert child.returncode == -signal.SIGKILL
    assert [(row.scope, row.steps) for row in Book(file).read()] == [("net", 1), ("net", 2)]
    with open(file, "ab") as broken:
        broken.write(b'{"model": "half a ro')
    book = Book(file)
    book.add(book.read()[0])
    assert len(file.read_text().splitlines()) == 3


def test_processes_are_brought_together(text, tmp_path, monkeypatch):
    """A child writes its own rows; the parent's come after all of them."""
    paces = iter((20.0, 30.0, 22.0))

    def child(command, **_):
        assert command[3:] == ["bench", *words(options(scopes=("net",), steps=(1,))), "--json", str(file)]
        (row,) = bench(options(scopes=("net",), steps=(1,)))
        Book(file).add(replace(row, p50_ms=next(paces)))
        return app.subprocess.CompletedProcess(command, 0)

    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(app.subprocess, "run", child)
    (row,) = run(options(scopes=("net",), steps=(1,)), json_to=str(file), repeats=3)
    assert (row.p50_ms, row.repeats) == (22.0, 3) and row.spread == pytest.approx(10 / 22)
    assert "not steady" in row.notes[-1]
    assert [one.repeats for one in Book(file).read()] == [1, 1, 1, 3]


def test_a_process_that_fails_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(app.subprocess, "run", lambda command, **_: app.subprocess.CompletedProcess(command, 1))
    with pytest.raises(RunFailed, match="process 1 of 2 ended with 1"):
        list(run(options(), json_to=str(tmp_path / "rows.jsonl"), repeats=2))


def test_options_become_a_command_line_and_back(tmp_path, monkeypatch):
    asked = options(vs="t", steps=(1, 2), guidance=7.5, variants=("eager", "bf16+channels_last"), limit=3.0)
    seen = []
    monkeypatch.setattr(app, "run", lambda given, **_: seen.append(given) or [])
    assert call("bench", *words(asked)).code == 0
    assert seen == [asked]


def test_the_command_prints_one_object_or_a_table(models):
    said = (models / "student", "--vs", models / "teacher", "--teacher-steps", "2", *QUICK)
    ended = call("bench", *said, "--steps", "1", "--json", "-")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["rows"]
    assert [(row["role"], row["scope"]) for row in rows] == [(r, s) for r in ("vs", "model") for s in ("net", "e2e")]
    assert rows[2]["speed_up"] > 0 and rows[3]["stages_ms"].keys() == {"net", "copy"}
    assert f"{models / 'student'}" in ended.err and " x" in ended.err
    ended = call("bench", *said)
    assert ended.code == 0 and ended.out == ""


@pytest.mark.slow
def test_architectures_with_random_weights_stand_in_for_checkpoints(monkeypatch):
    monkeypatch.setitem(fresh.ARCHITECTURES, "tiny", shrunk(fresh.ARCHITECTURES["sd15"]))
    asked = options(model=None, random_weights="tiny", vs="tiny", teacher_steps=2, guidance=7.5, steps=(4,))
    teacher, student = bench(replace(asked, scopes=("e2e",)))
    assert (teacher.role, teacher.nfe, student.role, student.nfe) == ("vs", 2, "model", 4)
    for row in (teacher, student):
        assert row.random_weights and row.res == "64x64" and row.unavailable is None
        assert row.stages_ms.keys() == {"text", "net", "decode", "copy"}
    assert teacher.gflop == pytest.approx(student.gflop)  # guidance doubles the batch of half as many calls


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "give the folder of a model, or --random-weights NAME"),
        (["{student}", "--random-weights", "sd15"], "and not both"),
        (["--random-weights", "sd51"], "no such architecture"),
        (["{student}", "--steps", "3"], "steps=3: this student was made for 1, 2"),
        (["{student}", "--steps", "1,x"], "--steps 1,x: whole numbers"),
        (["{student}", "--steps", "0"], "--steps 0"),
        (["{student}", "--batch", "1,,2"], "--batch"),
        (["{student}", "--variants", "eager,bf61"], "did you mean 'bf16'?"),
        (["{student}", "--scope", "net,all"], "--scope all: known: net, e2e, bare"),
        (["{student}", "--guidance", "3"], "it is for teachers"),
        (["{student}", "--vs", "{small}"], "makes 6x6 pixels"),
        (["{student}", "--vs", "nowhere"], "nowhere: no such folder"),
        (["{teacher}", "--vs", "{student}", "--steps", "3"], "this student was made for 1, 2"),
        (["{teacher}", "--solver", "huen"], "did you mean 'heun'?"),
        (["{student}", "--tiny-decoder", "x"], "belong together"),
        (["{student}", "--variants", "tiny-decoder"], "belong together"),
        (["{student}", "--variants", "tiny-decoder", "--tiny-decoder", "nowhere"], "--tiny-decoder nowhere"),
        (["{student}", "--device", "gpu"], "device=gpu"),
        (["{student}", "--repeats", "0"], "--repeats"),
        (["{student}", "--json", "{models}/teacher/fastgen.json"], "holds something else than rows of bench"),
        (["{student}", "--json", "{models}/teacher/net/model.safetensors"], "holds something else"),
    ],
)
def test_mistakes_are_one_line(models, said, message):
    names = {name: models / name for name in ("student", "teacher", "small")}
    assert message in mistake(*(word.format(models=models, **names) for word in said))


def test_a_foreign_file_without_a_line_end_is_left_alone(models, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes")
    mistake(models / "student", "--json", file)
    assert file.read_text() == "my notes"


def test_guidance_without_a_null_condition_is_refused(monkeypatch):
    denoiser = pixel_denoiser()
    denoiser.null_label = False
    monkeypatch.setattr(app, "_load", lambda path, device: app.Teacher(denoiser))
    with pytest.raises(UserError, match="has no null condition"):
        bench(options(model="teacher", guidance=2.0))


def test_numbers_are_read_once_each():
    assert numbers("--steps", "4,1,4") == (4, 1)
