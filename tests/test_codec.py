"""The codec of Stable Diffusion: prompts, images, latents, and what its hashes stand for."""

from __future__ import annotations

import copy
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from fastgen.codec import Framing
from fastgen.codecs.stable_diffusion import StableDiffusionCodec
from tests import tiny

SHAPE = (4, tiny.LATENT, tiny.LATENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("codec") / "sd")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return tiny.sdxl(tmp_path_factory.mktemp("codec") / "xl")


def test_encode_is_the_vaes_posterior_in_the_networks_units(folder):
    codec, vae = StableDiffusionCodec(folder, SHAPE), AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent_dist
        mean, std = codec.encode(images)
    assert torch.allclose(mean, expected.mean * 0.18215) and torch.allclose(std, expected.std * 0.18215)
    latents = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(codec.decode(latents), vae.decode(latents / 0.18215).sample, atol=1e-6)


def test_shift_and_latent_statistics_are_undone_by_decode(folder, tmp_path):
    where = shutil.copytree(folder, tmp_path / "shifted")
    vae = AutoencoderKL.from_pretrained(where / "vae")
    for options in ({"shift_factor": 0.3}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 2.0, 3.0]}):
        vae.register_to_config(**{"shift_factor": None, "latents_mean": None, "latents_std": None, **options})
        vae.save_pretrained(where / "vae")
        codec = StableDiffusionCodec(where, SHAPE)
        images = torch.rand(1, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            raw = vae.encode(images).latent_dist.mean
            mean, _ = codec.encode(images)
            shift, scale = options.get("shift_factor", torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)), 0.18215
            spread = 1.0 if "shift_factor" in options else torch.tensor([0.5, 1.0, 2.0, 3.0]).view(1, 4, 1, 1)
            assert torch.allclose(mean, (raw - shift) * scale / spread, atol=1e-6)
            assert torch.allclose(codec.decode(mean), vae.decode(raw).sample, atol=1e-5)


def test_gradients_reach_the_latents(folder):
    codec = StableDiffusionCodec(folder, SHAPE)
    latents = torch.randn(1, *SHAPE, requires_grad=True)
    codec.decode(latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(p.grad is None for p in codec.modules()["vae"].parameters())


def test_slices_and_tiles_decode_the_same_images_nearly(folder):
    codec = StableDiffusionCodec(folder, (4, 32, 32))
    latents = torch.randn(3, 4, 32, 32)
    with torch.no_grad():
        whole = codec.decode(latents)
        codec.slicing = True
        assert torch.allclose(codec.decode(latents), whole, atol=1e-5)
        codec.tiling = True
        tiled = codec.decode(latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_lost_words_are_named(folder, caplog):
    codec = StableDiffusionCodec(folder, SHAPE)
    with caplog.at_level(logging.WARNING, logger="fastgen"):
        cond = codec.encode_prompts(["x" * 75])
        assert not caplog.records  # 75 letters and two marks just fit
        longer = codec.encode_prompts(["x" * 75 + " owl"])
    assert torch.equal(cond["text"][:, :75], longer["text"][:, :75])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "only 77 tokens fit" in line and "lost: 'owl'" in line


def test_framing_becomes_xls_time_ids(xl):
    codec = StableDiffusionCodec(xl, SHAPE)
    framing = Framing(torch.tensor([[480, 640], [30, 40]]), torch.tensor([[0, 7], [1, 2]]))
    ids = codec.encode_prompts(["a", "b"], framing)["time_ids"]
    assert ids.tolist() == [[480, 640, 0, 7, 16, 16], [30, 40, 1, 2, 16, 16]]


def test_a_vae_that_asks_for_float32_is_never_put_in_float16(folder, xl):
    for where, expected in ((xl, torch.float32), (folder, torch.float32)):
        codec = StableDiffusionCodec(where, SHAPE).to("cpu", torch.float16)
        assert codec.modules()["vae"].dtype == expected  # the config's default is to ask for it
        assert codec.modules()["text_encoder"].dtype == torch.float16
    assert StableDiffusionCodec(xl, SHAPE).to("cpu", torch.bfloat16).modules()["vae"].dtype == torch.bfloat16


def test_released_weights_are_read_again(folder):
    codec = StableDiffusionCodec(folder, SHAPE)
    before = codec.encode_prompts(["fox"])["text"]
    vae = codec.modules()["vae"]
    codec.release()
    assert torch.equal(codec.encode_prompts(["fox"])["text"], before) and codec.modules()["vae"] is not vae


def test_copies_of_a_network_share_it(folder):
    codec = StableDiffusionCodec(folder, SHAPE)
    assert copy.deepcopy(codec) is codec
    assert codec.resized(32, 32).modules()["vae"] is codec.modules()["vae"] and codec.image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("file", "text", "image"),
    [
        ("text_encoder/model.safetensors", True, False),
        ("tokenizer/tokenizer.json", True, False),
        ("vae/diffusion_pytorch_model.safetensors", False, True),
        ("vae/config.json", False, True),
        ("unet/config.json", False, False),
    ],
)
def test_the_hashes_change_with_what_they_stand_for(folder, tmp_path, file, text, image):
    where = shutil.copytree(folder, tmp_path / "other")
    before = StableDiffusionCodec(where, SHAPE)
    hashes = before.text_sha256, before.image_sha256
    (where / file).write_bytes((where / file).read_bytes() + b" ")
    after = StableDiffusionCodec(where, SHAPE)
    assert (after.text_sha256 != hashes[0], after.image_sha256 != hashes[1]) == (text, image)


def test_the_empty_prompt_is_zeros_only_where_the_pipeline_says_so(xl, tmp_path):
    where = shutil.copytree(xl, tmp_path / "other")
    index = where / "model_index.json"
    index.write_text(
        index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
    )
    zeros, encoded = StableDiffusionCodec(xl, SHAPE), StableDiffusionCodec(where, SHAPE)
    assert not zeros.null()["pooled"].any() and encoded.null()["pooled"].any()
    assert torch.equal(encoded.null()["text"], encoded.encode_prompts([""])["text"])
    assert zeros.text_sha256 != encoded.text_sha256
