"""Files that are whole or absent: the order of durable calls, full disks, unwritable places, damage, hashes."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from fastgen import files
from fastgen.errors import RunFailed, UserError

# --- one file


def test_bytes_are_durable_before_their_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what was not synced: the order of calls is all there is to protect against it."""
    log = watch(monkeypatch)
    files.write_atomic(tmp_path / "one", "text")
    assert log == [("fsync", ".tmp-one"), ("replace", "one"), ("fsync", tmp_path.name)]
    log.clear()
    with files.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        (temporary / "b").write_text("b")
    names = [name for call, name in log if call == "fsync"]
    at = log.index(("rename", "folder"))
    assert {name for _, name in log[:at]} == {"COMPLETE", "a", "b", "sub", ".tmp-folder"}
    assert log[at + 1 :] == [("fsync", tmp_path.name)] and len(names) == 6
    log.clear()
    files.append_line(tmp_path / "journal", "first")
    files.append_line(tmp_path / "journal", "second")
    assert log == [("fsync", "journal"), ("fsync", tmp_path.name), ("fsync", "journal")]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    log: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(descriptor: int) -> None:
        log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, lambda a, b, name=name: (log.append((name, Path(b).name)), real[name](a, b))[1])
    return log


# --- folders


def fill(path: Path, text: str) -> None:
    with files.atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        for name in ("one", "sub/two"):
            with open(temporary / name, "w") as file:
                file.write(text)


def state(path: Path) -> tuple[str, ...]:
    return tuple((path / name).read_text() for name in ("one", "sub/two"))


def test_an_error_in_the_body_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "student"
    fill(path, "old")
    for error in (ValueError("body"), KeyboardInterrupt(), PermissionError("another file's")):
        with pytest.raises(type(error)), files.atomic_folder(path) as temporary:
            (temporary / "one").write_text("half")
            raise error
        assert state(path) == ("old", "old") and [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_folder_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "deep" / "student") as temporary:
        assert not (tmp_path / "deep" / "student").exists() and temporary.parent == tmp_path / "deep"
    assert (tmp_path / "deep" / "student" / "COMPLETE").exists()


def test_the_folder_that_one_stands_in_is_asked_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not files.is_complete(".")
    (tmp_path / files.COMPLETE).touch()
    assert files.is_complete(".") and files.is_complete(tmp_path)


def test_what_others_made_is_never_replaced(tmp_path: Path) -> None:
    """`out=` set to a home folder must not delete it."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "home" / "letters").mkdir(parents=True)
    for name in ("file", "home"):
        with pytest.raises(UserError, match="not made by fastgen"), files.atomic_folder(tmp_path / name):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "precious" and (tmp_path / "home" / "letters").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"file", "home"}
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new")
    assert state(tmp_path / "empty") == ("new", "new")


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "student", os.rename
    fill(path, "old")

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp-student":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RunFailed, match="no space left"):
        fill(path, "new")
    assert state(path) == ("old", "old") and [p.name for p in tmp_path.iterdir()] == ["student"]


# --- journals


def test_a_journal_that_holds_half_a_line_alone_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"hal")
    files.append_line(tmp_path / "journal", "première")
    assert (tmp_path / "journal").read_bytes() == "première\n".encode()


# --- refusals of the operating system


WRITERS: dict[str, Callable[[Path], Any]] = {
    "file": lambda path: files.write_atomic(path, "new" * 1000),
    "journal": lambda path: files.append_line(path, "new" * 1000),
    "folder": lambda path: fill(path, "new"),
    "make": lambda path: files.make_folder(path),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


@every_writer
@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, RunFailed, "no space left on the device; free some"),
        (errno.EDQUOT, RunFailed, "no space left"),
        (errno.EACCES, UserError, "cannot be written"),
        (errno.EROFS, UserError, "cannot be written"),
        (errno.EIO, OSError, ""),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "mkdir"])
def test_refusals_are_told_in_one_line(
    name: str, code: int, kind: type, message: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, for root may write anywhere."""
    path = tmp_path / "goal"
    happened = refuse(monkeypatch, call, code)
    try:
        WRITERS[name](path)
    except Exception as error:
        assert happened
        if name == "folder" and code in (errno.EACCES, errno.EROFS) and call in ("open", "write"):
            assert isinstance(error, OSError | UserError)  # the body's own error is not about the folder
        else:
            assert type(error) is kind or kind is OSError
            assert message in str(error) and (kind is OSError or str(path) in str(error))
    else:
        assert not happened  # this writer makes no such call
    assert not happened or name in ("journal", "make") or not path.exists()


class Unwritable:
    """A file that opens, reads and closes, but whose every write fails."""

    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> Unwritable:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> list[str]:
    """Let every call of that name fail; what it was asked is noted."""
    happened: list[str] = []

    def fail(*args: Any, **options: Any) -> Any:
        happened.append(call)
        raise OSError(code, os.strerror(code))

    if call == "write":
        real = builtins.open

        def opened(*args: Any, **options: Any) -> Any:
            return Unwritable(real(*args, **options), fail)

        monkeypatch.setattr(builtins, "open", opened)
    elif call == "open":
        monkeypatch.setattr(builtins, "open", fail)
    else:
        monkeypatch.setattr(os, call, fail)
    return happened


