"""The two resize recipes and the crop, against worked cases and direct calls of Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.eval.resize import centre_squares, pil_bicubic, recipe_name, tf1_bilinear


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_tf1_grows_from_the_corner_and_repeats_the_border():
    out = tf1_bilinear(torch.tensor([[[[0.0, 1], [2, 3]]]]), 4)
    expected = [[0, 0.5, 1, 1], [1, 1.5, 2, 2], [2, 2.5, 3, 3], [2, 2.5, 3, 3]]
    assert out.tolist() == [[expected]]


def test_tf1_shrinks_by_picking_without_a_look_round():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert tf1_bilinear(x, 2).tolist() == [[[[0, 2], [8, 10]]]]
    assert torch.equal(tf1_bilinear(x, 4), x)


def test_tf1_at_fractions_is_the_formula():
    x = picture(2, 3, 7, 5).double()
    out = tf1_bilinear(x, 11)
    for i, j in ((0, 0), (3, 8), (10, 10), (7, 4)):
        y, z = i * 7 / 11, j * 5 / 11
        top, left = int(y), int(z)
        rows, cols = (top, min(top + 1, 6)), (left, min(left + 1, 4))
        weights = torch.outer(torch.tensor([1 - (y - top), y - top]), torch.tensor([1 - (z - left), z - left]))
        expected = (x[:, :, rows][..., cols] * weights).sum((2, 3))
        torch.testing.assert_close(out[:, :, i, j], expected, rtol=1e-6, atol=1e-4)


def test_clean_is_pillow_on_floats_clipped_and_not_rounded():
    x = picture(2, 3, 40, 24)
    x[:, :, ::2] = 0  # stripes: bicubic overshoots on both sides
    x[:, :, 1::2] = 255
    for size in (17, 61):
        out = pil_bicubic(x.float(), size)
        for n, c in np.ndindex(2, 3):
            plane = Image.fromarray(x[n, c].numpy().astype(np.float32))
            direct = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
            assert np.array_equal(out[n, c].numpy(), direct.clip(0, 255))
    assert direct.min() < 0 and direct.max() > 255 and out.min() == 0 and out.max() == 255
    assert (out != out.round()).any()


def test_the_recipes_are_two_different_things():
    x = picture(1, 3, 64, 64).float()
    assert (tf1_bilinear(x, 31) - pil_bicubic(x, 31)).abs().mean() > 10


def test_centre_squares_are_cut_then_shrunk():
    x = picture(2, 3, 21, 32)
    out = centre_squares(x, 10)
    for n in range(2):
        image = Image.fromarray(x[n].permute(1, 2, 0).numpy()).crop((6, 0, 27, 21))  # (32 - 21) / 2 = 5.5 -> 6
        direct = np.asarray(image.resize((10, 10), Image.Resampling.LANCZOS))
        assert np.array_equal(out[n].permute(1, 2, 0).numpy(), direct)
    tall = centre_squares(x.transpose(2, 3), 21)
    assert torch.equal(tall, x.transpose(2, 3)[:, :, 6:27])
    assert centre_squares(x[:, :, :, :21], 21).data_ptr() == x.data_ptr()


def test_the_names_of_recipes_tell_crop_and_size():
    assert recipe_name("tf", 299, None) == "tf1-bilinear-299"
    assert recipe_name("clean", 299, 256) == "square-lanczos-256, pil-bicubic-float-299"


@pytest.mark.parametrize("size", [32, 299, 511])
def test_tf1_is_bit_for_bit_torch_fidelitys(size):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow", exc_type=ImportError)
    x = picture(2, 3, size, size + 3).float()
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert torch.equal(tf1_bilinear(x, 299), theirs)
