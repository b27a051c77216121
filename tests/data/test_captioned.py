"""Captioned images: four layouts, one content; and every way a sample can be bad, named in one line."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import DataConfig, DataSet, detect, open_data
from fastgen.data.captioned import Captioned
from fastgen.data.part import Part, Some, data_part
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.inspection import inspect
from tests.data import captioned_sets
from tests.data.captioned_sets import ALL, CAPTIONS, LAYOUTS, load, samples


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, Captioned]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: load(write(root / name, samples())) for name, write in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(four, layout):
    data, truth = four[layout], four["beside"]
    assert (len(data), data.shape, data.num_classes) == (12, (3, 8, 8), None)
    assert data.captions == CAPTIONS
    found, expected = data.get(ALL), truth.get(ALL)
    assert found.keys() == {"x0", "original", "corner"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (data.content_sha256, data.captions_sha256) == (truth.content_sha256, truth.captions_sha256)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_by_number_in_any_order(four, layout):
    index, whole = torch.tensor([11, 3, 3, 0, 7]), four[layout].get(ALL)
    chosen = four[layout].get(index)
    assert all(torch.equal(chosen[name], whole[name][index]) for name in whole)
    with pytest.raises(IndexError):
        four[layout].get(torch.tensor([12]))


def test_rows_are_what_pillow_makes_of_the_files(four):
    for row, (_, (_, data, _)) in enumerate(sorted(samples().items())):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        batch = four["tars"].get(torch.tensor([row]))
        assert batch["original"].tolist() == [[image.height, image.width]]
        side, scale = min(image.size), 8 / min(image.size)
        assert batch["corner"].tolist() == [
            [round((image.height - side) / 2 * scale), round((image.width - side) / 2 * scale)]
        ]
        if side == 8:  # only cropped: exact
            top, left = batch["corner"][0].tolist()
            expected = np.asarray(image)[top : top + 8, left : left + 8].transpose(2, 0, 1) / 127.5 - 1
            np.testing.assert_allclose(batch["x0"][0], expected, atol=1e-6)


def test_the_framing_is_kept_with_the_pixels_and_without(four, monkeypatch):
    """(12, 8) is cropped 2 from the top; (9, 20) shrinks to 18 wide and is cropped 5 from the left."""
    where = {(8, 8): [0, 0], (12, 8): [2, 0], (9, 20): [0, 5], (5, 6): [0, 1]}
    fresh = Captioned(four["beside"]._store, 8)
    monkeypatch.setattr("fastgen.data.pixels.KEPT_BYTES", 0)
    for data in (fresh, Captioned(four["beside"]._store, 8)):
        for index in (ALL, ALL.flip(0)):
            batch = data.get(index)
            assert batch["original"].dtype == batch["corner"].dtype == torch.int64
            for original, corner in zip(batch["original"].tolist(), batch["corner"].tolist(), strict=True):
                assert corner == where[tuple(original)]


def test_the_content_hash_is_of_images_size_and_channels_alone(tmp_path):
    made = samples()
    truth = load(captioned_sets.beside(tmp_path / "a", made))
    retold = {key: (ending, data, text + "!") for key, (ending, data, text) in made.items()}
    other = load(captioned_sets.beside(tmp_path / "b", retold))
    assert other.content_sha256 == truth.content_sha256 and other.captions_sha256 != truth.captions_sha256
    first, second = [key for key in made if made[key][0] == "png"][:2]
    swapped = load(captioned_sets.beside(tmp_path / "c", made | {first: made[second], second: made[first]}))
    hashes = {truth.content_sha256, swapped.content_sha256}
    hashes |= {load(tmp_path / "a", **fields).content_sha256 for fields in ({"size": 4}, {"channels": 1})}
    assert len(hashes) == 4


def test_two_lists_of_captions_never_run_together(tmp_path):
    for name, lines in (("a.txt", "ab\nc"), ("b.txt", "a\nbc")):
        (tmp_path / name).write_text(lines)
    first, second = (open_data(DataConfig(path=str(tmp_path / name))) for name in ("a.txt", "b.txt"))
    assert first.captions_sha256 != second.captions_sha256


@pytest.mark.parametrize("name", ["0.tar", "1.tar"])
def test_one_tar_is_a_data_set_too(tmp_path, name):
    path = captioned_sets.tars(tmp_path / "tars", samples()) / name
    keys = sorted(list(samples())[:5] if name == "0.tar" else list(samples())[5:])
    assert detect(path) == "captioned" and load(path).captions == [samples()[key][2] for key in keys]


def test_one_parquet_file_and_its_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    images = [data for _, data, _ in samples().values()]
    for name in ("text", "caption"):
        table = {"image": images, name: CAPTIONS, "label": [None] * 12, "url": ["x"] * 12}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        assert detect(tmp_path / "a.parquet") == "captioned" and load(tmp_path / "a.parquet").captions == CAPTIONS
    assert detect(tmp_path) == "captioned"
    pq.write_table(pa.table({"image": images, "label": [0] * 12}), tmp_path / "a.parquet")
    assert detect(tmp_path) == "parquet"
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' or 'caption'; a row has its image's bytes"):
        load(tmp_path / "a.parquet", kind="captioned")


@pytest.mark.parametrize("write", [captioned_sets.beside, captioned_sets.metadata, captioned_sets.tars])
def test_sub_folders_are_part_of_the_name(tmp_path, write):
    made = samples()
    keys = dict(zip(sorted(made), [f"{'ab'[i % 2]}/{i:02}" for i in range(12)], strict=True))
    for inside in ("a", "b"):
        (tmp_path / "data" / inside).mkdir(parents=True)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("pathlib.Path.mkdir", lambda *_, **__: None)
    write(tmp_path / "data", {keys[key]: sample for key, sample in made.items()})
    monkey.undo()
    assert load(tmp_path / "data").captions == CAPTIONS[0::2] + CAPTIONS[1::2]


def test_a_folder_is_captioned_as_soon_as_one_image_is(tmp_path):
    root = captioned_sets.beside(tmp_path / "data", samples())
    for key in samples():
        (root / f"{key}.txt").unlink()
    (root / "notes.txt").write_text("about the images")
    (root / "archive.tar").write_bytes(b"")
    assert detect(root) == "folder" and open_data(DataConfig(path=str(root), size=4)).captions is None
    (root / "00-fox.txt").write_text("a fox")
    assert detect(root) == "captioned"
    with pytest.raises(UserError, match=r"01-fox\.jpg: no caption \(data\.kind=folder reads images alone\) \(11 more"):
        load(root)
    assert len(open_data(DataConfig(path=str(root), kind="folder", size=4))) == 12


def test_parts_carry_captions_and_framing_along(four):
    data = four["beside"]
    whole = data.get(ALL)
    for part, rows in ((Part(data, "train"), [1, 2, 3, 4, 6, 7, 8, 9, 11]), (Part(data, "held_out"), [0, 5, 10])):
        batch = part.get(torch.arange(len(part)))
        assert part.captions == [CAPTIONS[row] for row in rows]
        assert all(torch.equal(batch[name], whole[name][rows]) for name in whole)
    some = Some(Part(data, "train"), 3)
    assert some.captions == [CAPTIONS[row] for row in (1, 4, 8)]
    assert torch.equal(some.get(torch.arange(3))["corner"], whole["corner"][[1, 4, 8]])


def test_parts_are_other_images_than_the_whole_in_every_layout_alike(four):
    parts = [
        [Part(data, "train"), Part(data, "held_out"), Part(data, "train", 4), Some(data, 3), Some(data, 4)]
        for data in four.values()
    ]
    hashes = [{part.content_sha256 for part in each} | {four["beside"].content_sha256} for each in parts]
    assert len(hashes[0]) == 6 and all(found == hashes[0] for found in hashes)


def test_prompts_are_rows_of_texts_alone(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na dog\n")
    assert detect(tmp_path / "prompts.txt") == "prompts"
    data = open_data(DataConfig(path=str(tmp_path / "prompts.txt")))
    assert (data.captions, data.shape, data.num_classes, len(data)) == (["a fox", "a dog"], (), None, 2)
    assert Source(data, 0).get(torch.arange(5)) == {}
    assert data_part(DataConfig(path=str(tmp_path / "prompts.txt")), "held_out", 2).captions == ["a fox"]
    with pytest.raises(UserError, match=r"data\.size is not used by kind=prompts"):
        open_data(DataConfig(path=str(tmp_path / "prompts.txt"), size=8))


def test_the_size_must_be_said(tmp_path):
    root = captioned_sets.beside(tmp_path / "data", samples())
    with pytest.raises(UserError, match=r"data: captioned images need data\.size"):
        open_data(DataConfig(path=str(root)))
    with pytest.raises(UserError, match=r"data\.classes is not used by kind=captioned"):
        load(root, classes=3)
    with pytest.raises(UserError, match=r"data\.split=test chooses among parquet files"):
        load(root, split="test")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_tells_what_is_there(tmp_path, layout):
    told = inspect(LAYOUTS[layout](tmp_path / "data", samples()))
    assert (told["kind"], told["images"], told["captions"]) == ("data", 12, 12)
    assert (told["height"], told["width"]) == ([5, 12], [6, 20])
    assert told["longest_caption_characters"] == max(map(len, CAPTIONS))
    assert {"beside": "text files", "metadata": "metadata.jsonl", "parquet": "parquet", "tars": "tars"}[layout] in told[
        "layout"
    ]


def test_inspect_counts_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na large dog\n")
    assert inspect(tmp_path / "prompts.txt") == {
        "kind": "prompts",
        "name": "prompts.txt",
        "prompts": 2,
        "longest_prompt_characters": 11,
    }


def test_captioned_sets_are_data_sets(four):
    data: DataSet = four["beside"]
    assert data.name == "beside"
