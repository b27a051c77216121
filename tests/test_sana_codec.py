"""The codec of SANA: prompts as the stock pipelines encode them, images, latents, and what its hashes stand for."""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaSprintPipeline

from fastgen.codecs.sana import INSTRUCTION, SanaCodec
from fastgen.errors import UserError
from tests import tiny

SHAPE = (4, 2, 2)
PROMPTS = ["A Red Fox ", "an owl, drawn with a pencil on yellow paper"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sana(tmp_path_factory.mktemp("codec") / "sana")


def test_prompts_and_the_empty_one_are_encoded_as_by_the_stock_pipelines(folder):
    """Instruction, length, chosen tokens, small letters and masks, with each pipeline's own defaults."""
    codec = SanaCodec(folder, SHAPE)
    found, null = codec.encode_prompts(PROMPTS), codec.null()
    pipeline: Any = SanaPipeline.from_pretrained(folder)
    lines = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    with torch.no_grad():
        text, mask, empty, empty_mask = pipeline.encode_prompt(PROMPTS, complex_human_instruction=lines)
    assert found["text"].shape == (2, 300, 16) and not torch.equal(mask[0], mask[1])
    assert torch.equal(found["text"], text) and torch.equal(found["text_mask"], mask.float())
    assert torch.equal(null["text"], empty[:1]) and torch.equal(null["text_mask"], empty_mask[:1].float())
    sprint = inspect.signature(SanaSprintPipeline.__call__).parameters
    assert sprint["complex_human_instruction"].default == lines == INSTRUCTION.split("\n")
    assert not sprint["clean_caption"].default and sprint["max_sequence_length"].default == 300


def test_a_prompt_does_not_depend_on_its_neighbours(folder):
    codec = SanaCodec(folder, SHAPE)
    one, both = codec.encode_prompts(PROMPTS[:1]), codec.encode_prompts(PROMPTS)
    assert torch.allclose(one["text"][0], both["text"][0], atol=1e-5)


def test_lost_words_are_named(folder, caplog):
    codec = SanaCodec(folder, SHAPE)
    with caplog.at_level(logging.WARNING, logger="fastgen"):
        fits = codec.encode_prompts(["x" * 298])  # the first token and the instruction's last one are among the 300
        assert not caplog.records
        longer = codec.encode_prompts(["x" * 298 + "owl"])
    assert torch.equal(fits["text"], longer["text"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "only 300 tokens fit" in line and "lost: 'owl'" in line


def test_images_are_latents_times_the_scaling_factor(folder):
    codec, vae = SanaCodec(folder, SHAPE), AutoencoderDC.from_pretrained(folder / "vae")
    vae.requires_grad_(False)  # as the codec's is: torch folds a product otherwise where its weight asks for gradients
    images, latents = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, *SHAPE)
    with torch.no_grad():
        mean, std = codec.encode(images)
        assert torch.allclose(mean, vae.encode(images).latent * 0.41407, atol=1e-6) and not std.any()
        assert torch.allclose(codec.decode(latents), vae.decode(latents / 0.41407).sample, atol=1e-6)
    assert codec.image_shape == (3, 64, 64) and codec.factor == 32


def test_gradients_reach_the_latents(folder):
    codec = SanaCodec(folder, SHAPE)
    latents = torch.randn(1, *SHAPE, requires_grad=True)
    codec.decode(latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(p.grad is None for p in codec.modules()["vae"].parameters())


def test_sizes_are_free_in_steps_of_the_vae_and_copies_share_it(folder):
    codec = SanaCodec(folder, SHAPE)
    other = codec.resized(96, 64)
    assert other.image_shape == (3, 96, 64) and codec.image_shape == (3, 64, 64)
    assert other.modules()["vae"] is codec.modules()["vae"] and copy.deepcopy(codec) is codec
    with pytest.raises(UserError, match=r"size 40x64: the VAE works in steps of 32 pixels; nearest 32x64"):
        codec.resized(40, 64)


def test_released_weights_are_read_again_and_half_precision_is_bfloat16(folder):
    codec = SanaCodec(folder, SHAPE)
    before, vae = codec.encode_prompts(["fox"])["text"], codec.modules()["vae"]
    codec.release()
    assert torch.equal(codec.encode_prompts(["fox"])["text"], before) and codec.modules()["vae"] is not vae
    codec.to("cpu", torch.bfloat16)
    assert {part.dtype for part in codec.modules().values()} == {torch.bfloat16}
    assert codec.encode_prompts(["fox"])["text"].dtype == torch.float32
    assert SanaCodec(folder, SHAPE).to("cpu", torch.float16).modules()["vae"].dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "text", "image"),
    [
        ("text_encoder/model.safetensors", True, False),
        ("tokenizer/tokenizer.json", True, False),
        ("vae/diffusion_pytorch_model.safetensors", False, True),
        ("transformer/config.json", False, False),
    ],
)
def test_the_hashes_change_with_what_they_stand_for(folder, tmp_path, monkeypatch, file, text, image):
    where = shutil.copytree(folder, tmp_path / "other")
    before = SanaCodec(where, SHAPE)
    hashes = before.text_sha256, before.image_sha256
    (where / file).write_bytes((where / file).read_bytes() + b" ")
    after = SanaCodec(where, SHAPE)
    assert (after.text_sha256 != hashes[0], after.image_sha256 != hashes[1]) == (text, image)
    monkeypatch.setattr("fastgen.codecs.sana.INSTRUCTION", "draw: ")
    assert SanaCodec(where, SHAPE).text_sha256 != after.text_sha256


def test_without_a_text_encoder_and_with_broken_parts(folder, tmp_path):
    where = shutil.copytree(folder, tmp_path / "other")
    file = where / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no AutoencoderDC can be made of it"):
        SanaCodec(where, SHAPE).decode(torch.zeros(1, *SHAPE))
    (where / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no Gemma tokenizer can be made of it"):
        SanaCodec(where, SHAPE).encode_prompts(["x"])
    shutil.rmtree(where / "text_encoder")
    with pytest.raises(UserError, match=r"no text encoder; put text_encoder/ and tokenizer/"):
        SanaCodec(where, SHAPE).null()


def test_a_bfloat16_variant_is_read(folder, tmp_path):
    """As one of the published pipelines has its text encoder."""
    where = shutil.copytree(folder, tmp_path / "other")
    codec = SanaCodec(where, SHAPE)
    encoder: Any = codec.to("cpu", torch.bfloat16).modules()["text_encoder"]
    shutil.rmtree(where / "text_encoder")
    encoder.save_pretrained(where / "text_encoder", variant="bf16")
    assert not (where / "text_encoder/model.safetensors").exists()
    again = SanaCodec(where, SHAPE)
    assert torch.allclose(again.null()["text"], codec.null()["text"], atol=0.1)
