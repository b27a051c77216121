"""Published architectures: their sizes and costs as published, built without memory; and a small one built for real."""

from __future__ import annotations

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval.roofline import flops
from fastgen.paths import VP, RectifiedFlow
from fastgen.zoo.fresh import build
from fastgen.zoo.stable_diffusion import ARCHITECTURES

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
# GFLOP of one forward at batch 1 (the protocol's table), and of one decoding.
COST = {"sd15": (64, 803, 2515), "sdxl": (128, 6761, 10470)}


@pytest.fixture(scope="module")
def built():
    return {name: build(name, "meta") for name in ARCHITECTURES}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parameters_are_as_published(built, name):
    denoiser = built[name]
    parts = {"unet": denoiser.net, **denoiser.codec.modules()}
    assert {part: sum(p.numel() for p in net.parameters()) for part, net in parts.items()} == PARAMETERS[name]
    assert all(p.is_meta for net in parts.values() for p in net.parameters())


@pytest.mark.parametrize("name", sorted(COST))
def test_operations_are_as_measured_elsewhere(built, name):
    denoiser, (side, unet, vae) = built[name], COST[name]
    assert denoiser.shape == (4, side, side)
    x = torch.zeros(1, *denoiser.shape, device="meta")
    cond = {"text": torch.zeros(1, 77, denoiser.net.config.cross_attention_dim, device="meta")}
    if denoiser.xl:
        cond |= {"pooled": torch.zeros(1, 1280, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    time = torch.zeros(1, device="meta")
    assert round(flops(lambda: denoiser.raw(x, time, cond, None)) / 1e9) == unet
    assert round(flops(lambda: denoiser.codec.decode(x)) / 1e9) == vae


def test_conventions_are_those_of_the_checkpoints(built):
    assert {name: one.prediction.kind for name, one in built.items()} == {"sd15": "eps", "sd21": "v", "sdxl": "eps"}
    assert all(one.path == VP() for one in built.values())
    assert {name: one.codec.image_shape[1] for name, one in built.items()} == {"sd15": 512, "sd21": 768, "sdxl": 1024}


def test_the_prompt_is_framed_and_padded_as_clips(built):
    (ids,) = built["sd15"].codec._tokens(built["sd15"].codec._parts["tokenizer"], ["ab"]).tolist()
    assert len(ids) == 77 and ids[0] == 49406 and ids[3:] == [49407] * 74


def test_unknown_architectures_are_refused():
    with pytest.raises(UserError, match="did you mean 'sd15'"):
        build("sd-15")


SANA = {  # the transformer as published; of the autoencoder and the text encoder there is one
    "sana": 591_876_896,
    "sana-0.6b": 591_747_872,
    "sana-1.6b": 1_604_462_752,
}


@pytest.mark.parametrize("name", SANA)
def test_sana_is_as_published(name):
    denoiser = build(name, "meta")
    parts = {"transformer": denoiser.net, **denoiser.codec.modules()}
    assert {part: sum(p.numel() for p in net.parameters()) for part, net in parts.items()} == {
        "transformer": SANA[name],
        "vae": 312_250_275,
        "text_encoder": 2_614_341_888,
    }
    assert all(p.is_meta for net in parts.values() for p in net.parameters())
    assert denoiser.shape == (32, 32, 32) and denoiser.codec.image_shape == (3, 1024, 1024)
    assert denoiser.time_scale == (1 if name == "sana" else 1000) and denoiser.path == RectifiedFlow()
    cond = {"text": torch.zeros(1, 300, 2304, device="meta"), "text_mask": torch.zeros(1, 300, device="meta")}
    x = torch.zeros(1, 32, 32, 32, device="meta")
    assert denoiser.raw(x, torch.zeros(1, device="meta"), cond, None).shape == x.shape
    assert denoiser.codec.decode(x).shape == (1, 3, 1024, 1024)
