"""Published protocols as data, and the files they need."""

from __future__ import annotations

import json
import re

import pytest

from fastgen.errors import UserError
from fastgen.eval.presets import PRESETS, coco_captions, find_file, find_preset
from fastgen.eval.resize import RECIPES


def test_each_preset_says_all_that_a_comparison_needs():
    assert set(PRESETS) == {"coco2017-5k", "coco2014-30k", "cifar10-50k"}
    for preset in PRESETS.values():
        assert preset.fid in RECIPES and preset.reference_source.startswith("http") and preset.about
        assert (preset.prompts is None) == (preset.prompts_source == "")
        assert (preset.crop is None) == (preset.side is not None)
        for digest in (preset.reference_sha256, preset.prompts_sha256):
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)


@pytest.mark.parametrize(
    ("name", "num", "fid", "crop"),
    [("coco2017-5k", 5_000, "clean", 512), ("coco2014-30k", 30_000, "clean", 256), ("cifar10-50k", 50_000, "tf", None)],
)
def test_their_numbers_are_the_published_ones(name, num, fid, crop):
    preset = find_preset(name)
    assert (preset.num, preset.fid, preset.crop) == (num, fid, crop)


def test_an_unknown_preset_is_told():
    with pytest.raises(UserError, match="did you mean 'coco2017-5k'"):
        find_preset("coco2017")


def test_a_file_that_is_not_there_is_told_with_its_source(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTGEN_WEIGHTS_DIR", raising=False)
    with pytest.raises(UserError) as told:
        find_file(None, "a.npz", "https://x/a.npz", "--reference")
    for word in ("a.npz: not here", "https://x/a.npz", "FASTGEN_WEIGHTS_DIR", "--reference"):
        assert word in str(told.value)
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"put it into {tmp_path}"):
        find_file(None, "a.npz", "https://x/a.npz", "--reference")
    (tmp_path / "a.npz").touch()
    assert find_file(None, "a.npz", "", "--reference") == tmp_path / "a.npz"
    (tmp_path / "b").mkdir()
    assert find_file(tmp_path / "b", "a.npz", "", "--reference") == tmp_path / "b"
    with pytest.raises(UserError, match="--reference nowhere: no such"):
        find_file("nowhere", "a.npz", "", "--reference")


def test_coco_gives_one_caption_an_image(tmp_path):
    file = tmp_path / "captions.json"
    rows = [(7, 2, "later"), (5, 9, " of\nnine "), (3, 2, "of two"), (4, 9, "first of nine")]
    captions = [{"id": i, "image_id": image, "caption": text} for i, image, text in rows]
    file.write_text(json.dumps({"images": [{"id": 9}, {"id": 2}], "annotations": captions}))
    assert coco_captions(file) == ["of two", "first of nine"]
    file.write_text(json.dumps({"images": [{"id": 9}, {"id": 1}], "annotations": captions}))
    with pytest.raises(UserError, match="no caption for image 1"):
        coco_captions(file)
    for text in ('{"images": []}', '[{"id": 3}]', '{"images": [{"id": 1}], "annotations": [{"id": 2}]}'):
        file.write_text(text)
        with pytest.raises(UserError, match="not a COCO captions file"):
            coco_captions(file)
