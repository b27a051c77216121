"""The command line to a hostile user: one line and the right exit code for every mistake, pure JSON where promised."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import doctor
from fastgen.commands import runs, signals
from fastgen.student import save_teacher
from fastgen.teachers import mlp
from tests.commands import IMAGES, POINTS, call, refused, tree_bytes, write_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on images: made/run/{teacher/model, pairs/shards, reflow/model}, and one on points."""
    folder = tmp_path_factory.mktemp("made")
    assert call("distill", write_config(folder / "images.yaml", IMAGES), f"out={folder / 'run'}").code == 0
    assert call("distill", write_config(folder / "points.yaml", POINTS), f"out={folder / 'points'}").code == 0
    return folder


@pytest.fixture(scope="module")
def student(made):
    return made / "run" / "reflow" / "model"


@pytest.fixture(scope="module")
def teacher(made):
    return made / "run" / "teacher" / "model"


def mistake(*words):
    """The one line of a command that ends with 2."""
    ended = call(*words)
    assert ended.code == 2 and not ended.out, ended
    assert ended.err.strip().count("\n") == 0 and ended.message.startswith("fastgen: ")
    return ended.message.removeprefix("fastgen: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["distill"], "Missing argument"),
        (["distill", "reflow", "--resum"], "No such option: --resum"),
        (["generate", "x", "--num", "0"], "--num"),
        (["generate", "x", "--num", "many"], "--num"),
        (["generate", "x", "--steps", "0"], "--steps"),
        (["generate", "x", "--seed", "-1"], "--seed"),
        (["generate", "x", "--seed", str(2**32)], "--seed"),
        (["evaluate", "x", "--reference", "digits", "--num", "15"], "--num"),
        (["evaluate", "x"], "--reference"),
        (["pairs", "quickstart", "--workers", "0"], "--workers"),
        (["list", "method"], "did you mean 'methods'?"),
        (["distill", "reflw"], "did you mean 'reflow'?"),
        (["distill", "reflow/digit"], "did you mean 'reflow/digits'?"),
        (["distill", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["generate", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "nowhere", "--reference", "digits"], "nowhere: no such folder"),
        (["generate", "x", "--out", "a.jpg"], "--out a.jpg: give a .png file or a folder"),
    ],
)
def test_mistakes_in_the_words_are_told_in_one_line(words, expected):
    assert expected in mistake(*words)


def test_usage_mistakes_point_at_the_help_of_their_command():
    assert "`fastgen generate --help`" in mistake("generate", "x", "--num", "0")


def test_without_words_the_help_is_printed():
    ended = call()
    assert "distill" in ended.out + ended.err and "Traceback" not in ended.err
    assert call("--help").code == 0 and "quickstart" in call("--help").out


