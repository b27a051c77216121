"""`fastgen evaluate MODEL`: one model's samples, or images that are there, against real images or their statistics."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastgen import api, files
from fastgen.data.prompts import read_prompts
from fastgen.errors import UserError
from fastgen.eval import metrics
from fastgen.eval.clip_score import ClipScore
from fastgen.eval.extractors import Classifier
from fastgen.eval.metrics import Result
from fastgen.eval.presets import Preset, coco_captions, find_file, find_preset
from fastgen.eval.tally import Tally, measure
from fastgen.references import Seen, batch_size, counted, see_reference
from fastgen.samples import Found, Made, Samples

logger = logging.getLogger("fastgen")
NUM = 5000


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is to be measured; the fields are the options of the command."""

    model: str | None = None
    reference: str | None = None
    num: int | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    extractor: str | None = None
    fid: str | None = None
    weights: Path | None = None
    backend: str = "own"
    preset: str | None = None
    prompts: Path | None = None
    samples: Path | None = None
    save_reference: Path | None = None
    clip: Path | None = None
    crop: int | None = None
    batch: int | None = None
    device: str = "auto"
    hold_out: int = 5
    labels: str = "balanced"


def evaluate(ask: Ask) -> list[Result]:
    """Frechet distance, KID, precision, recall and nearest image, Inception Score where the extractor classifies, CLIP
    score where a CLIP model is given; with a classifier also shares and labels obeyed.

    Images pass in batches: only features are kept. Against a file of statistics only the Frechet distance and what
    needs no reference is measured.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        rows = _evaluate(ask)
    for message in dict.fromkeys(str(warning.message) for warning in told):
        logger.warning("%s", message)
    return rows


def _evaluate(ask: Ask) -> list[Result]:
    preset = find_preset(ask.preset) if ask.preset else None
    ask = _with_preset(ask, preset) if preset else ask
    if ask.model is None and ask.samples is None and ask.save_reference is None:
        raise UserError("evaluate: give a MODEL, or the images to measure as --samples")
    if ask.reference is None and (ask.clip is None or ask.save_reference is not None):
        raise UserError("evaluate: give real images or their statistics as --reference, a --preset, or --clip alone")
    device = api.pick_device(ask.device)
    prompts = _read_prompts(ask)
    if prompts is not None and ask.extractor is None:
        ask = replace(ask, extractor="inception")  # photographs, with no labels to train a classifier on
    samples = _samples(ask, prompts, device, preset)
    clip = _open_clip(ask, prompts, samples, device)
    seen = None
    if ask.reference is not None:
        seen = see_reference(ask, samples.shape if samples else None, device)
    if samples is None:
        return []
    return _measured(ask, samples, seen, clip, prompts, device)


def _with_preset(ask: Ask, preset: Preset) -> Ask:
    """The protocol's settings; what it fixes cannot be chosen besides, a smaller number is said."""
    for option, value in (("--fid", ask.fid), ("--crop", ask.crop), ("--extractor", ask.extractor)):
        if value is not None:
            raise UserError(f"{option} {value}: --preset {ask.preset} decides that; leave one of them out")
    if ask.num is not None and ask.num != preset.num:
        logger.warning("--num %d: the protocol has %d, the result compares with no published one", ask.num, preset.num)
    reference = find_file(ask.reference, preset.reference, preset.reference_source, "--reference")
    _check_hash(reference, preset.reference_sha256, preset.reference_source, published=ask.reference is None)
    prompts = ask.prompts
    if preset.prompts:
        prompts = find_file(ask.prompts, preset.prompts, preset.prompts_source, "--prompts")
        _check_hash(prompts, preset.prompts_sha256, preset.prompts_source, published=ask.prompts is None)
    logger.info("%s: %s. %s", ask.preset, preset.about, preset.notes)
    num = ask.num or preset.num
    fixed = replace(ask, fid=preset.fid, crop=preset.crop, labels=preset.labels, num=num)
    return replace(fixed, reference=str(reference), prompts=prompts)


def _check_hash(path: Path, known: str | None, source: str, *, published: bool) -> None:
    """A file under a published name must be the published one; a hash that nobody told us is told by us."""
    if not path.is_file():
        return
    found = files.sha256(path)
    if known is None:
        logger.info("%s: sha256 %s (the published file's is not known here)", path, found)
    elif found != known and published:
        raise UserError(f"{path}: not the published file (sha256 {found[:12]}, not {known[:12]}); fetch {source}")
    elif found != known:
        logger.warning("%s: not the protocol's own file (sha256 %s, not %s)", path, found[:12], known[:12])


