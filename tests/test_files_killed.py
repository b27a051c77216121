"""Files under a process that is killed at every system call: the old state or the new one, never a mix."""

from __future__ import annotations

import builtins
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgen import files

KILLED = 137
CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "open")


class Torn:
    """A file whose writes reach the disk in two halves, each of them a point where the process may die."""

    def __init__(self, file: Any, strike: Callable[[], None]) -> None:
        self.file, self.strike = file, strike

    def write(self, data: bytes) -> None:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.strike()
            self.file.write(half)
            self.file.flush()

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def killed_at(n: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a forked child that dies before its n-th system call that matters; False if it came to its end."""
    child = os.fork()
    if child == 0:
        left = [n]

        def strike() -> None:
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)

        def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **options: (strike(), real(*args, **options))[1]

        for name in CALLS:
            setattr(os, name, guarded(getattr(os, name)))
        real_open = builtins.open
        builtins.open = lambda *args, **options: (strike(), Torn(real_open(*args, **options), strike))[1]
        try:
            work()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the child failed by itself"
    return code == KILLED


def kills(work: Callable[[], Any], reset: Callable[[], None]) -> Iterator[tuple[int, bool]]:
    """Yields after each kill, at the first call, the second, ..., and once more after the run that was not killed."""
    for n in range(500):
        reset()
        survived = not killed_at(n, work)
        yield n, survived
        if survived:
            assert n >= 4, "nothing was struck: the harness misses the calls"
            return
    raise AssertionError("the work never came to its end")


def test_a_file_killed_anywhere_is_the_old_or_the_new(tmp_path: Path) -> None:
    path, seen = tmp_path / "state.json", set()
    for _, survived in kills(lambda: files.write_atomic(path, "n" * 1000), lambda: path.write_bytes(b"old")):
        content = path.read_bytes()
        assert content in (b"old", b"n" * 1000)
        assert not survived or content == b"n" * 1000
        seen.add(content)
        assert {p.name for p in tmp_path.iterdir()} <= {"state.json", ".tmp-state.json"}
    assert len(seen) == 2
    files.write_atomic(path, b"again")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"] and path.read_bytes() == b"again"


def test_a_new_file_killed_anywhere_is_absent_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for _ in kills(lambda: files.write_atomic(path, "whole"), lambda: path.unlink(missing_ok=True)):
        assert not path.exists() or path.read_text() == "whole"


def fill(path: Path, text: str) -> None:
    with files.atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        for name in ("one", "sub/two"):
            with open(temporary / name, "w") as file:
                file.write(text)


def state(path: Path) -> tuple[str, ...]:
    return tuple((path / name).read_text() for name in ("one", "sub/two"))


def remove(tmp_path: Path) -> None:
    for entry in tmp_path.iterdir():
        shutil.rmtree(entry)


def test_a_folder_killed_anywhere_is_absent_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "student"
    for _, survived in kills(lambda: fill(path, "new"), lambda: remove(tmp_path)):
        assert files.is_complete(path) == path.exists()
        assert not path.exists() or state(path) == ("new", "new")
        assert path.exists() or not survived


def test_a_folder_replaced_and_killed_anywhere_is_the_old_or_the_new(tmp_path: Path) -> None:
    path, seen, missing = tmp_path / "student", set(), 0

    def reset() -> None:
        remove(tmp_path)
        fill(path, "old")

    for n, survived in kills(lambda: fill(path, "new"), reset):
        missing += not path.exists()
        assert files.is_complete(path), f"killed at call {n}: nothing complete is left"
        assert state(path) in (("old", "old"), ("new", "new"))
        assert not survived or state(path) == ("new", "new")
        seen.add(state(path))
        if n % 5 == 0:  # the next writer copes with whatever the killed one left
            fill(path, "later")
            assert state(path) == ("later", "later")
            assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert len(seen) == 2
    assert missing > 0, "the gap between the two renames was never hit"


def test_a_writer_killed_after_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    """The second death must not cost the old folder that the first one had moved aside."""
    path = tmp_path / "student"

    def reset() -> None:
        remove(tmp_path)
        fill(path, "old")
        path.rename(path.with_name(".tmp-old-student"))  # as between the two renames

    for _ in kills(lambda: fill(path, "new"), reset):
        assert files.is_complete(path) and state(path) in (("old", "old"), ("new", "new"))


def test_a_journal_killed_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    path, torn = tmp_path / "journal", 0
    for _, survived in kills(lambda: files.append_line(path, "second line"), lambda: path.write_bytes(b"first\n")):
        content = path.read_bytes()
        assert b"first\nsecond line\n".startswith(content) and content.startswith(b"first\n")
        assert not survived or content == b"first\nsecond line\n"
        torn += not content.endswith(b"\n")
        whole = content[: content.rfind(b"\n") + 1]
        files.append_line(path, "third")
        assert path.read_bytes() == whole + b"third\n"  # never glued to half a line
    assert torn > 0, "no write was torn"
