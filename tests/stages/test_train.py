"""What a training run refuses before it begins, and how it ends when it goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from PIL import Image

from fastgen import files
from fastgen.data import DataConfig
from fastgen.data.part import Some, data_part, real_images
from fastgen.data.shards import PairShards
from fastgen.data.synthetic import Synthetic
from fastgen.errors import UserError
from fastgen.teacher import read_denoiser
from fastgen.trainers.engine.checkpoint import Checkpoints
from tests.commands import IMAGES, LOOP, POINTS, call, refused, tree_bytes, write_config

BIG = {**IMAGES["data"], "size": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and pairs to be used and misused: `small` of 8 x 8 images, `big` of 12 x 12, `points`."""
    folder = tmp_path_factory.mktemp("made")
    for name, tree, head in (("small", IMAGES, {}), ("big", IMAGES, {"data": BIG}), ("points", POINTS, {})):
        assert call("distill", write_config(folder / f"{name}.yaml", tree, **head), f"out={folder / name}").code == 0
    return folder


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / "config.yaml", IMAGES)


def broken(made, tmp_path, how):
    """A copy of a good teacher, broken."""
    folder = tmp_path / "teacher"
    shutil.copytree(made / "small" / "teacher" / "model", folder)
    weights, facts = folder / "net" / "model.safetensors", folder / "fastgen.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickled":
        torch.save({"a": torch.zeros(1)}, weights)
    elif how == "without weights":
        weights.unlink()
    elif how == "no json":
        facts.write_text("{")
    elif how == "incomplete":
        (folder / "COMPLETE").unlink()
    elif how == "no checkpoint":
        for path in (folder / "net", facts):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "file":
        shutil.rmtree(folder)
        folder.write_bytes(b"\x80\x04")
    return folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "net/model.safetensors: not a whole safetensors file"),
        ("pickled", "net/model.safetensors: a pickle, which can run code"),
        ("without weights", "net/model.safetensors: no such file"),
        ("no json", "fastgen.json: not readable as JSON"),
        ("incomplete", "not complete (no COMPLETE file)"),
        ("no checkpoint", "not a checkpoint that any family knows"),
        ("file", "a file, and no .safetensors"),
    ],
)
def test_a_broken_teacher_is_refused_before_anything_is_written(made, tmp_path, how, expected):
    message = refused(tmp_path / "run", "distill", "reflow/digits", f"teacher={broken(made, tmp_path, how)}")
    assert str(tmp_path / "teacher") in message and expected in message


def test_a_teacher_that_is_not_set_or_not_there_is_told(tmp_path):
    assert "teacher is not set: add teacher=PATH" in refused(tmp_path / "run", "distill", "reflow/digits")
    assert "teacher=nowhere: no such file" in refused(tmp_path / "run", "distill", "reflow/digits", "teacher=nowhere")


def test_a_distilled_student_is_no_start_unless_that_is_meant(made, tmp_path, config):
    student = made / "small" / "reflow" / "model"
    for words in (["reflow/digits", f"teacher={student}"], [config, f"stages.reflow.init={student}"]):
        message = refused(tmp_path / "run", "distill", *words)
        assert "is a distilled student, not a teacher; set stages.reflow.init_distilled=true" in message
    words = [f"stages.reflow.init={student}", "stages.reflow.init_distilled=true", f"out={tmp_path / 'run'}"]
    assert call("distill", config, *words).code == 0


SHAPES = "samples of different shapes do not go together: "


def test_shapes_that_differ_are_named_before_the_run(made, tmp_path, config):
    small, big = (made / name / "teacher" / "model" for name in ("small", "big"))
    pairs, out = made / "big" / "pairs" / "shards", tmp_path / "run"
    message = refused(out, "distill", "reflow/digits", f"teacher={big}")
    assert f"stage evaluate: {SHAPES}teacher (1, 12, 12), data (1, 8, 8)" in message
    message = refused(out, "distill", config, f"stages.reflow.init={small}", f"stages.reflow.pairs={pairs}")
    assert f"stage reflow: {SHAPES}init (1, 8, 8), pairs (1, 12, 12)" in message
    message = refused(out, "distill", "flow_matching", "net=", f"init={small}", "data={kind: synthetic, size: 12}")
    assert f"stage train: {SHAPES}init (1, 8, 8), data (3, 12, 12)" in message