def test_what_is_no_yaml_mapping_is_told(tmp_path):
    for text, expected in (("a: [", "not readable as YAML"), ("- 1\n", "a config is a mapping"), ("", "a config is")):
        (tmp_path / "c.yaml").write_text(text)
        assert expected in refused(tmp_path / "run", "distill", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a red fox"], "a prompt: this model does not read text; it takes num, label, steps and seed"),
        (["--label", "4"], "label: this model has the classes 0 .. 3"),
        (["--label", "-1"], "label: this model has the classes 0 .. 3"),
        (["--steps", "3"], "steps=3: this student was made for 1, 2"),
        (["--guidance", "2"], "guidance: this student has it built in"),
        (["--solver", "heun"], "solver: this student has it built in"),
        (["--device", "nonsense"], "device=nonsense: not available here"),
        (["--device", "meta"], "device=meta: not available here"),
    ],
)
def test_options_that_a_student_cannot_use_are_refused(student, tmp_path, words, expected):
    assert expected in mistake("generate", student, *words, "--out", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--solver", "hein"], "solver=hein: not one of ours (did you mean 'heun'?)"),
        (["--guidance", "2"], "guidance=2.0: it needs a label"),
        (["a red fox"], "this model does not read text"),
    ],
)
def test_options_that_a_teacher_cannot_use_are_refused(teacher, tmp_path, words, expected):
    assert expected in mistake("generate", teacher, *words, "--out", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_points_and_unconditional_models_refuse_pictures_and_labels(made, tmp_path):
    points = made / "points" / "reflow" / "model"
    assert "samples of shape (2,), which are no images" in mistake("generate", points)
    torch.manual_seed(0)
    save_teacher(mlp.build(mlp.MLPConfig(width=8, depth=1), (1, 8, 8), None), tmp_path / "plain", {})
    for words, expected in (
        (["--label", "1"], "label: this model is unconditional"),
        (["--guidance", "2", "--label", "1"], "guidance=2.0: it needs a label"),
    ):
        assert expected in mistake("generate", tmp_path / "plain", *words)
    save_teacher(mlp.build(mlp.MLPConfig(width=8, depth=1), (4, 8, 8), None), tmp_path / "latent", {})
    assert "samples of shape (4, 8, 8), which are no images" in mistake("generate", tmp_path / "latent")


def test_generate_writes_a_grid_or_one_file_an_image(student, tmp_path):
    assert call("generate", student, "--num", "5", "--out", tmp_path / "deep" / "grid.png").code == 0
    assert Image.open(tmp_path / "deep" / "grid.png").width > 2 * 64
    for name in ("folder", "folder.v2"):
        (tmp_path / "folder.v2").mkdir(exist_ok=True)  # a dot in the name of a folder that is there
        assert call("generate", student, "--num", "3", "--label", "2", "--out", tmp_path / name).code == 0
        assert sorted(tree_bytes(tmp_path / name)) == ["00000.png", "00001.png", "00002.png"]
    assert tree_bytes(tmp_path / "folder") == tree_bytes(tmp_path / "folder.v2")
    assert Image.open(tmp_path / "folder" / "00000.png").size == (8, 8)


def test_generate_is_decided_by_its_seed(student, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("generate", student, "--num", "2", "--seed", seed, "--out", tmp_path / name).code == 0
    a, b, c = (tree_bytes(tmp_path / name) for name in "abc")
    assert a == b and all(a[name] != c[name] for name in a)


def test_generate_where_a_file_is_in_the_way(student, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "a file stands where a folder is needed" in mistake("generate", student, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_json_is_one_object_and_nothing_else(student, made):
    for words in (
        ["evaluate", student, "--reference", "digits", "--num", "16", "--extractor", "random-conv"],
        ["inspect", student],
        ["inspect", made / "run"],
        ["list", "methods"],
        ["list", "configs"],
    ):
        ended = call(*words, "--json")
        assert isinstance(json.loads(ended.out), dict) and ended.out.count("\n") == 1, words
        assert call(*words).out != ended.out


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("problem", 1)])
def test_doctor_prints_json_whatever_it_finds(monkeypatch, status, code):
    monkeypatch.setattr(doctor, "report", lambda: [doctor.Row("disk", status, "full")])
    ended = call("doctor", "--json")
    assert json.loads(ended.out) == {"checks": [{"name": "disk", "status": status, "detail": "full"}]}
    assert ended.code == code and "disk" in call("doctor").out


def test_stdout_of_a_real_process_is_the_json_alone(student):
    words = ["evaluate", str(student), "--reference", "digits", "--num", "16", "--json"]
    command = [sys.executable, "-m", "fastgen.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = {row["metric"]: row["value"] for row in json.loads(ended.stdout)["results"]}
    assert found["FD-digits-classifier"] > 1 and 0 <= found["label_agreement"] < 0.5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--reference", "digitz"], "data.path=digitz: no such file or folder"),
        (["--reference", "digits", "--steps", "9"], "steps=9: this student was made for 1, 2"),
        (["--reference", "digits", "--extractor", "clasifier"], "did you mean 'classifier'?"),
        (["--reference", "digits", "--extractor", "no.safetensors"], "no.safetensors: no such file"),
    ],
)
def test_evaluate_refuses_in_one_line(student, words, expected):
    assert expected in mistake("evaluate", student, "--num", "16", *words)


def test_evaluate_reads_a_folder_as_grey_for_a_grey_model(student, made, tmp_path):
    (tmp_path / "real").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i:03d}.png")
    words = ["evaluate", student, "--reference", tmp_path / "real", "--num", "16"]
    ended = call(*words, "--extractor", "random-conv", "--json")
    assert ended.code == 0 and json.loads(ended.out)["results"][0]["n_ref"] == 64
    assert "no labels" in mistake(*words)  # the default extractor would have to be trained on them
    for i in range(70):
        (tmp_path / "real" / f"{i:03d}.png").unlink()
    assert "too few to measure against" in mistake(*words)
    points = made / "points" / "reflow" / "model"
    assert "the model makes (2,)" in mistake("evaluate", points, "--reference", "digits", "--num", "16")


