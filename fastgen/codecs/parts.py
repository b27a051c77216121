"""What the codecs of pipelines have in common: a folder whose networks and tokenizers are read when first asked for."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgen import files
from fastgen.errors import UserError
from fastgen.nets.weights import weight_files

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT = (".json", ".txt", ".model", ".safetensors")
Kinds = Callable[[str], Any]  # the class of a part's name; a function, since naming them imports their libraries


class Parts(dict[str, Any]):
    """Parts of a folder by name: "tokenizer*" are tokenizers, "vae" an autoencoder, the others text encoders."""

    def __init__(self, folder: Path, kinds: Kinds) -> None:
        super().__init__()
        self.folder, self.kinds = folder, kinds
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def config(self, name: str) -> dict[str, Any]:
        file = self.folder / name / "config.json"
        config = files.read_json(file)
        if not isinstance(config, dict):
            raise UserError(f"{file}: not the config of a network")
        return config

    def __missing__(self, name: str) -> Any:
        part = self._tokenizer(name) if name.startswith("tokenizer") else self._network(name)
        self[name] = part
        return part

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        for name, part in self.items():
            if isinstance(part, torch.nn.Module):
                part.to(device, self._dtype_of(name))

    def release(self) -> None:
        self.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Copies of the named parts that there are, pickled weights left out."""
        for name in names:
            source = self.folder / name
            if source.is_dir():
                (folder / name).mkdir(parents=True)
                for file in sorted(source.iterdir()):
                    if file.suffix in KEPT:
                        shutil.copyfile(file, folder / name / file.name)

    def digest(self, names: Sequence[str], extra: str) -> str:
        """One hash of the named parts' files and a setting."""
        digest = hashlib.sha256(extra.encode())
        for name in names:
            if (self.folder / name).is_dir():
                digest.update(f"{name} {files.sha256(self.folder / name)}".encode())
        return digest.hexdigest()

    def _dtype_of(self, name: str) -> torch.dtype:
        # XL's config asks for float32; DC-AE's (and old ones) say nothing, and overflow in float16 too.
        upcast = self.dtype == torch.float16 and name == "vae" and self.config("vae").get("force_upcast", True)
        return torch.float32 if upcast else self.dtype

    def _tokenizer(self, name: str) -> Any:
        kind = self.kinds(name)
        try:
            return kind.from_pretrained(self.folder / name, local_files_only=True)
        except Exception as error:  # what it raises for broken files has no common base
            reason = " ".join(str(error).split())[:200]
            words = kind.__name__.removesuffix("Tokenizer")
            raise UserError(f"{self.folder / name}: no {words} tokenizer can be made of it ({reason})") from error

    def _network(self, name: str) -> torch.nn.Module:
        from transformers.utils import logging as quiet

        quiet.disable_progress_bar()
        kind = self.kinds(name)
        where, stem = self.folder / name, "diffusion_pytorch_model" if name == "vae" else "model"
        half = re.search(r"\.(fp16|bf16)[.-]", weight_files(where, stem)[0].name)
        variant = {"variant": half[1]} if half else {}
        try:
            network = kind.from_pretrained(
                where, torch_dtype=self._dtype_of(name), local_files_only=True, use_safetensors=True, **variant
            )
        except Exception as error:  # broken files and configs that do not fit: no common base either
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: no {kind.__name__} can be made of it ({reason})") from error
        return network.requires_grad_(False).eval().to(self.device)


class PipelineCodec:
    """The part of `fastgen.codec.Codec` that asks nothing of its networks. `folder` is the pipeline's.

    image_shape  (3, H, W); others by `resized`
    factor       pixels a side of a latent's place: the VAE halves once a level of its config's entry `channels`
    """

    def __init__(self, folder: Path, latent: tuple[int, ...], kinds: Kinds, *, channels: str) -> None:
        self.folder, self.tiling, self.slicing = folder, False, False
        self.keep: Any = None  # what must live as long as the codec: a temporary folder
        self._parts = Parts(folder, kinds)
        self.factor = 2 ** (len(self._parts.config("vae")[channels]) - 1)
        self.image_shape = (3, *(side * self.factor for side in latent[1:]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: copies of a network share it

    def resized(self, height: int, width: int) -> Self:
        """The same codec for images of another size in pixels; sizes that the VAE cannot halve are UserErrors."""
        if height % self.factor or width % self.factor or min(height, width) < self.factor:
            near = [max(1, round(side / self.factor)) * self.factor for side in (height, width)]
            raise UserError(
                f"size {height}x{width}: the VAE works in steps of {self.factor} pixels; nearest {near[0]}x{near[1]}"
            )
        other = copy.copy(self)
        other.image_shape = (3, height, width)
        return other

    @property
    def reads_text(self) -> bool:
        """Whether the folder holds a text encoder and its tokenizer."""
        return all((self.folder / name).is_dir() for name in ("tokenizer", "text_encoder"))

    def need_text(self) -> None:
        """A UserError where there is no text encoder."""
        if not self.reads_text:
            raise UserError(
                f"{self.folder}: no text encoder; put text_encoder/ and tokenizer/ of the checkpoint there, "
                "or give prompts whose embeddings are cached"
            )

    def put(self, name: str, network: torch.nn.Module) -> None:
        """Use this network for a part, instead of the folder's."""
        self._parts[name] = network

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights and computations; see `to`."""
        return self._parts.dtype

    @cached_property
    def image_sha256(self) -> str:
        return self._parts.digest(["vae"], "")

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Where it works from now on, and how precisely; a VAE that asks for float32 is never put in fp16."""
        self._parts.to(torch.device(device), dtype or self._parts.dtype)
        return self

    def release(self) -> None:
        """Drop the weights; the next call reads them again."""
        self._parts.release()
