"""The real images of a measurement, or their statistics, seen through an extractor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fastgen.data import DataConfig, DataSet, detect, open_data
from fastgen.data.part import real_images
from fastgen.errors import UserError
from fastgen.eval.backends import Backend, open_backend
from fastgen.eval.extractors import Classifier, Extractor, PooledPixels, RandomConv, load_extractor
from fastgen.eval.inception import InceptionExtractor
from fastgen.eval.statistics import is_statistics, read_statistics, write_statistics
from fastgen.eval.tally import Reference, Tally
from fastgen.samples import Batch, Found

if TYPE_CHECKING:
    from fastgen.evaluate import Ask

logger = logging.getLogger("fastgen")
NEAREST_NUMBERS = 1 << 27  # pixels of the reference held for the nearest image: 1 GiB in float64
SMALL = 64 * 64  # pixels of an image; larger ones are made and seen a few at a time
TOLD_SECONDS = 10.0


class Seen(NamedTuple):
    """Real images as the extractor saw them."""

    backend: Backend
    real: Reference
    near: Tensor | None


def see_reference(ask: Ask, shape: tuple[int, ...] | None, device: str) -> Seen:
    """Backend and extractor, and the reference seen through it: statistics, or images in batches."""
    assert ask.reference is not None
    fid = ask.fid or "tf"
    inception = _wants_inception(ask, shape)
    if ask.crop is not None and not inception:
        raise UserError(f"--crop {ask.crop}: for the Inception network; give --fid tf or --fid clean, or leave it out")
    if is_statistics(ask.reference):
        if ask.save_reference:
            raise UserError(f"--save-reference: {ask.reference} holds statistics already; give images as --reference")
        assert shape is not None
        make = _extractor_without_data(ask, fid, shape, inception)
        backend = _open(ask, make, fid, shape[0])
        found = read_statistics(ask.reference, backend.extractor)
        if found.features is None:
            logger.info("%s: statistics alone, so no KID, precision, recall and nearest image", ask.reference)
        return Seen(backend, Reference.of_statistics(found), None)
    parts = _real_parts(ask, shape, whole=inception)
    train = parts[0]
    if shape is not None and shape != tuple(train.shape) and ask.crop is None:
        raise UserError(f"--reference {ask.reference}: images of shape {tuple(train.shape)}, the model makes {shape}")

    def make_extractor() -> Extractor:
        if inception:
            return InceptionExtractor.load(ask.weights, fid, train.shape[0], ask.crop)
        see = load_extractor(ask.extractor or "classifier", train)
        if see.channels != train.shape[0]:
            raise UserError(
                f"--extractor {ask.extractor}: sees {see.channels} channel(s), the images have {train.shape[0]}"
            )
        return see

    return _seen_images(ask, _open(ask, make_extractor, fid, train.shape[0]), parts, device)


def _open(ask: Ask, extractor: Callable[[], Extractor], fid: str, channels: int) -> Backend:
    return open_backend(ask.backend, extractor, resize=fid, crop=ask.crop, weights=ask.weights, channels=channels)


def _seen_images(ask: Ask, backend: Backend, parts: list[DataSet], device: str) -> Seen:
    """The reference's own pass through the extractor, and its statistics written where that is asked for."""
    numbers = len(parts[0]) * torch.Size(parts[0].shape).numel()
    near = None
    if numbers <= NEAREST_NUMBERS and ask.crop is None:
        near = torch.cat([x.flatten(1).double() for x in _batches(parts[0], 1000)])
    else:
        logger.info("%s: cropped or too large to hold, so no distance to the nearest image", ask.reference)
    size = batch_size(ask, parts[0].shape)
    see = backend.extractor
    real = Tally.of(see, _shown(_batches(parts[0], size), len(parts[0]), "real images", device))
    held = None
    if len(parts) > 1:
        held = Tally.of(see, (x.to(device) for x in _batches(parts[1], size)), near)
    if ask.save_reference:
        facts = {"data": parts[0].name, "images": str(real.count), "pixels_sha256": real.sha256}
        write_statistics(ask.save_reference, real.moments, see, facts)
        logger.info("wrote %s", ask.save_reference)
    return Seen(backend, Reference.of_images(real, held), near)


