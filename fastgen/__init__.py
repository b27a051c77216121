"""Distil slow diffusion and flow teachers into 1-4 step students.

Importing this package loads neither torch nor diffusers; `fastgen.load` and its siblings bring them when first used.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.api import load, load_student, load_teacher

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_student", "load_teacher"]

ROOT_FOLDERS = ("trainers", "samplers", "eval", "configs")


class _CheckoutFinder:
    """Finds `fastgen.trainers` and its three siblings at the top of a checkout; a wheel has them inside `fastgen`.

    Appending the checkout to `__path__` would do the same, and make `fastgen.tests` and `fastgen.docs` importable too.
    """

    root = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, folder = name.partition(".")
        if package != __name__ or folder not in ROOT_FOLDERS:
            return None
        return PathFinder.find_spec(name, [str(cls.root)])


# A folder `trainers` beside site-packages/fastgen would be somebody else's: pyproject.toml tells a checkout.
if (_CheckoutFinder.root / "pyproject.toml").is_file() and (_CheckoutFinder.root / "trainers").is_dir():
    sys.meta_path.append(_CheckoutFinder)


def __getattr__(name: str) -> Any:
    if name in ("load", "load_student", "load_teacher"):
        from fastgen import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastgen' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
