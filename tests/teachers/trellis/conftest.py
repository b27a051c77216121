"""A folder of the official layout to spoil."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def copy(image_folder, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(image_folder, tmp_path / "copy")
