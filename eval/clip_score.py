"""CLIP score: how well images show what their prompts say, 100 * max(cos(image, text), 0), averaged (2104.08718).

The number belongs to one CLIP model. Papers of one-step Stable Diffusion quote OpenAI's ViT-L/14 (as torchmetrics
does), OpenCLIP's ViT-g/14 or ViT-G/14, with cosines times 1 or 100, with or without "A photo depicts" before the
prompt: compare only where name and hash agree. Here: prompts as they are, times 100.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastgen.errors import UserError
from fastgen.files import peek_json, sha256
from fastgen.images import to_pil

logger = logging.getLogger("fastgen")
BATCH = 32
NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json")


class ClipScore:
    """A running mean over batches of images and prompts.

    folder: a transformers CLIPModel with its tokenizer and its image processor, as `save_pretrained` writes it; nothing
    is downloaded. `sha256` is that of model.safetensors.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = Path(folder).expanduser(), torch.device(device)
        _check(self.folder)
        self._model, self._tokenizer, self._processor = _load(self.folder)
        self._model.to(self.device)
        self._length = self._model.config.text_config.max_position_embeddings
        self.name = self.folder.resolve().name
        self.sha256 = sha256(self.folder / "model.safetensors")
        self.count, self.cut = 0, 0
        self._total = 0.0

    def update(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] and their N prompts: the scores [N], which are added to the mean."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        parts = [
            self._scores(images[i : i + BATCH], list(prompts[i : i + BATCH])) for i in range(0, len(images), BATCH)
        ]
        scores = torch.cat(parts)
        self.count += len(scores)
        self._total += float(scores.double().sum())
        return scores

    @property
    def value(self) -> float:
        """The mean so far, 0 .. 100."""
        if not self.count:
            raise ValueError("no images were added")
        return self._total / self.count

    @torch.inference_mode()
    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        pixels = self._processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        longest = max(len(ids) for ids in self._tokenizer(prompts)["input_ids"])
        self.cut += sum(len(ids) > self._length for ids in self._tokenizer(prompts)["input_ids"])
        words = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=min(longest, self._length), return_tensors="pt"
        ).to(self.device)
        # By hand: what get_image_features returns depends on the version of transformers.
        model = self._model
        seen = model.visual_projection(model.vision_model(pixel_values=pixels.to(self.device)).pooler_output)
        read = model.text_projection(
            model.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).pooler_output
        )
        return 100 * torch.cosine_similarity(seen, read).clamp_min(0).cpu()


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"--clip {folder}: no such folder; give a transformers CLIPModel folder (config, weights, words)"
        )
    for name in NEEDED:
        if not (folder / name).is_file():
            raise UserError(
                f"--clip {folder}: no {name} in it; put the files of a CLIP model there ({', '.join(NEEDED)} and its "
                f"tokenizer), for instance those of openai/clip-vit-large-patch14"
            )
    kind = peek_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(f"--clip {folder}: config.json is of a model of type '{kind}', not of a CLIP model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own table of missing tensors and its progress bar: what is wrong is told in one line."""
    from transformers.utils import logging as told

    level, bar = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bar:
            told.enable_progress_bar()


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and PIL image processor: torchvision's gives slightly other pixels where it is installed."""
    import transformers
    from transformers import CLIPTokenizer

    network: Any = transformers.CLIPModel
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    try:
        with _quiet():
            model, info = network.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            pictures = processor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"--clip {folder}: not readable as a CLIP model ({' '.join(str(error).split())[:200]})"
        ) from error
    if info["missing_keys"]:
        raise UserError(f"--clip {folder}: the weights lack {sorted(info['missing_keys'])[0]}; fetch the file again")
    return model.float().eval().requires_grad_(False), words, pictures
