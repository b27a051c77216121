"""The two ways a run ends badly, and the words for the commonest mistakes."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, how to mend it. The CLI prints it and exits with 2."""


class RunFailed(Exception):
    """A run that began well and cannot go on; the message says what was saved. The CLI prints it and exits with 1."""


def suggestion(name: str, names: Iterable[str]) -> str:
    """The tail of an unknown-name message: the nearest valid name, or all of them."""
    known = sorted(str(n) for n in names)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def first_line(error: BaseException) -> str:
    """What a library says of its error, cut to a line that fits into ours; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package '{module}': pip install 'fastgen-distill[{extra}]'") from error


class Stopped(Exception):
    """A signal asked for an end; the message says what was saved. The CLI exits with 128 + the signal's number."""