def test_shapes_that_differ_are_named_where_a_stage_made_one(made, tmp_path, config):
    out = tmp_path / "run"
    ended = call("distill", config, f"stages.reflow.pairs={made / 'big' / 'pairs' / 'shards'}", f"out={out}")
    assert ended.code == 2
    assert f"stage reflow: {SHAPES}student (1, 8, 8), pairs (1, 12, 12)" in ended.message
    assert not (out / "reflow").exists() and (out / "teacher" / "stage.json").exists()
    student = made / "points" / "reflow" / "model"
    tree = {**IMAGES, "stages": [*IMAGES["stages"][:1], {"name": "e", "stage": "evaluate", "student": str(student)}]}
    ended = call("distill", write_config(tmp_path / "e.yaml", tree), f"out={tmp_path / 'other'}")
    assert ended.code == 2 and "stage e: samples of different shapes" in ended.message
    assert "student (2,)" in ended.message


def test_a_student_of_other_classes_than_the_teacher_is_not_evaluated(made, tmp_path):
    evaluate = {"name": "e", "stage": "evaluate", "student": str(made / "small" / "reflow" / "model")}
    tree = {**IMAGES, "stages": [*IMAGES["stages"][:1], evaluate], "data": {**IMAGES["data"], "classes": 5}}
    ended = call("distill", write_config(tmp_path / "e.yaml", tree), f"out={tmp_path / 'run'}")
    assert ended.code == 2 and "the numbers of classes differ: student 4, teacher 5" in ended.message


def test_labels_that_do_not_fit_are_named(made, tmp_path, config):
    teacher, out = made / "small" / "teacher" / "model", tmp_path / "run"
    for data, expected in (
        ("{kind: synthetic, size: 8, channels: 1, classes: 5}", "the student has 4 classes, the data have 5 classes"),
        ("{kind: synthetic, size: 8, channels: 1}", "the student has 4 classes, the data have no labels"),
    ):
        message = refused(out, "distill", "flow_matching", "net=", f"init={teacher}", f"data={data}", "loop.steps=1")
        assert expected in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.reflow.init="], "set one of net (a fresh network) and init"),
        (["stages.reflow.net={family: mlp}"], "set one of net (a fresh network) and init"),
        (["stages.teacher.init=teacher"], "init=teacher is not made before this stage"),
        (["stages.reflow.pairs=nowhere"], "'nowhere': neither a stage of this run nor an existing path"),
        (["data="], "a fresh net needs data or a teacher to know its shape from; set data.path"),
        (["data.kind=idx"], "data.size is not used by kind=idx"),
        (["data={path: nowhere}"], "data.path=nowhere: no such file or folder"),
        (["hold_out=1"], "'hold_out': input should be greater than or equal to 2"),
        (["data.rows=1"], "1 images are too few to hold out every 5th"),
        (["stages.teacher.loop.micro=3"], "loop.batch=8 is not a multiple of loop.micro=3"),
        (["stages.teacher.loop.networks={studnt: {lr: 1}}"], "no such network (did you mean 'student'?)"),
        (["stages.teacher.loop.trackers=[wandb2]"], "input should be 'tensorboard', 'wandb' or 'trackio'"),
        (["stages.reflow.method.steps=[]"], "at least 1 item"),
        (["stages.reflow.lpips={trunk: a, heads: b}"], "lpips.trunk=a: no such file"),
        (["device=tpu9"], "device=tpu9: not available here"),
    ],
)
def test_what_a_stage_cannot_do_is_refused_and_leaves_nothing(tmp_path, config, words, expected):
    assert expected in refused(tmp_path / "run", "distill", config, *words)


def test_a_closed_form_teacher_is_no_start_and_no_pairs(tmp_path):
    config = write_config(tmp_path / "points.yaml", POINTS)
    for key in ("init", "pairs"):
        message = refused(tmp_path / "run", "distill", config, f"stages.reflow.{key}=teacher")
        assert "'teacher' is a closed-form teacher, which has no weights" in message
    assert "no teacher family 'mixtur' (did you mean 'mixture'?)" in refused(
        tmp_path / "run", "distill", config, "teacher.family=mixtur"
    )
    assert "2 positive weights" in refused(tmp_path / "run", "distill", config, "teacher.weights=[1, -1]")


def test_an_evaluation_that_cannot_be_is_refused_before_the_training(tmp_path, made):
    evaluate = {"name": "e", "stage": "evaluate", "student": "reflow"}
    config = write_config(tmp_path / "c.yaml", {**IMAGES, "stages": [*IMAGES["stages"], evaluate]})
    for words, expected in (
        (["data.classes="], "the gate reads labels, and the data 'synthetic/train' have none"),
        (["data.rows=50"], "too few to measure against"),
        ([f"stages.e.student={made / 'small' / 'teacher' / 'model'}"], "is a teacher; name a student"),
    ):
        assert expected in refused(tmp_path / "run", "distill", config, *words)


