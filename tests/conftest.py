"""What holds for every test: one thread, no network, a torch whose neighbours fit it."""

from __future__ import annotations

import gc
import os

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
