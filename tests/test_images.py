"""PNG bytes against the pixels they must hold."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.errors import RunFailed
from fastgen.images import grid_png, save_png, to_uint8


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_to_uint8_inverts_every_level_and_clamps():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1).long(), levels)
    beyond = torch.tensor([-7.0, -1.0, 1.0, 3.0, float("inf"), float("-inf")])
    assert to_uint8(beyond).tolist() == [0, 0, 255, 255, 255, 0]


def test_to_uint8_rounds_half_to_even():
    # (x + 1) * 127.5 is exactly 127.5, 63.75 and 191.25; then halves that float32 holds exactly.
    assert to_uint8(torch.tensor([0.0, -0.5, 0.5])).tolist() == [128, 64, 191]
    assert to_uint8(torch.tensor([1 / 127.5 * 2.5 - 1, 1 / 127.5 * 6.5 - 1], dtype=torch.float64)).tolist() == [2, 6]


def test_to_uint8_refuses_nan():
    with pytest.raises(RunFailed, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_half_precision_is_lifted_before_the_arithmetic():
    levels = torch.tensor([-1.0, -0.25, 0.75, 1.0])
    assert torch.equal(to_uint8(levels.bfloat16()), to_uint8(levels))


def test_grid_places_rows_first_with_transparent_rest():
    values = torch.tensor([-1.0, 0.0, 1.0])
    grid = pixels(grid_png(values.view(3, 1, 1, 1).expand(3, 1, 2, 2), columns=2, upscale=3))
    assert grid.shape == (13, 13, 2)  # two tiles of 6 and a gap of 1
    assert grid[0, 0].tolist() == [0, 255] and grid[5, 12].tolist() == [128, 255] and grid[7, 5].tolist() == [255, 255]
    assert grid[:, 6, 1].max() == 0 and grid[6, :, 1].max() == 0 and grid[7:, 7:, 1].max() == 0


def test_upscale_is_nearest_neighbour():
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = pixels(grid_png(image, upscale=5))[..., 0]
    assert np.array_equal(grid, to_uint8(image)[0, 0].numpy().repeat(5, 0).repeat(5, 1))


def test_default_makes_digits_visible_and_leaves_photographs_alone():
    assert pixels(grid_png(torch.zeros(1, 1, 8, 8))).shape[:2] == (64, 64)
    assert pixels(grid_png(torch.zeros(1, 3, 96, 80))).shape[:2] == (96, 80)
    assert pixels(grid_png(torch.zeros(5, 1, 64, 64))).shape[:2] == (64 * 2 + 2, 64 * 3 + 4)  # 3 columns, 2 rows


def test_rgb_channels_stay_in_order():
    image = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 3)
    assert pixels(grid_png(image, upscale=1))[1, 2].tolist() == [255, 128, 0, 255]


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 4, 8, 8)])
def test_grid_refuses_what_it_cannot_draw(shape):
    with pytest.raises(ValueError, match="grid needs"):
        grid_png(torch.zeros(shape))


def test_save_png_round_trip(tmp_path):
    grey = torch.linspace(-1, 1, 12).view(1, 3, 4)
    save_png(tmp_path / "grey.png", grey)
    save_png(tmp_path / "rgb.png", grey.expand(3, 3, 4))
    assert Image.open(tmp_path / "grey.png").mode == "L" and Image.open(tmp_path / "rgb.png").mode == "RGB"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), to_uint8(grey)[0].numpy())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["grey.png", "rgb.png"]
    with pytest.raises(ValueError, match="picture needs"):
        save_png(tmp_path / "latent.png", torch.zeros(4, 8, 8))
