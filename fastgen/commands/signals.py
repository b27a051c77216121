"""SIGTERM and SIGINT: a run is asked to save and stop, any other command ends at once."""

from __future__ import annotations

import os
import signal
from typing import Any

_received: list[int] = []


def received() -> int | None:
    """The signal that asked a run to stop, if one did."""
    return _received[0] if _received else None


def end_at_once() -> None:
    """For commands that have nothing to save."""
    _on_signals(_end)


def ask_to_stop() -> None:
    """For runs, which look at `received`."""
    _on_signals(_ask)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _ask(number: int, frame: Any) -> None:
    """The first signal asks politely; the second one ends the process at once."""
    if _received:
        raise SystemExit(128 + number)
    _received.append(number)
    # Past Python's buffers: the signal may have come in the midst of a write to them.
    os.write(2, b"fastgen: stopping where the run can be continued; once more to stop at once\n")
