"""Which library computes sparse convolution and ragged attention: torch, unless another is asked for by name.

    with use(conv="spconv", attention="xformers"): ...      for a while
    use(attention="flash_attn")                             from now on

All agree with the torch back end up to rounding; that one alone knows derivatives along a path and higher derivatives.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from fastgen.errors import UserError, first_line, suggestion

logger = logging.getLogger("fastgen")

CONV = {"torch": None, "spconv": "spconv.pytorch"}
ATTENTION = {"torch": None, "xformers": "xformers.ops", "flash_attn": "flash_attn"}
INSTALL = {
    "spconv": "pip install spconv-cu120 (or spconv for a CPU)",
    "xformers": "pip install 'fastgen-distill[xformers]'",
    "flash_attn": "pip install flash-attn --no-build-isolation",
}


@dataclass(frozen=True)
class Choice:
    """The names in force."""

    conv: str = "torch"
    attention: str = "torch"


_now = Choice()


def chosen() -> Choice:
    """What is in force."""
    return _now


class use:
    """Choose at once; as a context manager, until its end. None leaves a choice as it is.

    UserError for an unknown name, and for a library that cannot be imported here.
    """

    def __init__(self, *, conv: str | None = None, attention: str | None = None) -> None:
        global _now
        self._before = _now
        _check("conv", conv, CONV)
        _check("attention", attention, ATTENTION)
        _now = replace(_now, conv=conv or _now.conv, attention=attention or _now.attention)
        if _now != self._before:
            logger.info("sparse back ends: %s", describe())

    def __enter__(self) -> Choice:
        return _now

    def __exit__(self, *_error: object) -> None:
        global _now
        _now = self._before


def describe() -> str:
    """What is in force in one line, with versions."""
    return f"convolution by {_versioned(_now.conv)}, attention by {_versioned(_now.attention)}"


def available() -> dict[str, str]:
    """Every optional library by name: its version where it can be imported, else why not."""
    found = {}
    for name, module in {**CONV, **ATTENTION}.items():
        if module is not None:
            try:
                importlib.import_module(module)
                found[name] = _versioned(name)
            except Exception as error:  # a broken binary raises anything at all
                found[name] = f"absent ({type(error).__name__}: {first_line(error)})"
    return found


def _check(what: str, name: str | None, known: dict[str, str | None]) -> None:
    if name is None:
        return
    if name not in known:
        raise UserError(f"sparse back end {what}={name}: unknown; {suggestion(name, known)}")
    if (module := known[name]) is not None:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise UserError(
                f"sparse back end {what}={name} is not here: {INSTALL[name]}; or use {what}=torch"
            ) from error


def _versioned(name: str) -> str:
    for package in (name, f"{name}-cu120", f"{name}-cu118"):
        try:
            return f"{name} {version(package)}"
        except PackageNotFoundError:
            continue
    return name