def _wants_inception(ask: Ask, shape: tuple[int, ...] | None) -> bool:
    """Asked for by its name, its recipe, or clean-fid, which knows nothing else."""
    wanted = ask.extractor == "inception" or ask.fid is not None or ask.backend == "clean-fid"
    if wanted and ask.extractor not in (None, "inception"):
        raise UserError(
            f"--extractor {ask.extractor}: --fid and clean-fid are about the Inception network; leave one out"
        )
    if wanted and shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise UserError(f"--extractor inception: sees grey or RGB images, the model makes {shape}")
    if wanted and shape is not None and shape[1] != shape[2] and ask.crop is None:
        raise UserError(f"--extractor inception: images of {shape[1]}x{shape[2]} would be squashed; give --crop N")
    if ask.weights is not None and not wanted:
        raise UserError(f"--weights {ask.weights}: those of the Inception network; give --fid tf or --fid clean")
    return wanted


def _extractor_without_data(ask: Ask, fid: str, shape: tuple[int, ...], inception: bool) -> Callable[[], Extractor]:
    """The extractor where there is no real image to look at, and none to train a classifier on."""
    name = ask.extractor or ""
    if inception:
        return lambda: InceptionExtractor.load(ask.weights, fid, shape[0], ask.crop)
    if name.endswith(".safetensors"):
        return lambda: Classifier.load(name)
    plain: dict[str, Callable[[], Extractor]] = {
        "random-conv": lambda: RandomConv(shape[0]),
        "pooled-pixels": lambda: PooledPixels(shape),
    }
    if name not in plain:
        raise UserError(
            f"--reference {ask.reference}: statistics belong to one extractor; name it: --fid tf, --fid clean, or "
            f"--extractor with {', '.join(plain)} or a classifier's file"
        )
    return plain[name]


def _real_parts(ask: Ask, shape: tuple[int, ...] | None, *, whole: bool) -> list[DataSet]:
    """Real images: the whole set, as published protocols have it, or the training part and the held-out part."""
    assert ask.reference is not None
    path = Path(ask.reference)
    if whole and path.exists() and (path.suffix == ".npz" or detect(path) in ("folder", "captioned")):
        channels = 1 if shape and shape[0] == 1 else 3
        return [Found(path, channels=channels, crop=ask.crop, option="--reference")]
    config = _reference(ask.reference, shape)
    if not whole:
        return [*real_images(config, ask.hold_out)]
    return [open_data(config.model_copy(update={"split": "all"}) if config.kind == "digits" else config)]


def _reference(name: str, shape: tuple[int, ...] | None) -> DataConfig:
    """The shipped digits, or a path; files that can be read as grey or as RGB are read as the model makes them."""
    if name == "digits":
        return DataConfig(kind="digits")
    kind = detect(Path(name)) if Path(name).exists() else None
    channels: Literal[1, 3] = 1 if kind in ("folder", "parquet", "captioned") and shape and shape[0] == 1 else 3
    # Captioned images come in many sizes and are always brought to one.
    return DataConfig(path=name, channels=channels, size=shape[-1] if kind == "captioned" and shape else None)


def batch_size(ask: Ask, shape: tuple[int, ...]) -> int:
    if ask.batch:
        return ask.batch
    return 500 if torch.Size(shape[1:]).numel() <= SMALL else 8


def _batches(data: DataSet, size: int) -> Iterator[Tensor]:
    for index in torch.arange(len(data)).split(size):
        yield data.get(index)["x0"]


def _shown(batches: Iterator[Tensor], total: int, what: str, device: str) -> Iterator[Tensor]:
    for batch in counted((Batch(x) for x in batches), total, what):
        yield batch.images.to(device)


def counted(batches: Iterator[Batch], total: int, what: str) -> Iterator[Batch]:
    """The same, with a line on stderr now and then."""
    began = told = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.images)
        now = time.monotonic()
        if now - told >= TOLD_SECONDS:
            told, rate = now, done / (now - began)
            logger.info("%s: %d of %d, %.1f a second, %.0f s left", what, done, total, rate, (total - done) / rate)
