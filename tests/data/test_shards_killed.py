"""The writer of a pair set, killed before every step it takes on the disk."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest

from fastgen.data.shards import Manifest
from tests.data.pair_sets import MANIFEST, check_whole, hashes, make


class Killed:
    """Ends the process at the n-th step that touches the disk; a write takes three, its parts written one by one."""

    def __init__(self, steps: int):
        self.left = steps

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)

    def install(self) -> None:
        real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir", "mkdir")}

        def counted(name):
            def call(*args, **kwargs):
                self.step()
                return real[name](*args, **kwargs)

            return call

        for name in real:
            setattr(os, name, counted(name))
        import fastgen.files

        def opened(path, mode):
            return open(path, mode) if mode == "rb" else Parts(self, path, mode)

        fastgen.files.open = opened


class Parts(io.FileIO):
    """An unbuffered file whose every write reaches the disk in three parts, with a chance to die before each."""

    def __init__(self, killed: Killed, path: Path, mode: str):
        self.killed = killed
        killed.step()  # opening may truncate
        super().__init__(path, mode)

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:-1], data[-1:]):
            self.killed.step()
            super().write(part)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.killed.step()
        return super().truncate(size)


def make_and_die(folder: Path, steps: int, manifest: Manifest = MANIFEST) -> bool:
    """Run `make` in a child that is killed after so many steps; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            logging.disable()
            Killed(steps).install()
            make(folder, manifest)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the child failed by itself"
    return code == 0


@pytest.mark.parametrize("first", [0, 1])
def test_killed_at_any_step_a_restart_completes_the_same_set(tmp_path, monkeypatch, first):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # steps all the same, but only a power cut needs the disk itself
    manifest = MANIFEST.model_copy(update={"total": 7})
    make(tmp_path / "whole", manifest)
    steps, finished = first, False
    while not finished:
        folder = tmp_path / str(steps)
        finished = make_and_die(folder, steps, manifest)
        make(folder, manifest)
        check_whole(folder, hashes(tmp_path / "whole"), total=7)
        steps += 2
    assert steps > 35  # every open, write, fsync and rename of two shards, their journal and the manifest


def test_killed_again_and_again_it_still_arrives(tmp_path):
    """Each run has a dozen steps and must keep what the runs before it finished."""
    make(tmp_path / "whole")
    done = 0
    for _ in range(30):
        finished = make_and_die(tmp_path / "set", 12)
        now = len(hashes(tmp_path / "set")) if (tmp_path / "set").exists() else 0
        assert now >= done
        done = now
        if finished:
            break
    assert finished
    check_whole(tmp_path / "set", hashes(tmp_path / "whole"))
