"""Tiny folders of the official layout, made once a session."""

from __future__ import annotations

import shutil

import pytest

from fastgen.zoo import trellis


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    root = tmp_path_factory.mktemp("trellis")
    for name in ("trellis-image-large", "trellis-text-base"):
        trellis.write(root / name, name)
    return root


@pytest.fixture(scope="session")
def image_folder(_made):
    return _made / "trellis-image-large"


@pytest.fixture(scope="session")
def text_folder(_made):
    return _made / "trellis-text-base"


@pytest.fixture
def copy(image_folder, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(image_folder, tmp_path / "copy")
