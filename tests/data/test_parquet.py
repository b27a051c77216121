from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data.parquet import Parquet
from fastgen.errors import UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

TRUTH = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PNGS = [png(pixels) for pixels in TRUTH]


def write(path, rows=range(10), layout="struct", labels=LABELS, images=PNGS, **options):
    coded = [images[i] for i in rows]
    columns = {
        "struct": {"image": [{"bytes": data, "path": None} for data in coded]},
        "flat": {"image.bytes": coded},
        "plain": {"image": coded},
    }[layout]
    if labels is not None:
        columns["label"] = [labels[i] for i in rows]
    pq.write_table(pa.table(columns), path, row_group_size=3, **options)
    return path


def expected(rows) -> np.ndarray:
    return TRUTH[list(rows)].transpose(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("layout", ["struct", "flat", "plain"])
def test_values_against_the_arrays_they_were_made_of(tmp_path, layout):
    data = Parquet(write(tmp_path / "a.parquet", layout=layout))
    rows = [9, 0, 4, 4, 7]
    batch = data.get(torch.tensor(rows))
    assert (len(data), data.shape, data.num_classes) == (10, (3, 6, 6), 10)
    np.testing.assert_allclose(batch["x0"], expected(rows), atol=1e-6)
    assert batch["label"].tolist() == [LABELS[i] for i in rows]


def test_a_folder_joins_the_files_of_its_split_in_order(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", range(4, 9))
    write(tmp_path / "train-00000-of-00002.parquet", range(4))
    write(tmp_path / "test.parquet", range(9, 10))
    data = Parquet(tmp_path)
    np.testing.assert_allclose(data.get(torch.arange(9))["x0"], expected(range(9)), atol=1e-6)
    assert len(Parquet(tmp_path, "test")) == 1
    with pytest.raises(UserError, match=r"no parquet file of split 'val' \(there: test\.parquet"):
        Parquet(tmp_path, "val")


def test_a_small_cache_changes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr("fastgen.data.pixels.KEPT_BYTES", 0)
    monkeypatch.setattr("fastgen.data.parquet.CACHE_BYTES", 1)
    data = Parquet(path)
    for _ in range(2):
        np.testing.assert_allclose(data.get(torch.arange(9, -1, -1))["x0"], expected(range(9, -1, -1)), atol=1e-6)
        assert len(data.tables._cache) == 1


def test_without_labels_there_is_no_label(tmp_path):
    data = Parquet(write(tmp_path / "a.parquet", labels=None))
    assert data.num_classes is None and set(data.get(torch.arange(2))) == {"x0"}


def test_size_and_channels(tmp_path):
    data = Parquet(write(tmp_path / "a.parquet"), size=6, channels=1)
    luma = TRUTH @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(data.get(torch.arange(10))["x0"][:, 0], luma / 127.5 - 1, atol=1.01 / 127.5)


def test_a_bad_row_is_refused_by_file_and_row(tmp_path):
    images = list(PNGS)
    images[4] = images[4][:30]
    data = Parquet(write(tmp_path / "a.parquet", images=images))
    with pytest.raises(UserError, match=r"a\.parquet row 4 \(the first is 0\): not a readable image"):
        data.get(torch.arange(10))
    images[4] = None
    with pytest.raises(UserError, match=r"a\.parquet row 4 .*holds no image bytes"):
        Parquet(write(tmp_path / "a.parquet", images=images)).get(torch.arange(10))


def test_rows_count_within_their_own_file(tmp_path):
    images = list(PNGS)
    images[7] = b"broken"
    write(tmp_path / "train-0.parquet", range(5))
    write(tmp_path / "train-1.parquet", range(5, 10), images=images)
    with pytest.raises(UserError, match=r"train-1\.parquet row 2 "):
        Parquet(tmp_path).get(torch.arange(10))


def test_skipping_reports_each_bad_row_once(tmp_path, caplog):
    images, labels = list(PNGS), list(LABELS)
    images[4], images[9], labels[5] = b"broken", None, None
    path = write(tmp_path / "a.parquet", images=images, labels=labels)
    with pytest.raises(UserError, match=r"row 5 .*no label in range"):
        Parquet(path)
    with caplog.at_level(logging.WARNING):
        data = Parquet(path, on_bad="skip")
        for _ in range(2):
            batch = data.get(torch.arange(10))
    taken = [0, 1, 2, 3, 6, 6, 6, 7, 8, 0]
    np.testing.assert_allclose(batch["x0"], expected(taken), atol=1e-6)
    assert batch["label"].tolist() == [labels[i] for i in taken]
    assert sorted(r.getMessage().split(" row ")[1][0] for r in caplog.records) == ["4", "5", "9"]


def test_a_damaged_row_group_costs_only_its_rows(tmp_path, caplog):
    path = write(
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    whole = path.read_bytes()
    at = whole.index(PNGS[4][20:])  # inside the second group, rows 3 to 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"a\.parquet row 3 .*its row group 1 cannot be read"):
        Parquet(path).get(torch.arange(10))
    with caplog.at_level(logging.WARNING):
        batch = Parquet(path, on_bad="skip").get(torch.arange(10))
    np.testing.assert_allclose(batch["x0"], expected([0, 1, 2, 6, 6, 6, 6, 7, 8, 9]), atol=1e-6)
    assert len(caplog.records) == 3


def test_labels_must_fit(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert Parquet(path, classes=20).num_classes == 20
    with pytest.raises(UserError, match=r"row 5 .*no label in range"):  # the first 9
        Parquet(path, classes=9)
    with pytest.raises(UserError, match="column 'label' holds string"):
        Parquet(write(tmp_path / "b.parquet", labels=["cat"] * 10))


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.parquet: not a whole parquet file"):
        Parquet(path)
    pq.write_table(pa.table({"picture": PNGS, "label": LABELS}), path)
    with pytest.raises(UserError, match=r"no column 'image'.*its columns are picture, label"):
        Parquet(path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(UserError, match="holds no row"):
        Parquet(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package 'pyarrow': pip install 'fastgen-distill\[data\]'"):
        Parquet(tmp_path)