def test_a_classifier_of_other_images_is_refused(student, tmp_path):
    from safetensors.torch import save_file

    from fastgen.eval.classifier import ConvNet

    save_file(ConvNet(3, 4).state_dict(), tmp_path / "colour.safetensors")
    words = ["--reference", "digits", "--num", "16", "--extractor", tmp_path / "colour.safetensors"]
    assert "sees 3 channel(s), the images have 1" in mistake("evaluate", student, *words)


def test_pairs_are_made_by_many_workers_and_found_by_the_run(tmp_path):
    config, out = write_config(tmp_path / "c.yaml", POINTS), tmp_path / "run"
    for worker in (1, 0):
        assert call("pairs", config, f"out={out}", "--worker", worker, "--workers", "2").code == 0
    made = tree_bytes(out / "pairs" / "shards")
    assert len([name for name in made if name.startswith("shard-")]) == 3
    other = mistake("pairs", config, f"out={out}", "stages.pairs.pairs.num=32")
    assert "begun with another pairs.num (48, now 32)" in other
    assert call("distill", config, f"out={out}").code == 0
    assert {k: v for k, v in tree_bytes(out / "pairs" / "shards").items() if "journal" not in k} == {
        k: v for k, v in made.items() if "journal" not in k
    }


def test_pairs_refuses_what_it_cannot_make(tmp_path):
    config, out = write_config(tmp_path / "c.yaml", IMAGES), tmp_path / "run"
    assert "stage 'teacher' is not done yet" in refused(out, "pairs", config)
    assert "no such pairs stage" in refused(out, "pairs", config, "--stage", "pars")
    assert "numbered 0 .. 1" in refused(out, "pairs", config, "--worker", "2", "--workers", "2")


def test_a_failing_machine_is_one_line_and_code_1(monkeypatch):
    def broken(*args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "disk/file")

    monkeypatch.setattr("fastgen.listing.listing", broken)
    ended = call("list", "methods")
    assert ended.code == 1 and ended.message == "fastgen: disk/file: Input/output error"


def test_a_fault_of_the_programs_own_is_not_hidden(monkeypatch):
    monkeypatch.setattr("fastgen.listing.listing", lambda what: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("list", "methods")


def test_signals_end_a_command_without_a_run_at_once():
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(SystemExit) as ended:
            signals._end(number, None)
        assert ended.value.code == 128 + number


def test_a_second_signal_ends_a_run_at_once(monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    signals._ask(signal.SIGTERM, None)
    assert signals._received == [signal.SIGTERM]
    with pytest.raises(SystemExit) as ended:
        signals._ask(signal.SIGINT, None)
    assert ended.value.code == 130


def test_quickstart_takes_any_folder_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "_run", lambda config, overrides, **options: asked.append(overrides) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("quickstart", "--out", "a: b #c")
    assert asked[0][0] == 'out="a: b #c"'


def test_quickstart_refuses_a_file_and_a_run(tmp_path, made):
    (tmp_path / "file").write_text("mine")
    assert "a file stands where a folder is needed" in mistake("quickstart", "--out", tmp_path / "file")
    shutil.copytree(made / "run", tmp_path / "run")
    assert "holds a run already" in mistake("quickstart", "--out", tmp_path / "run")
