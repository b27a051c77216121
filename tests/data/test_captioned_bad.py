"""Every way a captioned sample can be bad: one line that names it and says what is expected, or left out if asked for.

Each case spoils one of the four layouts; sample 03 is the one that is bad afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import re

import pytest
import torch

from fastgen.errors import UserError
from fastgen.inspection import inspect
from tests.data import captioned_sets
from tests.data.captioned_sets import ALL, CAPTIONS, LAYOUTS, load, samples


def replace(path, old: bytes, new: bytes):
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def image_of(root, key="03-fox"):
    return next(p for p in root.glob(f"{key}.*") if p.suffix != ".txt")


def lines(root, change):
    """metadata.jsonl with `change` made to the line of sample 03, which is the tenth."""
    path = root / "metadata.jsonl"
    told = path.read_text().splitlines()
    assert '"03-fox' in told[9]
    told[9] = change(told[9])
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in told))


def entry(**fields):
    return lambda line: json.dumps({k: v for k, v in (json.loads(line) | fields).items() if v is not None})


def rows(root, **changes):
    """The parquet files with sample 03, row 3 of the first, changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(root / "train-0.parquet")
    columns = table.to_pydict()
    for name, value in changes.items():
        columns[name][3] = value
    types = table.schema.set(1, pa.field("text", pa.binary())) if "text" in changes else table.schema
    columns["text"] = [t.encode() if isinstance(t, str) and "text" in changes else t for t in columns["text"]]
    table = pa.table(columns, schema=types)
    if "text" in changes:  # unchecked, as a careless writer would leave it
        table = table.set_column(1, "text", table["text"].combine_chunks().view(pa.string()))
    pq.write_table(table, root / "train-0.parquet", row_group_size=3)


def members(root, change):
    """Tar 1 with the members of sample 03 (its last but two) replaced by `change` of them."""
    made, keys = samples(), list(samples())[5:]
    found = []
    for key in keys:
        mine = [(f"{key}.{ending}", data) for ending, data in captioned_sets.members(made[key], "json")]
        found += change(mine) if key == "03-fox" else mine
    captioned_sets.tar(root / "1.tar", found)


def link(root):
    image_of(root).unlink()
    os.symlink("absent.jpg", root / "03-fox.png")


BESIDE = r"; each image NAME\.jpg, \.jpeg, \.png or \.webp has its caption in NAME\.txt beside it; mend"
LINE = r"metadata\.jsonl line 10: "
METADATA = r'; a line of metadata\.jsonl is \{"file_name": "NAME\.jpg", "text": "\.\.\."\}, its file inside'
ROW = r"train-0\.parquet row 3 \(the first is 0\): "
PARQUET = r"; a row has its image's bytes in 'image' \(or 'image\.bytes'\) and its caption in 'text' \(or 'caption'\)"
TAR = r"1\.tar member 03-fox\."
TARS = r"; a sample is KEY\.jpg, \.jpeg, \.png or \.webp and beside it KEY\.txt, or KEY\.json with the key text"

BAD = {
    "no text": ("beside", lambda root: (root / "03-fox.txt").unlink(), r"03-fox\.\w+: no caption .*" + BESIDE),
    "no image": ("beside", lambda root: image_of(root).unlink(), r"03-fox\.txt: no image beside it" + BESIDE),
    "empty text": ("beside", lambda root: (root / "03-fox.txt").write_text(" \n"), r"03-fox\.txt: an empty caption"),
    "latin-1": (
        "beside",
        lambda root: (root / "03-fox.txt").write_bytes(b"\xfc"),
        r"03-fox\.txt: .*not UTF-8.*" + BESIDE,
    ),
    "two images": (
        "beside",
        lambda root: (root / "03-fox.jpeg").write_bytes(b"x"),
        r"03-fox\.\w+: 03-fox\.\w+ has the same caption file 03-fox\.txt" + BESIDE,
    ),
    "dead link": ("beside", link, r"03-fox\.png: No such file"),
    "broken": ("beside", lambda root: image_of(root).write_bytes(b"GIF"), r"03-fox\.\w+: not a readable image"),
    "no json": ("metadata", lambda root: lines(root, lambda _: '{"file_name": '), LINE + "not JSON .*" + METADATA),
    "no object": ("metadata", lambda root: lines(root, lambda _: "[]"), LINE + "not a JSON object"),
    "no name": ("metadata", lambda root: lines(root, entry(file_name=None)), LINE + "no file name under 'file_name'"),
    "no caption": ("metadata", lambda root: lines(root, entry(text=None)), LINE + "no text under 'text'.*" + METADATA),
    "number": ("metadata", lambda root: lines(root, entry(text=5)), LINE + "no text under 'text'"),
    "blank": ("metadata", lambda root: lines(root, entry(text=" ")), LINE + "an empty caption"),
    "surrogate": ("metadata", lambda root: lines(root, entry(text="\ud800")), LINE + "the caption is not UTF-8"),
    "bytes": ("metadata", lambda root: lines(root, lambda line: line.encode() + b"\xfc"), LINE + "not UTF-8"),
    "absent": (
        "metadata",
        lambda root: lines(root, entry(file_name="a/b.png")),
        LINE + r"file_name 'a/b\.png': no such",
    ),
    "long": ("metadata", lambda root: lines(root, entry(file_name="a" * 999)), LINE + "file_name 'a+': no such"),
    "nul": ("metadata", lambda root: lines(root, entry(file_name="a\0b")), LINE + "no file name under"),
    "outside": (
        "metadata",
        lambda root: lines(root, entry(file_name="a/../../beside/03.png")),
        LINE + r"file_name 'a/\.\./\.\./beside/03\.png' leads out of the folder" + METADATA,
    ),
    "absolute": ("metadata", lambda root: lines(root, entry(file_name="/etc/passwd")), LINE + "file_name .* leads out"),
    "damaged": ("metadata", lambda root: image_of(root).write_bytes(b"\x89PNG"), r"03-fox\.\w+: not a readable image"),
    "null text": ("parquet", lambda root: rows(root, text=None), ROW + "no caption" + PARQUET),
    "empty row": ("parquet", lambda root: rows(root, text=" "), ROW + "an empty caption"),
    "bad string": ("parquet", lambda root: rows(root, text=b"\xfc"), ROW + "the caption is not UTF-8.*" + PARQUET),
    "null image": ("parquet", lambda root: rows(root, image=None), ROW + "holds no image bytes"),
    "bad image": (
        "parquet",
        lambda root: rows(root, image={"bytes": b"x", "path": None}),
        ROW + "not a readable image",
    ),
    "image only": ("tars", lambda root: members(root, lambda m: m[:1]), TAR + r"\w+: no caption: .*has \w+" + TARS),
    "json only": (
        "tars",
        lambda root: members(root, lambda m: m[1:]),
        TAR + r"json: .*has no image \(it has json\)" + TARS,
    ),
    "two": (
        "tars",
        lambda root: members(root, lambda m: [*m, m[0]]),
        TAR + r"\w+: sample '03-fox' has two images" + TARS,
    ),
    "tar latin-1": (
        "tars",
        lambda root: members(root, lambda m: [m[0], ("03-fox.txt", b"\xfc")]),
        TAR + r"txt: the caption is not UTF-8",
    ),
    "tar json": (
        "tars",
        lambda root: members(root, lambda m: [m[0], ("03-fox.json", b"{")]),
        TAR + r"json: not JSON",
    ),
    "tar key": (
        "tars",
        lambda root: members(root, lambda m: [m[0], ("03-fox.json", b'{"prompt": "a"}')]),
        TAR + r"json: no text under 'text' or 'caption'" + TARS,
    ),
    "tar image": (
        "tars",
        lambda root: members(root, lambda m: [(m[0][0], b"x"), m[1]]),
        TAR + r"\w+: not a readable image",
    ),
}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return load(captioned_sets.beside(tmp_path_factory.mktemp("whole") / "data", samples()))


