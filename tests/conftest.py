"""What holds for every test: one thread, no network, a torch whose neighbours fit it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Before the first import of torch or a Hugging Face library, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from fastgen.doctor import torchvision_problem

torch.set_num_threads(1)


def pytest_configure() -> None:
    """A torchvision that does not fit would make hundreds of tests fail at an import, none naming the cause."""
    if problem := torchvision_problem():
        pytest.exit(problem, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: collections, which timed calls force, need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def trellis_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny TRELLIS folders of the official layout, one for pictures and one for texts."""
    from fastgen.zoo import trellis

    root = tmp_path_factory.mktemp("trellis")
    for name in ("trellis-image-large", "trellis-text-base"):
        trellis.write(root / name, name)
    return root


@pytest.fixture(scope="session")
def image_folder(trellis_folders: Path) -> Path:
    return trellis_folders / "trellis-image-large"


@pytest.fixture(scope="session")
def text_folder(trellis_folders: Path) -> Path:
    return trellis_folders / "trellis-text-base"
