"""What TRELLIS's flows are told: DINOv2's tokens of an image, or CLIP's of a text.

An encoder's name is looked for as the folder that is given, as a path, in the local hub cache, and, for DINOv2, as
torch-hub's checkpoint. Nothing is fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgen.errors import UserError, first_line
from fastgen.files import load_pickled

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 518  # pixels: 37 patches of 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 1.2  # side of the crop over that of the subject
SUBJECT = 0.8  # alpha above which a pixel belongs to it
LONGEST = 1024  # side to which an image without alpha is limited before its background is removed
TOKENS = 77


class _Known(NamedTuple):
    hub: str  # transformers' folder
    torch_hub: str  # the original's checkpoint
    width: int
    layers: int
    heads: int


DINO = {
    f"dinov2_vit{size}14_reg": _Known(
        f"facebook/dinov2-with-registers-{name}", f"dinov2_vit{size}14_reg4_pretrain.pth", *dims
    )
    for size, name, dims in (("s", "small", (384, 12, 6)), ("b", "base", (768, 12, 12)), ("l", "large", (1024, 24, 16)))
}


def prepare(image: Image) -> Image:
    """The subject of an RGBA image on black, RGB of 518 x 518: the square round it with a fifth to spare.

    An image without transparency has its background removed by the optional package rembg. No subject is a UserError.
    """
    from PIL import Image as Pictures

    image = image if image.mode == "RGBA" and np.asarray(image)[..., 3].min() < 255 else _without_background(image)
    alpha = np.asarray(image)[..., 3]
    rows, columns = np.nonzero(alpha > SUBJECT * 255)
    if not len(rows):
        raise UserError("this image shows no subject: no pixel's alpha is above 0.8; cut it out with a solid inside")
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    side = int(max(right - left, bottom - top) * MARGIN)
    x, y = (left + right) / 2, (top + bottom) / 2
    half = side // 2
    if not half:
        raise UserError("this image's subject is a single pixel; give a picture of it")
    cut = image.crop((x - half, y - half, x + half, y + half))  # rounded by Pillow; what lies outside is clear
    cut = cut.resize((SIDE, SIDE), Pictures.Resampling.LANCZOS)
    values = np.asarray(cut).astype(np.float32) / 255
    return Pictures.fromarray((values[..., :3] * values[..., 3:] * 255).astype(np.uint8))


def _without_background(image: Image) -> Image:
    """RGBA with the subject cut out by rembg's u2net, of a longer side of at most 1024 pixels."""
    from PIL import Image as Pictures

    try:
        import rembg
    except ImportError as error:
        raise UserError(
            "this image has no transparent background, and removing it needs rembg (pip install rembg); or cut the "
            "subject out and give an RGBA image"
        ) from error
    scale = min(1, LONGEST / max(image.size))
    small = image.convert("RGB").resize([int(side * scale) for side in image.size], Pictures.Resampling.LANCZOS)
    return rembg.remove(small, session=rembg.new_session("u2net"))


class ImageEncoder:
    """DINOv2 with registers. name: the official one, or a transformers folder; folder: looked at first."""

    def __init__(self, name: str, *, folder: Path | None = None, device: str = "cpu") -> None:
        self.name, self.folder, self.device = name, folder, device

    @cached_property
    def net(self) -> nn.Module:
        """The network without its last norm: what it returns are the last block's tokens."""
        net = _dino(self.name, self.folder)
        net.layernorm = nn.Identity()
        return net.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def tokens(self, images: Sequence[Image]) -> Tensor:
        """Tokens before the last norm, float32 [B, 1 + registers + 37 * 37, width], of images of 518 x 518 RGB."""
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        inputs = ((pixels / 255 - mean) / std).to(self.device)
        return self.net(inputs).last_hidden_state.float()

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Conditions [B, L, width]: all tokens, each normed without weights (eps 1e-5)."""
        tokens = self.tokens([prepare(image) for image in images])
        return nn.functional.layer_norm(tokens, tokens.shape[-1:])


class TextEncoder:
    """CLIP's text tower. name: a hub id, or a transformers folder; folder: looked at first."""

    def __init__(self, name: str, *, folder: Path | None = None, device: str = "cpu") -> None:
        self.name, self.folder, self.device = name, folder, device

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """(tokenizer, network)"""
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as quiet

        quiet.disable_progress_bar()
        folder = self.folder or _cached(self.name)
        if folder is None:
            raise _missing(self.name, f"the files of {self.name} (config, tokenizer, model.safetensors)")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            net = CLIPTextModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: no text encoder of CLIP ({first_line(error)})") from error
        ready: nn.Module = net.eval().requires_grad_(False)
        return tokenizer, ready.to(self.device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Conditions [B, 77, width]: hidden states after the last norm."""
        tokenizer, net = self.parts
        ids = tokenizer(
            list(texts), max_length=TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return net(ids.to(self.device)).last_hidden_state.float()

    @property
    def empty(self) -> Tensor:
        """The empty text's, [1, 77, width]: what guidance leads away from."""
        return self.encode([""])


def _dino(name: str, folder: Path | None) -> Any:
    from transformers import Dinov2WithRegistersModel
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    known = DINO.get(name)
    found = folder or _cached(known.hub if known else name)
    if found is not None:
        if not (found / "config.json").exists():
            raise UserError(f"{found}: no transformers folder of DINOv2 with registers; there is no config.json")
        try:
            return Dinov2WithRegistersModel.from_pretrained(found, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{found}: not DINOv2 with registers ({first_line(error)})") from error
    if known is None:
        raise _missing(name, "config.json and model.safetensors of a Dinov2WithRegistersModel")
    checkpoint = torch_hub() / known.torch_hub
    if not checkpoint.exists():
        raise _missing(
            name, f"{known.hub} (config.json, model.safetensors)", f", or {known.torch_hub} in {torch_hub()}"
        )
    return _from_torch_hub(checkpoint, known)


def _missing(name: str, files: str, other: str = "") -> UserError:
    return UserError(
        f"the encoder {name} is not here, and nothing is fetched: fetch {files}, and give the folder with --encoder, "
        f"or put it in the hub cache{other}"
    )


def _cached(name: str) -> Path | None:
    """A path that is there, or the newest snapshot of a hub id in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def torch_hub() -> Path:
    """Where torch.hub keeps checkpoints."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def _from_torch_hub(file: Path, known: _Known) -> Any:
    """The original's checkpoint in transformers' network; every tensor finds its place, or it is a UserError."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    original = load_pickled(file)
    config = Dinov2WithRegistersConfig(
        hidden_size=known.width,
        num_hidden_layers=known.layers,
        num_attention_heads=known.heads,
        image_size=SIDE,
        patch_size=14,
        num_register_tokens=4,
    )
    try:
        loaded: Any = Dinov2WithRegistersModel.from_pretrained(
            None, config=config, state_dict=renamed(original), output_loading_info=True
        )
    except RuntimeError as error:  # shapes
        raise UserError(f"{file}: not the checkpoint of {known.hub} (its tensors have other shapes)") from error
    net, told = loaded
    if astray := sorted({*told["missing_keys"], *told["unexpected_keys"]}):
        raise UserError(f"{file}: not the checkpoint of {known.hub} (tensor '{astray[0]}' has no place)")
    return net


NAMES = (  # of facebookresearch/dinov2, and of transformers' files
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def renamed(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch's tensors under transformers' names; the joint q, k, v are cut in three."""
    found: dict[str, Tensor] = {}
    for name, tensor in original.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece
        else:
            found[name] = tensor
    return found
