"""A run in a process of its own, killed or asked to stop at any instant, and resumed: what it leaves does not tell.

The instants are chosen by what the process has written so far, not by the clock, so a busy machine changes nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgen.data.shards import PairShards
from tests.commands import POINTS, call, tree_bytes, write_config

LOOP = {"steps": 40, "batch": 8, "save_every": 3, "keep": 1, "log_every": 1, "preview_every": 7}
PAIRS = {"num": 200, "per_shard": 10, "steps": 2, "batch": 5}
STEPS, SHARDS = LOOP["steps"], PAIRS["num"] // PAIRS["per_shard"]
WHOLE = STEPS + SHARDS + STEPS
EVERY_STEP = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    stages = {"imitate": {"loop": LOOP}, "pairs": {"pairs": PAIRS}, "reflow": {"loop": LOOP}}
    return write_config(tmp_path_factory.mktemp("config") / "config.yaml", POINTS, **stages)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert call("distill", config, f"out={out}").code == 0
    assert steps(out, "imitate") == steps(out, "reflow") == EVERY_STEP
    return out


def lines(out, stage):
    """The whole lines of a log; the last one may be in the writing."""
    path = out / stage / "log.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def steps(out, stage):
    """The training steps in a log, previews left out."""
    return [told["step"] for told in map(json.loads, lines(out, stage)) if "seconds" in told]


def progress(out):
    """How much of `WHOLE` a run has done, seen from outside."""
    shards = len(list((out / "pairs" / "shards").glob("shard-*")))
    return shards + sum(json.loads(told[-1])["step"] for stage in ("imitate", "reflow") if (told := lines(out, stage)))


class Forked:
    """The command in a child of this process, which has read torch already: half a second in place of four."""

    def __init__(self, config, out):
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            code = 70
            try:
                code, _, told = call("distill", config, "--resume", f"out={out}")
                told_by(out).write_text(told)
            finally:
                os._exit(code)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number):
        os.kill(self.pid, number)


def spawned(config, out):
    """The command as a user starts it."""
    command = [sys.executable, "-m", "fastgen.cli", "distill", str(config), "--resume", f"out={out}"]
    with open(told_by(out), "w") as stderr:
        return subprocess.Popen(command, cwd=Path(__file__).resolve().parent.parent, stderr=stderr)


def told_by(out):
    """Where the stderr of a run's process goes."""
    return out.with_name(f"{out.name}.err")


def strike(process, out, moment, number, delay=0.0):
    """Send a signal once the run has come so far; the exit code of its process."""
    while process.poll() is None:
        if progress(out) >= moment:
            time.sleep(delay)
            process.send_signal(number)
            process.wait()
            break
        time.sleep(0.004)
    return process.returncode


def assert_same(out, whole):
    """Weights, pairs and logs of the run that was disturbed are those of the run that was not."""
    for folder in ("imitate/model", "reflow/model"):
        assert tree_bytes(out / folder) == tree_bytes(whole / folder)
    shards, expected = (
        {name: data for name, data in tree_bytes(run / "pairs" / "shards").items() if name.startswith("shard-")}
        for run in (out, whole)
    )
    assert shards == expected and len(shards) == SHARDS
    pairs = PairShards(out / "pairs" / "shards")
    assert pairs.get(torch.arange(len(pairs)))["row"].tolist() == list(range(PAIRS["num"]))
    journal = (out / "pairs" / "shards" / "journal-0.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in journal) == list(range(SHARDS))
    assert steps(out, "imitate") == steps(out, "reflow") == EVERY_STEP


def kill_and_compare(start, config, whole, out, seed, kills):
    chance, killed = random.Random(seed), 0
    for moment in sorted(chance.randrange(WHOLE - STEPS // 2) for _ in range(kills)):
        code = strike(start(config, out), out, moment, signal.SIGKILL, delay=chance.uniform(0, 0.02))
        assert code in (-signal.SIGKILL, 0)  # 0: it was quicker than the watch
        killed += code != 0
    assert killed > kills // 2
    assert call("distill", config, "--resume", f"out={out}").code == 0
    assert_same(out, whole)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_three_times_the_run_is_the_undisturbed_one(config, whole, tmp_path, seed):
    kill_and_compare(Forked, config, whole, tmp_path / "run", seed, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "seed"), [(spawned, 3), (Forked, 4), (Forked, 5)])
def test_killed_twenty_times_the_run_is_the_undisturbed_one(config, whole, tmp_path, start, seed):
    kill_and_compare(start, config, whole, tmp_path / "run", seed, kills=20)


@pytest.mark.parametrize(
    ("start", "number", "moment", "where"),
    [
        (Forked, signal.SIGTERM, 5, "imitate"),
        (Forked, signal.SIGTERM, STEPS + 2, "pairs"),
        (Forked, signal.SIGINT, STEPS + SHARDS + 5, "reflow"),
        pytest.param(spawned, signal.SIGTERM, 5, "imitate", marks=pytest.mark.slow),
        pytest.param(spawned, signal.SIGINT, STEPS + SHARDS + 5, "reflow", marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_says_so(config, whole, tmp_path, start, number, moment, where):
    out = tmp_path / "run"
    code = strike(start(config, out), out, moment, number)
    told = told_by(out).read_text()
    assert code == 128 + number, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("fastgen: ") and last.endswith("continue with --resume") and "Traceback" not in told
    assert ("missing shards made" if where == "pairs" else "saved at step") in last and f"/{where}/" in last
    assert not (out / where / "stage.json").exists()
    assert call("distill", config, "--resume", f"out={out}").code == 0
    assert_same(out, whole)