def test_a_fresh_network_takes_the_shape_of_its_teacher(tmp_path):
    """Even where the run has data: imitate reads none of it."""
    words = ["data={kind: digits}", f"out={tmp_path / 'run'}", "stages.imitate.loop.steps=1"]
    assert call("distill", write_config(tmp_path / "c.yaml", POINTS), *words).code == 0
    assert read_denoiser(tmp_path / "run" / "imitate" / "model")[0].shape == (2,)


@pytest.fixture
def pictures(tmp_path):
    for i in range(40):
        folder = tmp_path / "pictures" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / f"{i:02d}.png")
    bad = tmp_path / "pictures" / "class2" / "14.png"
    bad.write_bytes(bad.read_bytes()[:50])
    return tmp_path / "pictures"


def test_a_corrupt_image_is_named_or_skipped_as_configured(tmp_path, config, pictures):
    data = f"path: {pictures}, channels: 1"
    ended = call("distill", config, f"data={{{data}}}", f"out={tmp_path / 'run'}")
    assert ended.code == 2 and not (tmp_path / "run" / "teacher" / "model").exists()
    assert "class2/14.png: not a readable image" in ended.message and "data.on_bad=skip" in ended.message
    # The mend that the message names does not change what was learnt so far: no bad image was seen.
    ended = call("distill", config, "--resume", f"data={{{data}, on_bad: skip}}", f"out={tmp_path / 'run'}")
    assert ended.code == 0 and "teacher: resumed at step" in ended.err and "14.png: " in ended.err


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("flipped", "shard-000001.safetensors: damaged (its sha256 is not the one in the journal)"),
        ("truncated", "shard-000001.safetensors: damaged"),
        ("gone", "1 of 3 shards are missing, the first is shard-000001.safetensors"),
    ],
)
def test_a_corrupt_shard_is_named_with_its_mend(made, tmp_path, config, how, expected):
    folder = tmp_path / "pairs"
    shutil.copytree(made / "small" / "pairs" / "shards", folder)
    shard = folder / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data if how == "flipped" else data[:200])
    if how == "gone":
        shard.unlink()
    ended = call("distill", config, f"stages.reflow.pairs={folder}", f"out={tmp_path / 'run'}")
    assert ended.code == 2 and expected in ended.message and "fastgen pairs CONFIG" in ended.message
    assert not (tmp_path / "run" / "reflow").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_what_is_good(tmp_path, config):
    out = tmp_path / "run"
    words = [f"out={out}", "stages.teacher.loop.optim.lr=1e30", "stages.teacher.loop.steps=40"]
    ended = call("distill", config, *words, "stages.teacher.loop.bad_limit=5", "stages.teacher.loop.save_every=1")
    assert ended.code == 1
    assert "loss or gradient of 'student' was not finite 5 time(s) in a row" in ended.message
    assert "step " in ended.message and "last good checkpoint is " in ended.message and "loop.optim.lr" in ended.message
    assert not (out / "teacher" / "model").exists() and not (out / "teacher" / "stage.json").exists()


def test_a_run_too_short_for_that_limit_writes_no_model_either(tmp_path, config):
    out = tmp_path / "run"
    ended = call("distill", config, f"out={out}", "stages.teacher.loop.optim.lr=1e30")
    assert ended.code == 1 and "step 8: the last 7 update(s) were skipped" in ended.message
    assert "no model was written" in ended.message and "--from teacher" in ended.message
    assert "the checkpoints are" not in ended.message  # none was written
    assert not (out / "teacher" / "model").exists()
    again = call("distill", config, f"out={out}", "--from", "teacher")
    assert again.code == 0 and (out / "reflow" / "model").exists()


class FullDisk:
    """Every durable write from number n on fails for want of space."""

    def __init__(self, n):
        self.left, self.real = n, os.fsync

    def __call__(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(descriptor)


@pytest.mark.parametrize("n", [1, 9, 27, 36, 60])
def test_a_full_disk_ends_with_1_and_the_run_goes_on_when_there_is_space(made, tmp_path, monkeypatch, config, n):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(n))
        ended = call("distill", config, f"out={out}")
    assert ended.code == 1 and "no space left on the device" in ended.message and "--resume" in ended.message
    if (out / "teacher" / "stage.json").exists():
        assert "saved: the stages teacher" in ended.message
        shards = list((out / "pairs" / "shards").glob("shard-*"))
        assert f"{len(shards)} shards" in ended.message or not shards or (out / "pairs" / "stage.json").exists()
    elif Checkpoints(out / "teacher" / "checkpoints").steps():
        assert "saved: " + str(out / "teacher" / "checkpoints" / "step-") in ended.message
    assert not (out / "reflow" / "stage.json").exists()
    assert call("distill", config, "--resume", f"out={out}").code == 0
    for stage in ("teacher", "reflow"):
        weights = (folder / stage / "model" / "net" / "model.safetensors" for folder in (out, made / "small"))
        assert len({path.read_bytes() for path in weights}) == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path, config, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # these tests may run as root, whom nothing stops
    (tmp_path / "run").mkdir()
    ended = call("distill", config, f"out={tmp_path / 'run'}")
    assert ended.code == 2 and "cannot be written" in ended.message and not list((tmp_path / "run").iterdir())


