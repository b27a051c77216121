from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from fastgen.data.idx import Idx
from fastgen.errors import UserError


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 5, 4), dtype=np.uint8), rng.integers(0, 3, 7, dtype=np.uint8)


def save(folder, images, labels, stem="train", dot="-", packed=False):
    for what, array in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
        data = idx_bytes(array)
        path = folder / f"{stem}-{what}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_values_against_numpy(tmp_path, truth, packed, dot):
    images, labels = truth
    labels[2] = 2
    save(tmp_path, images, labels, dot=dot, packed=packed)
    data = Idx(tmp_path)
    batch = data.get(torch.tensor([6, 0, 6]))
    assert (len(data), data.shape, data.num_classes) == (7, (1, 5, 4), 3)
    np.testing.assert_allclose(batch["x0"].numpy()[:, 0], images[[6, 0, 6]] / 127.5 - 1, atol=1e-6)
    assert batch["label"].tolist() == labels[[6, 0, 6]].tolist()


def test_a_file_of_images_finds_its_labels(tmp_path, truth):
    save(tmp_path, *truth, stem="mine")
    assert len(Idx(tmp_path / "mine-images-idx3-ubyte")) == 7
    (tmp_path / "mine-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no file of labels beside it"):
        Idx(tmp_path / "mine-images-idx3-ubyte")


def test_the_test_split_is_the_t10k_files(tmp_path, truth):
    save(tmp_path, *truth, stem="t10k")
    assert len(Idx(tmp_path, "test")) == 7
    with pytest.raises(UserError, match=r"no train-images.*data\.split=test is there"):
        Idx(tmp_path)
    with pytest.raises(UserError, match="did you mean 'test'"):
        Idx(tmp_path, "tests")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [0, 3, 4, 15, 16, 17, 155])
def test_a_truncated_file_is_named(tmp_path, truth, packed, cut):
    save(tmp_path, *truth)
    path = tmp_path / "train-images-idx3-ubyte"
    data = path.read_bytes()[:cut]
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: (truncated|an IDX file)"):
        Idx(tmp_path)


def test_a_damaged_gzip_is_named(tmp_path, truth):
    save(tmp_path, *truth, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"images-idx3-ubyte\.gz: gzip data truncated or damaged"):
            Idx(tmp_path)


def test_wrong_contents_are_refused(tmp_path, truth):
    images, labels = truth
    save(tmp_path, images, labels)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(images) + b"x")
    with pytest.raises(UserError, match="longer than its header says"):
        Idx(tmp_path)
    path.write_bytes(b"\0\0\x0d\x03" + idx_bytes(images)[4:])  # floats
    with pytest.raises(UserError, match="begins 00000803, not 00000d03"):
        Idx(tmp_path)
    path.write_bytes(idx_bytes(images[:6]))
    with pytest.raises(UserError, match=r"6 images.*7 labels"):
        Idx(tmp_path)
    save(tmp_path, images[:0], labels[:0])
    with pytest.raises(UserError, match="no image"):
        Idx(tmp_path)


def test_a_label_beyond_the_classes_is_refused(tmp_path, truth):
    images, labels = truth
    labels[3] = 9
    save(tmp_path, images, labels)
    assert Idx(tmp_path, classes=12).num_classes == 12
    with pytest.raises(UserError, match=r"label 9 does not fit data\.classes=9"):
        Idx(tmp_path, classes=9)
