"""Files that are whole or absent: every durable write of the project goes through here.

The order is always the same: write beside the goal, fsync the bytes, rename, fsync the folder that holds the name. A
process killed at any instant leaves either the old state or the new one, and at most a leftover whose name begins with
`.tmp-`, which the next writer removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastgen.errors import RunFailed, UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

COMPLETE = "COMPLETE"
# What safetensors calls torch's types.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"} | {
    f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)
}
_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _space_explained(path: Path) -> Iterator[None]:
    """Turn a full disk into one line that names the file and the mend."""
    try:
        yield
    except Exception as error:
        if _out_of_space(error, path.parent):
            mend = "free some and run it again, a run with --resume"
            raise RunFailed(f"{path}: no space left on the device; {mend}") from error
        raise


def _out_of_space(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, RuntimeError):  # torch.save says no more than "unexpected pos"
        return folder.exists() and shutil.disk_usage(folder).free < 1 << 20
    return f"os error {errno.ENOSPC}" in str(error)  # safetensors


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the file and the mend."""
    try:
        with _space_explained(path):
            yield
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
            raise UserError(f"{path}: a file stands where a folder is needed, or a folder; move it away") from error
        raise


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents; unwritable places are refused with a UserError."""
    path = Path(path)
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def refuse_unwritable(path: str | Path) -> None:
    """As `make_folder` refuses, as far as can be told without making anything."""
    path = Path(path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    with _explained(path):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace one file by new content, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    with _explained(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # half a file on a full disk helps nobody
            raise
        _fsync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `path`, marked COMPLETE; on an error it is removed.

    A folder that this function made before is replaced, once the new one is durable; any other that holds something,
    or a file, is the user's own and refused.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    with _explained(path):
        if not is_complete(path) and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path}: something not made by fastgen stands here; move it away, or choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with _space_explained(path):
            yield temporary
        with _explained(path):
            _seal(temporary)
            _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(folder: Path) -> None:
    """Mark a folder complete and make all of it durable."""
    mark = folder / COMPLETE
    mark.touch()
    for entry in sorted(folder.rglob("*")):
        if entry.is_file() and entry.stat().st_nlink == 1:  # what is linked has another owner
            entry.chmod(mark.stat().st_mode)  # safetensors leaves its files to their owner alone
        _fsync(entry)
    _fsync(folder)


def _swap(new: Path, path: Path) -> None:
    """Put a durable folder in the place of another. Between the two renames `path` is missing: see `is_complete`."""
    old = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(path: str | Path) -> bool:
    """Whether `atomic_folder` finished this folder. One that was being replaced when the power went is put back."""
    path = Path(path)
    path = path if path.name else path.resolve()  # "." has none
    old = path.parent / f".tmp-old-{path.name}"
    if not path.exists() and (old / COMPLETE).exists():
        os.rename(old, path)
    return (path / COMPLETE).exists()


def append_line(path: str | Path, line: str) -> None:
    """Add one line to a journal and make it durable; half a line that a killed writer left at the end is cut off."""
    path = Path(path)
    with _explained(path), open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size and not _ends_whole(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not size:
            _fsync(path.parent)


def _ends_whole(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (no NaN), atomically."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a UserError that names it."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def peek_json(path: str | Path) -> dict[str, Any]:
    """A JSON mapping, or an empty one for whatever else is there."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256(path: str | Path) -> str:
    """Hash of a file's bytes, or of a folder's file names and contents (COMPLETE marks and hidden files left out)."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != COMPLETE):
        relative = file.relative_to(path)
        if not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{sha256(file)} {relative.as_posix()}\n".encode())
    return digest.hexdigest()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it `load_tensors` reads headers alone, and its tensors lie on the meta device: shapes without values."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _shapes(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return {
            name: torch.empty(part.get_shape(), dtype=getattr(torch, DTYPES[part.get_dtype()]), device="meta")
            for name, part in slices.items()
        }


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; missing, truncated and pickled files are UserErrors that name the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return _shapes(path) if _shapes_only.get() else load_file(path)
    except (SafetensorError, OSError) as error:
        # The length of a safetensors header may begin with a pickle's bytes, but then the header's brace follows it.
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
            raise UserError(f"{path}: a pickle, which can run code when read; convert it to safetensors") from error
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch or make it again") from error


def load_pickled(path: str | Path, *, mend: str = "fetch it again") -> dict[str, Tensor]:
    """Tensors of a pickled state dict (.pt, .pth), on the CPU; code in the pickle is not run.

    Whatever is no plain dict of tensors is a UserError that names the file; mend: the words for what to do then.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {mend}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds something else than tensors, and reading it could run code; {mend}") from error
    except Exception as error:  # torch's reader of pickles falls over foreign bytes in many ways
        raise UserError(f"{path}: not a whole file of weights ({first_line(error)}); {mend}") from error
    entries = found.items() if isinstance(found, dict) else ()
    odd = next((str(key) for key, value in entries if not isinstance(value, torch.Tensor)), None)
    if not entries or odd is not None:
        told = f"its entry '{odd}' is no tensor" if odd is not None else f"it holds a {type(found).__name__}"
        raise UserError(f"{path}: not a state dict ({told}); {mend}")
    return dict(entries)