def test_the_full_disks_of_foreign_writers_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their words on a real tmpfs that was too small: neither raises an OSError."""
    safetensors = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    torch_save = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    for error, free in ((safetensors, 1 << 30), (torch_save, 0), (torch_save, 1 << 30), (ValueError("?"), 0)):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        kind = RunFailed if error is safetensors or (error is torch_save and free == 0) else type(error)
        with pytest.raises(kind), files.atomic_folder(tmp_path / "goal"):
            raise error
        assert not list(tmp_path.iterdir())


def test_everything_in_a_folder_is_as_readable_as_the_umask_lets_it(tmp_path: Path) -> None:
    """safetensors leaves mode 0600, which another user's server cannot read."""
    with files.atomic_folder(tmp_path / "goal") as temporary:
        (temporary / "w.safetensors").touch(mode=0o600)
        (temporary / "plain").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "goal").iterdir()}
    assert modes["w.safetensors"] == modes["plain"] == modes["COMPLETE"] != 0o600


def test_a_full_disk_keeps_the_old_file_and_leaves_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "goal").write_text("old")
    for call in ("write", "fsync", "replace"):
        with monkeypatch.context() as patched:
            refuse(patched, call, errno.ENOSPC)
            with pytest.raises(RunFailed):
                files.write_atomic(tmp_path / "goal", "new")
        assert (tmp_path / "goal").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["goal"]


@every_writer
def test_a_file_in_the_way_is_the_users_business(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        WRITERS[name](tmp_path / "file" / "goal")
    if name in ("make", "folder"):
        with pytest.raises(UserError, match="file"):
            WRITERS[name](tmp_path / "file")
    else:
        (tmp_path / "taken").mkdir()
        with pytest.raises(UserError, match="taken"):
            WRITERS[name](tmp_path / "taken")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_unwritable_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.make_folder(tmp_path / "a" / "b").is_dir()
    assert files.make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="cannot be written"):
        files.make_folder(tmp_path / "a")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused_by_the_system_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for name, writer in WRITERS.items():
        with pytest.raises(UserError, match="cannot be written"):
            writer(tmp_path / name)


# --- reading


def test_json_is_strict_and_its_damage_is_told(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [1, 0.1, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"x": [1, 0.1, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert files.read_json(tmp_path / "a.json") == {"x": [1, 0.1, "é"]}
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        files.read_json(tmp_path / "b.json")
    for content in (b"", b"{", b"\xff\xff\xff"):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.json: not readable as JSON"):
            files.read_json(tmp_path / "b.json")


def test_the_hash_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "weights").write_bytes(data)
    assert files.sha256(tmp_path / "weights") == hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match="no such file or folder"):
        files.sha256(tmp_path / "nothing")


def test_the_hash_of_a_folder_sees_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    def folder(name: str, **contents: str) -> Path:
        (tmp_path / name / "sub").mkdir(parents=True)
        for file, content in contents.items():
            (tmp_path / name / file.replace("__", "/")).write_text(content)
        return tmp_path / name

    base = files.sha256(folder("base", a="x", b="y", sub__c="z"))
    assert files.sha256(folder("same", sub__c="z", b="y", a="x")) == base
    marked = folder("marked", a="x", b="y", sub__c="z", COMPLETE="")
    (marked / ".cache").mkdir()
    (marked / ".cache" / "d").write_text("?")
    assert files.sha256(marked) == base
    others = [
        folder("content", a="x", b="Y", sub__c="z"),
        folder("renamed", a="x", d="y", sub__c="z"),
        folder("moved", a="x", b="y", c="z"),
        folder("fewer", a="x", b="y"),
        folder("swapped", a="y", b="x", sub__c="z"),
        folder("glued", a="xb\0y", sub__c="z"),  # names and contents must not run into each other
    ]
    hashes = {files.sha256(other) for other in others}
    assert len(hashes) == len(others) and base not in hashes


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([True]),
        "c": torch.zeros(0, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    found = files.load_tensors(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("head", [b"\x80", b"PK"])
def test_a_good_file_may_begin_like_a_pickle(head: bytes, tmp_path: Path) -> None:
    """Its first bytes are the length of its header: 128, 384, ... begin with 0x80, 19280 reads as PK."""
    length = int.from_bytes(head, "little")
    for filling in range(length):
        data = save({"x": torch.ones(2)}, {"filling": "y" * (length - filling)})
        if data[:8] == length.to_bytes(8, "little"):
            break
    else:
        pytest.fail("no such header")
    (tmp_path / "w.safetensors").write_bytes(data)
    assert files.load_tensors(tmp_path / "w.safetensors")["x"].tolist() == [1, 1]


def test_damaged_and_dangerous_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"w\.safetensors: no such file"):
        files.load_tensors(path)
    with pytest.raises(UserError, match="no such file"):
        files.load_tensors(tmp_path)
    good = save({"a": torch.ones(100)})
    for data in (good[:-1], good[:40], good[:5], b"", b"\xff" * 100, b"<html>404</html>"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"w\.safetensors: not a whole safetensors file") as caught:
            files.load_tensors(path)
        assert "\n" not in str(caught.value)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"w\.safetensors: a pickle.*convert it"):
        files.load_tensors(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="a pickle"):
        files.load_tensors(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="a pickle"):
        files.load_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match="a pickle"):
        files.load_tensors(path)
