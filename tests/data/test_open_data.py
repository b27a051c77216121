from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.config import validate
from fastgen.data import DataConfig, open_data
from fastgen.errors import UserError


def images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(folder / f"{i}.png")


def idx(folder):
    head = b"\0\0\x08\x03" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") * 2
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(18)))
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (2).to_bytes(4, "big") + bytes([1, 0]))


def parquet(folder):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    images(folder)
    coded = [{"bytes": (folder / f"{i}.png").read_bytes()} for i in range(2)]
    for i in range(2):
        (folder / f"{i}.png").unlink()
    pq.write_table(pa.table({"image": coded, "label": [0, 1]}), folder / "train.parquet")


@pytest.mark.parametrize(
    ("make", "inside", "shape", "classes"),
    [
        (images, "", (3, 4, 6), None),
        (lambda folder: images(folder / "fox"), "", (3, 4, 6), 1),
        (idx, "", (1, 3, 3), 2),
        (idx, "train-images-idx3-ubyte.gz", (1, 3, 3), 2),
        (parquet, "", (3, 4, 6), 2),
        (parquet, "train.parquet", (3, 4, 6), 2),
    ],
)
def test_auto_sees_what_is_there(tmp_path, make, inside, shape, classes):
    make(tmp_path)
    data = open_data(DataConfig(path=str(tmp_path / inside)))
    batch = data.get(torch.tensor([1]))
    assert (data.shape, data.num_classes, len(data)) == (shape, classes, 2)
    assert batch["x0"].shape[1:] == shape and ("label" in batch) == (classes is not None)


def test_without_a_path_the_shipped_digits():
    assert len(open_data(DataConfig(split="held_out"))) == 397
    assert open_data(DataConfig(kind="digits")).shape == (1, 8, 8)


def test_synthetic_takes_its_shape_from_the_config():
    data = open_data(DataConfig(kind="synthetic", size=16, channels=1, classes=4, rows=20))
    assert (data.shape, data.num_classes, len(data)) == ((1, 16, 16), 4, 20)


def test_the_fields_reach_the_reader(tmp_path):
    images(tmp_path)
    (tmp_path / "0.png").write_bytes(b"broken")
    data = open_data(DataConfig(path=str(tmp_path), size=2, channels=1, on_bad="skip"))
    assert data.get(torch.tensor([0]))["x0"].shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "NOWHERE"}, "NOWHERE: no such file or folder; understood are a folder of"),
        ({"path": "empty"}, "empty folder; understood are"),
        ({"path": "odd"}, r"nothing known here \(found model\.bin\); understood are"),
        ({"path": "odd/model.bin"}, r"nothing known here \(found model\.bin\)"),
        ({"path": "pairs"}, "a set of pairs, not of images"),
        ({"kind": "parquet"}, r"data\.kind=parquet needs data\.path"),
        ({"kind": "folder", "path": "odd/model.bin"}, "not a folder of images"),
        ({"kind": "digits", "size": 16}, r"data\.size is not used by kind=digits \(it uses split\)"),
        ({"kind": "synthetic", "path": "odd"}, r"data\.path is not used by kind=synthetic"),
        ({"path": "odd/x.parquet", "split": "test"}, r"data\.split=test chooses among the files of a folder"),
        ({"split": "test"}, r"data\.split=test: the digits have no such split \(known: all, held_out, train\)"),
    ],
)
def test_mistakes_say_how_to_mend_them(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "odd", "pairs"):
        (tmp_path / folder).mkdir()
    for file in ("odd/model.bin", "pairs/shard-000000.safetensors", "empty/.DS_Store"):
        (tmp_path / file).write_bytes(b"x")
    if "x.parquet" in str(fields):
        (tmp_path / "odd/x.parquet").write_bytes(b"x")
    (tmp_path / "pairs/manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(**fields))


def test_unknown_and_ill_typed_keys_are_refused():
    with pytest.raises(UserError, match=r"unknown key 'on_badd'.*did you mean 'on_bad'"):
        validate(DataConfig, {"on_badd": "skip"}, "x")
    for fields in ({"channels": 2}, {"size": 0}, {"kind": "tar"}, {"on_bad": "ignore"}):
        with pytest.raises(UserError):
            validate(DataConfig, fields, "x")


def test_the_config_needs_neither_torch_nor_an_image_library():
    code = "import sys, fastgen.data; print([m for m in ('torch', 'PIL', 'pyarrow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
