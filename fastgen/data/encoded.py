"""Captioned images and prompts as a latent network sees them: conditions and latents, from caches on disk.

A cache is keyed by all that made it (`Codec.text_sha256`, `Codec.image_sha256`, the texts, the images, the dtype), so
another checkpoint, tokenizer, caption or crop is another cache. With both made, a run holds neither text encoder nor
VAE.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgen import noise
from fastgen.codec import Codec, Framing
from fastgen.data.prompts import texts_sha256
from fastgen.data.shards import PairShards
from fastgen.data.source import Source
from fastgen.data.table import Table

logger = logging.getLogger("fastgen")
DTYPE = torch.float16  # half the disk; its rounding is far below the posterior's width and CLIP's own noise
NULL = -1  # the number of the empty prompt


class Captioned(Protocol):
    """A data set with a text for each row; `get` also gives how its pictures were framed ("original", "corner")."""

    name: str

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def content_sha256(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def get(self, index: Tensor) -> dict[str, Tensor]: ...


class Texts:
    """The conditions of texts by their number; `NULL` is the empty prompt. Equal texts are encoded once."""

    def __init__(self, codec: Codec, texts: Sequence[str], cache: Path) -> None:
        unique = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(unique)}
        self.codec, self._unique = codec, unique
        self._index = np.array([place[text] for text in texts], np.int64)
        self.sha256 = texts_sha256(texts)
        key = {"codec": codec.text_sha256, "dtype": str(DTYPE), "texts": texts_sha256(unique)}
        self._table = Table(cache, "text", key, len(unique) + 1)

    def __len__(self) -> int:
        return len(self._index)

    def make(self, **options: Any) -> Texts:
        """Encode what is not in the cache yet; options as of `Table.make`."""
        if self._table.missing:
            logger.info("encoding %d prompts into %s", len(self._unique), self._table.folder)
        self._table.make(self._encode, **options)
        return self

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        texts = [self._unique[row] for row in rows if row < len(self._unique)]
        parts = [self.codec.encode_prompts(texts)] if texts else []
        if len(texts) < len(rows):  # the last row is the empty prompt
            parts.append(self.codec.null())
        names = [name for name in parts[0] or {} if name != "time_ids"]
        return {name: torch.cat([(part or {})[name].cpu() for part in parts]).to(DTYPE) for name in names}

    def rows(self, numbers: Tensor, framing: Framing | None = None) -> dict[str, Tensor]:
        """{"cond.text": float32 [B, ...], ...} for numbers int64 [B]; framing as of `Codec.encode_prompts`."""
        wanted = numbers.numpy(force=True)
        places = np.where(wanted == NULL, len(self._unique), self._index[wanted])
        found = {f"cond.{name}": value.float() for name, value in self._table.get(places).items()}
        ids = self.codec.time_ids(len(wanted), framing)
        return found if ids is None else {**found, "cond.time_ids": ids.cpu()}


class Latents:
    """The encoder's posterior over each image's latents, [C, h, w] each."""

    def __init__(self, codec: Codec, data: Captioned, cache: Path) -> None:
        self.codec, self.data = codec, data
        key = {
            "codec": codec.image_sha256,
            "dtype": str(DTYPE),
            "images": data.content_sha256,
            "size": list(data.shape),
        }
        self._table = Table(cache, "latents", key, len(data), per_shard=512)

    def make(self, **options: Any) -> Latents:
        """Encode what is not in the cache yet; options as of `Table.make`."""
        if self._table.missing:
            logger.info("encoding %d images into %s", len(self.data), self._table.folder)
        self._table.make(self._encode, **options)
        return self

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = self.data.get(torch.tensor(rows))
        mean, std = self.codec.encode(batch["x0"])
        return {"mean": mean.to(DTYPE), "std": std.to(DTYPE), "original": batch["original"], "corner": batch["corner"]}

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """{"mean", "std": [B, C, h, w], "original", "corner": int64 [B, 2]}."""
        return self._table.get(index.numpy(force=True))


class Encoded:
    """A data set of conditions and, where there are images, of latents: "x0" is the posterior's mean and "x0_std" its
    standard deviation, from which a batch draws (`Batch.x0`)."""

    num_classes = None
    captions = None  # they are conditions already

    def __init__(self, name: str, shape: tuple[int, ...], texts: Texts, latents: Latents | None) -> None:
        self.name, self.shape, self.texts, self._latents = name, shape, texts, latents

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, index: Tensor) -> dict[str, Tensor]:
        if self._latents is None:
            return self.texts.rows(index)
        found = self._latents.rows(index)
        framing = Framing(found["original"], found["corner"])
        return {"x0": found["mean"].float(), "x0_std": found["std"].float(), **self.texts.rows(index, framing)}


class EncodedPairs:
    """Pairs that name their prompts by number, with the conditions in place of the numbers."""

    captions = None

    def __init__(self, pairs: PairShards, texts: Texts) -> None:
        self.name, self.shape, self.num_classes = pairs.name, pairs.shape, pairs.num_classes
        self.pairs, self.manifest, self._texts = pairs, pairs.manifest, texts

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, index: Tensor) -> dict[str, Tensor]:
        batch = self.pairs.get(index)
        return {**batch, **self._texts.rows(batch.pop("prompt"))}


class CaptionDropout:
    """Rows of a source, some of them with the empty prompt: which ones depends on seed and row alone."""

    def __init__(self, source: Source, texts: Texts, share: float) -> None:
        self.source, self.share = source, share
        self._null = texts.rows(torch.tensor([NULL]))

    def get(self, rows: Tensor) -> dict[str, Tensor]:
        batch = self.source.get(rows)
        dropped = noise.uniform(self.source.seed, "caption/drop", rows.cpu()) < self.share
        for name, null in self._null.items():
            if name != "cond.time_ids":  # how the picture was framed is no caption
                batch[name][dropped] = null
        return batch

    def tokens(self, rows: Tensor) -> list[int]:
        return self.source.tokens(rows)


def encode(
    codec: Codec, data: Captioned, cache: Path, *, shape: tuple[int, ...], images: bool, **options: Any
) -> Encoded:
    """Texts and, where they are asked for, images of a data set, encoded or found in the cache; the codec's weights are
    dropped afterwards. options: `advance` and `interrupt` as of `Table.make`.
    """
    texts = Texts(codec, data.captions, cache).make(**options)
    latents = Latents(codec, data, cache).make(batch=8, **options) if images and data.shape else None
    codec.release()
    return Encoded(data.name, shape, texts, latents)