def test_out_that_is_a_file_or_lies_below_one_is_told(tmp_path, config):
    for out in (config, config / "run"):
        ended = call("distill", config, f"out={out}")
        assert ended.code == 2 and "a file stands where a folder is needed" in ended.message


def test_memory_that_does_not_suffice_is_told(tmp_path, config):
    words = [f"out={tmp_path / 'run'}", "stages.reflow.loop.batch=1000000000000"]
    ended = call("distill", config, *words)
    assert ended.code == 1 and "stage reflow: out of memory" in ended.message and "loop.micro" in ended.message
    assert "saved: the stages teacher, pairs" in ended.message


def test_interrupted_within_a_training_and_within_pairs_resumes_to_the_same_bytes(made, tmp_path, config, monkeypatch):
    from fastgen.commands import signals

    for polls in (3, 11):  # the 3rd step of the teacher; the 2nd shard (8 steps, one pause between stages, 2 shards)
        out, asked = tmp_path / f"run-{polls}", []

        def received(asked=asked, polls=polls):
            asked.append(1)
            return len(asked) >= polls

        class Received(list):
            __bool__ = lambda self: received()  # noqa: E731

        with monkeypatch.context() as patch:
            patch.setattr(signals, "_received", Received([15]))
            patch.setattr(Received, "clear", lambda self: None)
            ended = call("distill", config, f"out={out}")
        assert ended.code == 143 and "continue with --resume" in ended.message
        assert ("saved at step 3" if polls == 3 else "missing shards made") in ended.message
        assert call("distill", config, "--resume", f"out={out}").code == 0
        for stage in ("teacher/model", "pairs/shards", "reflow/model"):
            expected = tree_bytes(made / "small" / stage)
            found = tree_bytes(out / stage)
            assert {k for k in found if found[k] != expected.get(k)} == set()


def test_the_log_of_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, config):
    out = tmp_path / "run"
    assert call("distill", config, f"out={out}").code == 0
    lines = (out / "teacher" / "log.jsonl").read_text().splitlines()
    (out / "teacher" / "stage.json").unlink()
    shutil.rmtree(out / "teacher" / "checkpoints")
    (out / "teacher" / "log.jsonl").write_text("\n".join([*lines[:2], '{"step": 3, "lo']))
    assert call("distill", config, "--resume", f"out={out}").code == 0
    steps = [json.loads(line)["step"] for line in (out / "teacher" / "log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in lines]


def test_previews_hold_no_more_rows_than_a_batch(tmp_path, config):
    """A model whose batch is one may not have the memory for more."""
    assert call("distill", config, f"out={tmp_path / 'run'}", "stages.teacher.loop.batch=4").code == 0
    pictures = {stage: sorted((tmp_path / "run" / stage / "previews").iterdir()) for stage in ("teacher", "reflow")}
    assert Image.open(pictures["teacher"][0]).width < Image.open(pictures["reflow"][0]).width


def test_facts_carry_the_origin_and_the_budget(made):
    facts = files.read_json(made / "small" / "reflow" / "model" / "fastgen.json")["facts"]
    manifest = PairShards(made / "small" / "pairs" / "shards").manifest
    assert facts["teacher_sha256"] == manifest.teacher == facts["init_sha256"]
    assert (facts["method"], facts["training_steps"], facts["samples"]) == ("reflow", LOOP["steps"], 8 * LOOP["steps"])


def test_data_parts_are_disjoint_and_some_rows_are_spread(tmp_path):
    synthetic = DataConfig(kind="synthetic", size=4, classes=2, rows=100)
    train, held_out = data_part(synthetic, "train", 5), data_part(synthetic, "held_out", 5)
    assert (len(train), len(held_out)) == (80, 20)
    train, held_out = real_images(synthetic, 5, 16)
    assert (len(train), len(held_out)) == (16, 16)
    with pytest.raises(UserError, match="too few"):
        real_images(synthetic, 7)
    data = Synthetic((1, 4, 4), 2, 10)
    chosen = Some(data, 4).get(torch.arange(4))["x0"]
    assert torch.equal(chosen, data.get(torch.tensor([0, 2, 5, 7]))["x0"])
