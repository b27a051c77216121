from __future__ import annotations

import io
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data.folder import Folder
from fastgen.data.pixels import BadImage, decode
from fastgen.errors import UserError

RNG = np.random.default_rng(0)


def noise(height: int = 8, width: int = 8, *channels: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def coded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels_of(image: Image.Image, size=None, channels=3, kind="PNG", **options) -> np.ndarray:
    return decode(coded(image, kind, **options), "it", size, channels).pixels


@pytest.fixture
def classes(tmp_path):
    """Three classes, four images each, every pixel of an image telling which it is."""
    for c, name in enumerate(["b", "a", "ç"]):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", np.full((8, 8, 3), 40 * c + i, np.uint8))
    return tmp_path


def test_classes_are_the_sub_folders_in_sorted_order(classes):
    data = Folder(classes)
    batch = data.get(torch.arange(12))
    assert data.class_names == ("a", "b", "ç") and data.num_classes == 3 and data.shape == (3, 8, 8)
    assert batch["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = np.array([40 + i for i in range(4)] + list(range(4)) + [80 + i for i in range(4)]) / 127.5 - 1
    np.testing.assert_allclose(batch["x0"].mean((1, 2, 3)), expected, atol=1e-6)


def test_a_flat_folder_is_unlabelled_and_keeps_the_order_asked_for(tmp_path):
    truth = [noise(6, 7, 3) for _ in range(5)]
    for i, pixels in enumerate(truth):
        save(tmp_path / f"{i}.PNG", pixels)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    data = Folder(tmp_path)
    batch = data.get(torch.tensor([3, 1, 3, 0]))
    assert (len(data), data.num_classes, set(batch)) == (5, None, {"x0"})
    expected = np.stack([truth[i] for i in (3, 1, 3, 0)]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batch["x0"], expected, atol=1e-6)


def test_get_is_the_same_whether_the_pixels_are_kept_or_not(classes, monkeypatch):
    index = torch.tensor([7, 2, 2, 11, 0])
    kept = Folder(classes)
    first, again = kept.get(index), kept.get(index)
    monkeypatch.setattr("fastgen.data.pixels.KEPT_BYTES", 100)
    fresh = Folder(classes).get(index)
    for name in ("x0", "label"):
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], fresh[name])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_are_exact(kind):
    truth = noise(9, 5, 3)
    assert np.array_equal(pixels_of(Image.fromarray(truth), kind=kind, lossless=True), truth.transpose(2, 0, 1))


def test_jpeg_is_close():
    ramp = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    decoded = pixels_of(Image.fromarray(ramp), kind="JPEG", quality=100, subsampling=0)
    assert np.abs(decoded.astype(int) - ramp.transpose(2, 0, 1)).max() <= 4


def test_grey_is_repeated_and_colour_becomes_luma():
    grey, colour = noise(), noise(8, 8, 3)
    assert np.array_equal(pixels_of(Image.fromarray(grey)), np.stack([grey] * 3))
    assert np.array_equal(pixels_of(Image.fromarray(grey), channels=1), grey[None])
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(pixels_of(Image.fromarray(colour), channels=1)[0], luma, atol=1)


def test_sixteen_bit_grey_keeps_its_upper_half():
    deep = RNG.integers(0, 65536, (6, 6), dtype=np.uint16)
    assert np.array_equal(pixels_of(Image.fromarray(deep), channels=1)[0], deep >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode):
    rgba = noise(8, 8, 4)
    if mode == "LA":
        rgba[..., 1] = rgba[..., 2] = rgba[..., 0]
    share = rgba[..., 3:] / 255
    expected = share * rgba[..., :3] + (1 - share) * 255
    np.testing.assert_allclose(pixels_of(Image.fromarray(rgba).convert(mode)), expected.transpose(2, 0, 1), atol=1.01)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((2, 1), 0)
    decoded = pixels_of(image, transparency=0)
    assert decoded[:, 1, 2].tolist() == [255] * 3 and decoded[:, 0, 0].tolist() == [200, 10, 10]


def test_exif_turns_the_image():
    truth = noise(8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    picture = decode(coded(Image.fromarray(truth), exif=exif), "it", None, 3)
    assert np.array_equal(picture.pixels, np.rot90(truth, -1).transpose(2, 0, 1))
    assert (picture.original, picture.corner) == ((16, 8), (0, 0))


@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8)])
def test_an_image_of_the_right_short_side_is_only_cropped(height, width):
    truth = noise(height, width, 3)
    decoded = pixels_of(Image.fromarray(truth), size=8)
    top, left = (height - 8) // 2, (width - 8) // 2
    assert np.array_equal(decoded, truth[top : top + 8, left : left + 8].transpose(2, 0, 1))


