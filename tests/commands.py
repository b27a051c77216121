"""The command line called in this process, and two small runs for it: points with a closed form, and images."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastgen import cli
from fastgen.commands import signals

LOOP = {"steps": 8, "batch": 8, "save_every": 2, "preview_every": 4, "log_every": 2}
PAIRS = {"num": 48, "per_shard": 16, "steps": 2, "batch": 16}
MIXTURE = {
    "family": "mixture",
    "weights": [0.5, 0.5],
    "means": [[1.0, 0.0], [-1.0, 0.0]],
    "covs": [[[0.1, 0.0], [0.0, 0.1]], [[0.1, 0.0], [0.0, 0.1]]],
}
REFLOW = {"name": "reflow", "stage": "train", "method": {"name": "reflow", "steps": [1, 2]}, "pairs": "pairs"}
NET = {"family": "mlp", "width": 8, "depth": 1}
POINTS = {
    "threads": 1,
    "teacher": MIXTURE,
    "stages": [
        {"name": "imitate", "stage": "train", "method": "imitate", "teacher": "teacher", "net": NET, "loop": LOOP},
        {"name": "pairs", "stage": "pairs", "teacher": "teacher", "pairs": PAIRS},
        {**REFLOW, "init": "imitate", "loop": LOOP},
    ],
}
IMAGES = {
    "threads": 1,
    "data": {"kind": "synthetic", "size": 8, "channels": 1, "classes": 4, "rows": 128},
    "stages": [
        {"name": "teacher", "stage": "train", "method": "flow_matching", "net": NET, "loop": LOOP},
        {"name": "pairs", "stage": "pairs", "teacher": "teacher", "pairs": PAIRS},
        {**REFLOW, "init": "teacher", "loop": LOOP},
    ],
}


class Ended(NamedTuple):
    """How a command ended: exit code, stdout, stderr with its logs."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line of stderr: what `main` says of a bad end."""
        return self.err.strip().splitlines()[-1]


def call(*words: str | Path) -> Ended:
    """`fastgen WORDS`, as the installed command would run it; what `main` does not catch is raised."""
    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    handlers, argv = root.handlers[:], sys.argv
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root.handlers.clear()  # pytest's: with them in place `main` would not set up its own
    sys.argv = ["fastgen", *map(str, words)]
    signals._received.clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        raise AssertionError("main returned")
    except SystemExit as end:
        return Ended(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv, root.handlers[:] = argv, handlers
        for number, handler in before.items():
            signal.signal(number, handler)


def write_config(path: Path, tree: dict[str, Any], **changes: Any) -> Path:
    """A config file; `changes` are put at its head, or into the stage of that name where there is one."""
    tree = copy.deepcopy(tree)
    stages = {stage["name"]: stage for stage in tree["stages"]}
    for name, value in changes.items():
        if name in stages:
            stages[name].update(value)
        else:
            tree[name] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def refused(out: Path, *words: str | Path) -> str:
    """The one line of a command that is the user's mistake: exit code 2, nothing left in `out`, nothing on stdout."""
    ended = call(*words, f"out={out}")
    assert ended.code == 2, ended.err
    assert ended.message.startswith("fastgen: ") and "Traceback" not in ended.err
    assert not out.exists(), sorted(path.name for path in out.rglob("*"))
    assert not ended.out
    return ended.message.removeprefix("fastgen: ")


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
