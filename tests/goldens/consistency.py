"""Golden kinds of the consistency group."""

from __future__ import annotations

import importlib
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgen.nets.lora import UNET_TARGETS, LoraConfig, add_lora, lora_settings, lora_tensors
from fastgen.paths import VP, Prediction
from fastgen.samplers.export import lora_keys
from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser
from tests.goldens.case import Case


def lora_layout(case: Case) -> None:
    """Names and shapes of a U-Net's adapters: peft's, those that `load_lora_weights` reads, and kohya's."""
    assert case.data["lora_targets"] == list(UNET_TARGETS)
    rank, alpha = case.result("rank"), case.result("alpha")
    net = UNet2DConditionModel(**case.data["unet_config"])
    denoiser = StableDiffusionDenoiser(net, VP(), Prediction(kind="eps"), shape=(4, 8, 8))
    add_lora(denoiser, LoraConfig(rank=rank, alpha=alpha), seed=0)
    tensors, settings = lora_tensors(denoiser), lora_settings(denoiser)
    assert (settings["rank"], settings["alpha"]) == (rank, alpha)
    assert set(settings["targets"]) == set(UNET_TARGETS)
    assert shapes(tensors) == case.data["loadable_keys"]
    peft = {name.removeprefix("base_model.model."): shape for name, shape in case.data["peft_keys"].items()}
    assert {name.removeprefix("unet."): shape for name, shape in shapes(tensors).items()} == peft
    assert shapes(lora_keys.kohya(tensors, settings)[0]) == case.data["kohya_keys"]


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def tiny_losses(case: Case) -> None:
    """One loss after the other, by the family that its name begins with: `tiny_FAMILY.py` holds `check`."""
    checked: dict[str, Any] = {}
    for name, entry in {**case.data["cases"], "ict": case.data["ict"]}.items():
        family = name.split("_")[0]
        checked.setdefault(family, importlib.import_module(f"tests.goldens.tiny_{family}"))
        checked[family].check(case, name, entry)
