"""Pictures and texts as the flows are told of them."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastgen.errors import UserError
from fastgen.teachers.trellis import conditions
from fastgen.teachers.trellis.conditions import ImageEncoder, TextEncoder, prepare


def picture(box, size=(200, 160), alpha=255):
    """A red rectangle left, top .. right, bottom (all inside) on nothing."""
    left, top, right, bottom = box
    values = np.zeros((size[1], size[0], 4), np.uint8)
    values[top : bottom + 1, left : right + 1] = [200, 40, 20, alpha]
    return Image.fromarray(values)


def test_the_subject_fills_the_square_but_for_a_margin():
    """A subject 100 wide is cut with a side of 120, so its edges lie at 10 / 120 and 110 / 120 of 518."""
    made = np.asarray(prepare(picture((50, 40, 150, 90)))).astype(int)
    assert made.shape == (518, 518, 3)
    columns = np.nonzero(made[259, :, 0] > 100)[0]
    rows = np.nonzero(made[:, 259, 0] > 100)[0]
    assert columns[0] == pytest.approx(518 * 10 / 120, abs=2) and columns[-1] == pytest.approx(518 * 111 / 120, abs=2)
    # Its centre (65) lies in the middle: rows 40 .. 90 of a cut from 5 to 125.
    assert rows[0] == pytest.approx(518 * 35 / 120, abs=2) and rows[-1] == pytest.approx(518 * 86 / 120, abs=2)
    assert tuple(made[259, 259]) == (200, 40, 20) and tuple(made[0, 0]) == (0, 0, 0)


def test_a_subject_at_the_edge_is_padded_with_nothing():
    made = np.asarray(prepare(picture((0, 0, 99, 99), size=(100, 101)))).astype(int)
    assert made[:30].max() == 0 and made[259, 259, 0] == 200  # 60 of 118 around (49.5, 49.5): the cut begins outside


def test_half_clear_pixels_are_no_subject_but_stay_dimmed():
    faint = np.array(picture((50, 40, 150, 90)))
    faint[100:140, 20:180] = [200, 200, 200, 204]  # 0.8 of 255 exactly, and not above it
    made = np.asarray(prepare(Image.fromarray(faint)))
    assert 518 * 34 / 120 < np.nonzero(made[:, 259, 0] > 170)[0][0] < 518 * 36 / 120  # cut as without
    assert abs(int(made[518 * 108 // 120, 259, 2]) - 160) <= 1  # times alpha


@pytest.mark.parametrize(
    ("box", "alpha", "expected"), [((0, 0, 9, 9), 200, "no subject"), ((5, 5, 5, 5), 255, "pixel")]
)
def test_pictures_without_a_subject(box, alpha, expected):
    with pytest.raises(UserError, match=expected):
        prepare(picture(box, alpha=alpha))


def test_without_transparency_the_background_is_removed_or_that_is_asked_for(monkeypatch):
    opaque = Image.new("RGB", (3000, 1500), (10, 20, 30))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match="pip install rembg"):
        prepare(opaque)
    seen = []

    def remove(image, session):
        seen.append((image.size, image.mode, session))
        return picture((300, 100, 400, 200), size=image.size)

    fake = SimpleNamespace(remove=remove, new_session=lambda name: name)
    monkeypatch.setitem(sys.modules, "rembg", fake)
    for image in (opaque, opaque.convert("RGBA")):  # an alpha of 255 everywhere says nothing
        assert np.asarray(prepare(image))[259, 259, 0] == 200
    assert seen == [((1024, 512), "RGB", "u2net")] * 2


def test_image_conditions_are_the_last_blocks_tokens_normed(image_folder):
    encoder = ImageEncoder(str(image_folder / "encoder"))
    asked = [picture((50, 40, 150, 90)), picture((20, 20, 60, 120))]
    made = encoder.encode(asked)
    assert made.shape == (2, 1 + 4 + 37 * 37, 32) and made.dtype == torch.float32
    torch.testing.assert_close(encoder.encode(asked[:1]), made[:1], atol=1e-5, rtol=0)
    # By hand, block after block, without the network's last norm.
    from transformers import Dinov2WithRegistersModel

    net = Dinov2WithRegistersModel.from_pretrained(image_folder / "encoder").eval()
    pixels = torch.from_numpy(np.asarray(prepare(asked[0])).copy()).permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        x = net.embeddings(pixels)
        for layer in net.encoder.layer:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
    torch.testing.assert_close(made[:1], nn.functional.layer_norm(x, (32,)), atol=1e-4, rtol=0)


def test_the_originals_checkpoint_is_the_same_network(image_folder, tmp_path, monkeypatch):
    """Names of facebookresearch's file, with q, k and v joined."""
    from safetensors.torch import load_file

    from tests.teachers.trellis.dino import original_names

    stored = load_file(image_folder / "encoder" / "model.safetensors")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    known = conditions._Known("facebook/none-such", "tiny.pth", 32, 2, 2)
    monkeypatch.setitem(conditions.DINO, "tiny", known)
    with pytest.raises(UserError, match=r"the encoder tiny is not here.*tiny\.pth in "):
        _ = ImageEncoder("tiny").net
    torch.save(original_names(stored, 2), hub / "tiny.pth")
    asked = [picture((50, 40, 150, 90))]
    ours = ImageEncoder("tiny").encode(asked)
    torch.testing.assert_close(ours, ImageEncoder(str(image_folder / "encoder")).encode(asked), atol=1e-5, rtol=0)
    torch.save({"pos_embed": torch.zeros(1)}, hub / "tiny.pth")
    with pytest.raises(UserError, match=r"tiny\.pth"):
        _ = ImageEncoder("tiny").net
    (hub / "tiny.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"tiny\.pth: .*; fetch it again"):
        _ = ImageEncoder("tiny").net


def test_text_conditions(text_folder):
    encoder = TextEncoder(str(text_folder / "encoder"))
    made = encoder.encode(["a chair", "", "x" * 300])
    assert made.shape == (3, 77, 32) and encoder.empty.shape == (1, 77, 32)
    torch.testing.assert_close(made[1:2], encoder.empty, atol=1e-5, rtol=0)
    assert not torch.allclose(made[0], made[2])


@pytest.mark.parametrize("kind", [ImageEncoder, TextEncoder])
def test_encoders_that_are_not_there(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "dinov2_vitl14_reg" if kind is ImageEncoder else "openai/clip-vit-large-patch14"
    with pytest.raises(UserError, match=r"nothing is fetched.*--encoder"):
        kind(name).encode([picture((5, 5, 50, 50))] if kind is ImageEncoder else ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        kind(name, folder=tmp_path / "empty").encode([picture((5, 5, 50, 50))] if kind is ImageEncoder else ["a"])


@pytest.mark.parametrize("kind", [ImageEncoder, TextEncoder])
def test_a_cut_encoder(kind, image_folder, text_folder, tmp_path):
    whole = (image_folder if kind is ImageEncoder else text_folder) / "encoder"
    folder = shutil.copytree(whole, tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match=r"encoder: no"):
        kind("x", folder=folder).encode([picture((5, 5, 50, 50))] if kind is ImageEncoder else ["a"])
