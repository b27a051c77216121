"""What a stage feeds its network: the run's data, as latents and conditions where the network lives on latents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from fastgen.data import DataSet, open_data
from fastgen.data.closed_form import MixtureSamples
from fastgen.data.encoded import Captioned, EncodedPairs, Texts, encode
from fastgen.data.part import data_part
from fastgen.data.shape_rows import Part, ShapeRows
from fastgen.data.shapes import LatentShapes, read_manifest
from fastgen.data.shards import PairShards
from fastgen.data.synthetic_shapes import SyntheticShapes
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.stages.context import Context
from fastgen.teachers.mixture import Mixture
from fastgen.teachers.trellis.assembly import LATENTS
from fastgen.teachers.trellis.flows import FlowDenoiser

logger = logging.getLogger("fastgen")


def latent_rows(run: Context, reference: str | None, part: Part, *flows: Denoiser) -> ShapeRows | SyntheticShapes:
    """Latents of shapes for these flows of a part: those of a stage or a folder, else the run's data.

    A text flow that came without the empty text's encoding is given that of the latents. What does not fit the flows
    (another normalisation, other conditions) is a UserError.
    """
    for flow in flows:  # each refuses latents that are not for it
        rows = _rows_for(run, reference, part, cast(FlowDenoiser, flow))
    for flow in cast(Any, flows):
        if rows.empty is not None and flow.empty is None:
            flow.empty = rows.empty.to(flow.device)
    return rows


def _rows_for(run: Context, reference: str | None, part: Part, flow: FlowDenoiser) -> ShapeRows | SyntheticShapes:
    config, condition = run.config.data, flow.condition
    if reference is not None:
        folder = run.path(reference)
        folder = folder / LATENTS if (folder / LATENTS).is_dir() else folder
    elif config is not None and config.kind == "synthetic":
        args = flow.net.args
        return SyntheticShapes(part, flow.shape, args.resolution, condition, args.cond_channels, config.rows)
    elif config is None or config.path is None:
        raise UserError(f"part={part}: set data.path to latents of shapes, which `fastgen latents` makes")
    else:
        folder = Path(config.path).expanduser()
    manifest, told = read_manifest(folder), getattr(flow, "normalization", None)
    mean, std = (manifest.mean, manifest.std) if told is None else told
    return ShapeRows(LatentShapes(folder, mean=mean, std=std), part, condition)


def training_data(run: Context) -> DataSet | None:
    """The run's data as they lie on disk: texts whole, images without captions but for the held-out part."""
    config = run.config.data
    if config is None:
        return None
    if config.kind == "closed_form":
        return _drawn(run, config.rows)
    data = open_data(config)
    return data if data.captions is not None else data_part(config, "train", run.config.hold_out)


def _drawn(run: Context, rows: int) -> MixtureSamples:
    """Samples of the run's closed-form teacher."""
    truth = run.open_teacher("teacher").denoiser
    if not isinstance(truth, Mixture):
        raise UserError("data.kind=closed_form: the teacher is none; set teacher: {family: mixture, ...}")
    return MixtureSamples(truth, rows)


def prompts(run: Context, denoiser: Denoiser) -> Texts:
    """The conditions of the run's prompts, or of its captions, encoded or from the cache; the encoders are dropped."""
    assert denoiser.codec is not None
    data = training_data(run)
    if data is None or data.captions is None:
        raise UserError("this network reads text: set data.path to prompts (one per line) or to captioned images")
    texts = Texts(denoiser.codec, data.captions, run.cache).make(advance=_told("prompts"), interrupt=run.interrupt)
    denoiser.codec.release()
    return texts


def as_seen(run: Context, data: DataSet, denoiser: Denoiser, *, images: bool) -> DataSet:
    """Data (or pairs) as the network reads them. images: whether a method needs latents, or prompts alone will do."""
    if denoiser.codec is None:
        if data.captions is not None:
            raise UserError(f"{data.name}: texts, which this {denoiser.family} network does not read")
        return data
    if isinstance(data, PairShards):
        texts = prompts(run, denoiser)
        if texts.sha256 != (data.manifest.model_extra or {}).get("texts"):
            raise UserError(f"{data.folder}: made with other prompts than those of data.path; give the same file")
        return EncodedPairs(data, texts)
    if data.captions is None:
        raise UserError(f"{data.name}: images without captions, and the network reads text; see docs/data.md")
    return encode(
        denoiser.codec,
        cast(Captioned, data),
        run.cache,
        shape=denoiser.shape,
        images=images,
        advance=_told("encoding"),
        interrupt=run.interrupt,
    )


def _told(what: str) -> Callable[[int, int], None]:
    def advance(done: int, total: int) -> None:
        logger.info("%s: part %d of %d", what, done + 1, total)

    return advance