@pytest.fixture(params=BAD)
def bad(request, tmp_path):
    layout, spoil, message = BAD[request.param]
    root = LAYOUTS[layout](tmp_path / layout, samples())
    spoil(root)
    return root, message


def test_a_bad_sample_is_named_with_what_is_expected(bad):
    root, message = bad
    with pytest.raises(UserError, match=message) as raised:
        load(root).get(ALL)
    assert "\n" not in str(raised.value) and "data.on_bad=skip" in str(raised.value)


def test_inspect_names_it_too(bad):
    root, message = bad
    with pytest.raises(UserError, match=message) as raised:
        inspect(root)
    assert "; a" in str(raised.value) or "; each" in str(raised.value)  # what is expected, for broken images as well


def test_skipping_leaves_it_out_and_keeps_captions_beside_their_images(bad, truth, caplog):
    root, message = bad
    with caplog.at_level(logging.WARNING):
        data = load(root, on_bad="skip")
    kept = [row for row in range(12) if row != 3]
    assert data.captions == [CAPTIONS[row] for row in kept]
    assert torch.equal(data.get(torch.arange(11))["x0"], truth.get(torch.tensor(kept))["x0"])
    assert len(data.content_sha256) == 64
    assert re.search(message.split("; ")[0].split(BESIDE)[0], caplog.records[0].getMessage())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_image_is_named_rightly_behind_a_sample_without_caption(tmp_path, layout, caplog):
    """Sample 02 has no caption and 03 no image: what is left out before must not shift the place that is named."""
    made = samples()
    made["02-fox"] = (*made["02-fox"][:2], " ")
    made["03-fox"] = (made["03-fox"][0], b"x", made["03-fox"][2])
    root = LAYOUTS[layout](tmp_path / layout, made)
    with caplog.at_level(logging.WARNING):
        assert load(root, on_bad="skip").captions == [CAPTIONS[row] for row in range(12) if row not in (2, 3)]
    row = "row 3 " if layout == "parquet" else "03-fox."
    assert row in caplog.records[1].getMessage() and "not a readable image" in caplog.records[1].getMessage()


def test_of_many_bad_samples_a_few_are_named(tmp_path, caplog):
    root = captioned_sets.beside(tmp_path / "data", samples())
    for key in sorted(samples())[:10]:
        (root / f"{key}.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(load(root, on_bad="skip")) == 2
    assert len(caplog.records) == 6 and "10 of its samples are left out" in caplog.text
    for key in samples():
        (root / f"{key}.txt").write_text("")
    with pytest.raises(UserError, match="data: no sample that can be used; each image"):
        load(root, on_bad="skip")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.jsonl": b"\n"}, r"data: holds no sample; a line of metadata\.jsonl"),
        ({"a.tar": bytes(10240)}, "data: holds no sample; a sample is KEY"),
        ({"a.tar.gz": b"x"}, r"data: nothing known here \(found a\.tar\.gz\); understood are"),
        ({"train/a.png": b"x", "train/a.txt": b"x"}, r"data: train look like splits; data\.path="),
    ],
)
def test_folders_without_samples_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "data")