def test_resizing_agrees_with_an_independent_bicubic():
    truth = Image.fromarray(noise(32, 64, 3)).resize((64, 32), Image.Resampling.BOX)
    tensor = torch.from_numpy(np.array(truth)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(tensor, size=(16, 32), mode="bicubic", antialias=True)
    expected = resized[0, :, :, 8:24].clamp(0, 255).round().numpy()
    np.testing.assert_allclose(pixels_of(truth, size=16), expected, atol=1.01)


def test_a_very_long_image_does_not_grow():
    assert pixels_of(Image.new("L", (60_000, 1), 7), size=64, channels=1).shape == (1, 64, 64)


def test_images_of_several_sizes_need_a_size(tmp_path):
    save(tmp_path / "a.png", noise(8, 8, 3))
    save(tmp_path / "b.png", noise(9, 8, 3))
    with pytest.raises(UserError, match=r"b\.png: 9x8 pixels.*8x8; data\.size=N"):
        Folder(tmp_path).get(torch.tensor([1]))
    assert Folder(tmp_path, size=4).get(torch.arange(2))["x0"].shape == (2, 3, 4, 4)


def spoil(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_a_corrupt_image_is_refused_by_name(classes):
    spoil(classes / "b" / "2.png")
    data = Folder(classes)
    data.get(torch.tensor([5]))
    with pytest.raises(UserError, match=r"b/2\.png: not a readable image.*data\.on_bad=skip"):
        data.get(torch.tensor([5, 6]))


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_skipping_gives_the_next_good_image_its_place_and_says_so_once(classes, caplog, monkeypatch, kept):
    monkeypatch.setattr("fastgen.data.pixels.KEPT_BYTES", kept)
    for file in ("b/2.png", "b/3.png", "ç/3.png"):
        spoil(classes / file)
    data = Folder(classes, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = data.get(torch.tensor([11, 6, 7, 5]))
            # Row 11 is the last: the first of all takes its place. Labels go with the image, not with the place.
            assert batch["label"].tolist() == [0, 2, 2, 1]
            values = ((batch["x0"].mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()
            assert values == [40, 80, 80, 1]
    assert sorted(r.getMessage().split(":")[0].rsplit("/", 2)[1] for r in caplog.records) == ["b", "b", "ç"]


def test_the_first_image_may_be_a_bad_one(classes):
    spoil(classes / "a" / "0.png")
    assert Folder(classes, on_bad="skip").shape == (3, 8, 8)
    with pytest.raises(UserError, match=r"a/0\.png"):
        Folder(classes)


def test_nothing_readable_at_all_is_refused_even_when_skipping(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="not one of its 3 images"):
        Folder(tmp_path, on_bad="skip")


def test_a_row_outside_the_folder_is_an_error(classes):
    for row in (-1, 12):
        with pytest.raises(IndexError):
            Folder(classes).get(torch.tensor([row]))


def test_other_formats_are_not_opened_whatever_their_name(tmp_path):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(UserError, match=r"a\.png: not a readable image \(none of PNG, JPEG and WebP"):
        Folder(tmp_path)


def test_no_damaged_byte_of_a_png_changes_a_pixel_unseen():
    truth = np.add.outer(np.arange(32) * 3, np.arange(32) * 4).astype(np.uint8)
    whole = coded(Image.fromarray(truth))
    refused = 0
    for i in range(len(whole)):
        data = bytearray(whole)
        data[i] ^= 16
        try:
            assert np.array_equal(decode(bytes(data), "it", None, 1).pixels[0], truth)
        except BadImage:
            refused += 1
    assert refused > 0.8 * len(whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_random_damage_never_escapes_as_another_error(kind):
    random.seed(0)
    whole = coded(Image.fromarray(noise(8, 8, 3)), kind)
    refused = 0
    for _ in range(300):
        data = bytearray(whole[: random.randrange(len(whole))] if random.random() < 0.3 else whole)
        for _ in range(random.randrange(1, 4)):
            if data:
                data[random.randrange(len(data))] = random.randrange(256)
        try:
            assert decode(bytes(data), "it", 8, 3).pixels.shape == (3, 8, 8)
        except BadImage as error:
            assert str(error).startswith("it: ")
            refused += 1
    assert refused > 50


def test_ambiguous_layouts_are_refused(tmp_path, classes):
    (classes / "empty").mkdir()
    with pytest.raises(UserError, match="empty: a class folder with no image"):
        Folder(classes)
    (classes / "empty").rmdir()
    save(classes / "x.png", noise(8, 8, 3))
    with pytest.raises(UserError, match="side by side"):
        Folder(classes)


def test_folders_named_like_splits_are_no_classes(tmp_path):
    for name in ("train", "test"):
        save(tmp_path / name / "a.png", noise(8, 8, 3))
    with pytest.raises(UserError, match=r"look like splits; data\.path="):
        Folder(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no image here"):
        Folder(tmp_path)
