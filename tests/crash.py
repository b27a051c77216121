"""Crashes on purpose: a forked child dies at its n-th durable operation, without a chance to tidy up."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

CRASHED = 77


def dies_at(n: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a forked child that exits hard just before its n-th fsync, rename or removal; False if it survived.

    Torn writes are the business of tests/test_files.py: they lie before the fsync of a file that has no name yet.
    """
    child = os.fork()
    if child == 0:
        left = [n]

        def strike() -> bool:
            left[0] -= 1
            return left[0] < 0

        def guard(real: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(*args: Any, **options: Any) -> Any:
                if strike():
                    os._exit(CRASHED)
                return real(*args, **options)

            return guarded

        for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, guard(getattr(os, name)))
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, CRASHED), f"the child failed by itself with {code}"
    return code == CRASHED