def _read_prompts(ask: Ask) -> list[str] | None:
    if ask.prompts is None:
        return None
    return coco_captions(ask.prompts) if ask.prompts.suffix == ".json" else read_prompts(ask.prompts)


def _samples(ask: Ask, prompts: list[str] | None, device: str, preset: Preset | None) -> Samples | None:
    """The model's samples, or the images that are there; None where only statistics are wanted."""
    if ask.model is None:
        refused = {"--steps": ask.steps, "--guidance": ask.guidance}
        for option, value in refused.items():
            if value is not None:
                raise UserError(f"{option} {value}: nothing is generated without a MODEL; leave it out")
        if ask.samples is None:
            return None
        return Found(ask.samples, num=ask.num, crop=ask.crop)
    loaded = api.load(ask.model, device=device)
    shape = tuple(loaded.image_shape)
    if preset and preset.side and shape[1:] != (preset.side, preset.side):
        raise UserError(f"--preset {ask.preset}: for images of side {preset.side}, this model makes {shape}")
    codec = getattr(loaded.model.denoiser, "codec", None)
    reads = codec is not None and codec.reads_text
    if reads and prompts is None:
        raise UserError(f"{ask.model}: this model reads text; give --prompts FILE")
    if prompts is not None and not reads:
        raise UserError("--prompts: this model does not read text; leave it out")
    options = {"steps": ask.steps, "guidance": ask.guidance}
    return Made(
        loaded,
        ask.num or NUM,
        seed=ask.seed,
        options={name: value for name, value in options.items() if value is not None},
        prompts=prompts,
        labels=ask.labels,
        folder=ask.samples,
        maker=files.sha256(ask.model) if ask.samples is not None and Path(ask.model).exists() else ask.model,
    )


def _open_clip(ask: Ask, prompts: list[str] | None, samples: Samples | None, device: str) -> ClipScore | None:
    if ask.clip is None:
        return None
    if prompts is None or samples is None:
        raise UserError(f"--clip {ask.clip}: the score compares images with prompts; give --prompts FILE")
    return ClipScore(ask.clip, device)


def _measured(
    ask: Ask, samples: Samples, seen: Seen | None, clip: ClipScore | None, prompts: list[str] | None, device: str
) -> list[Result]:
    """One pass over the samples, and every result of it."""
    tally = Tally(seen.backend.extractor, seen.near) if seen else None
    labels: list[Tensor] = []
    done = 0
    size = batch_size(ask, samples.shape)
    for batch in counted(samples.batches(size), len(samples), "images"):
        pictures = batch.images.to(device)
        if tally is not None:
            tally.update(pictures)
        if clip is not None:
            assert prompts is not None
            clip.update(pictures, batch.prompts or _prompts_of(prompts, done, len(pictures)))
        if batch.labels is not None:
            labels.append(batch.labels)
        done += len(pictures)
    seed = ask.seed if ask.model is not None else None
    rows: list[Result] = []
    if seen and tally is not None:
        rows += measure(tally, seen.real, seen.backend, seed)
        if isinstance(tally.extractor, Classifier):
            rows += _class_rows(tally, rows[0], torch.cat(labels) if labels else None)
    return [*rows, *_clip_rows(clip, seed)]


def _prompts_of(prompts: list[str], start: int, count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(start, start + count)]


def _class_rows(tally: Tally, base: Result, asked: Tensor | None) -> list[Result]:
    """What the classifier reads in the samples."""
    see, probabilities = tally.extractor, tally.probabilities
    assert isinstance(see, Classifier) and probabilities is not None
    found = probabilities.argmax(-1)
    base = replace(base, floor=None, interval=None, backend="own")
    share = float(metrics.class_shares(found, see.num_classes).max())
    rows = [replace(base, metric="largest_class_share", value=share)]
    if asked is not None:
        rows.append(replace(base, metric="label_agreement", value=metrics.label_agreement(asked, found)))
    return rows


def _clip_rows(clip: ClipScore | None, seed: int | None) -> list[Result]:
    if clip is None:
        return []
    if clip.cut:
        logger.warning("%d of %d prompts were longer than CLIP reads, and cut for the score", clip.cut, clip.count)
    score = Result(
        metric="CLIP score",
        value=clip.value,
        n_gen=clip.count,
        n_ref=None,
        extractor=clip.name,
        extractor_sha256=clip.sha256,
        floor=None,
        seed=seed,
        resize="clip-processor",
    )
    return [score]
