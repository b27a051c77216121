"""What stands in for data and encoders when a training step is planned: shapes without values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgen.codecs.sana import LENGTH
from fastgen.denoiser import Denoiser
from fastgen.sparse import Voxels
from fastgen.sparse.shapes_only import ShapesOnly
from fastgen.teachers.trellis import conditions
from fastgen.teachers.trellis.flows import IMAGE, TEXT, FlowDenoiser, LatentDenoiser

# Of a picture: the class, four registers and 37 x 37 patches (`conditions.ImageEncoder.tokens`).
TOKENS = {IMAGE: 1374, TEXT: conditions.TOKENS}
VOXELS = 20_000  # of a shape, where no limit says how many a forward pass takes
RADIUS = 0.4  # of the shell that they lie on, of the grid's side


def rows_of(student: Denoiser, rows: int, most: int | None = None) -> dict[str, Any]:
    """What a batch of `rows` holds: everything that the student could be given. most: voxels of all rows together."""
    if isinstance(student, LatentDenoiser):
        x = shells(student, rows, most)
        data: dict[str, Any] = {"x0": x, "eps": x.clone()}
        rows = len(x)
    else:
        data = {name: torch.empty(rows, *student.shape, device="meta") for name in ("x0", "eps")}
    if student.num_classes is not None:
        data["label"] = torch.empty(rows, dtype=torch.int64, device="meta")
    if isinstance(student, FlowDenoiser) or student.codec is not None:
        data |= {f"cond.{name}": value.expand(rows, *value.shape[1:]) for name, value in _told(student).items()}
    return data


def shells(flow: LatentDenoiser, rows: int, most: int | None) -> Voxels:
    """Made-up shapes, alike: the cells nearest to a sphere, `most` in all rows or VOXELS in each, as far as the grid
    has room."""
    side = flow.net.args.resolution
    rows = rows if most is None else min(rows, most)
    each = min(VOXELS if most is None else most // rows, side**3)
    cells = torch.cartesian_prod(*[torch.arange(side, dtype=torch.int32)] * 3)
    off = (cells + 0.5 - side / 2).norm(dim=1) - RADIUS * side
    shell = cells[off.abs().argsort(stable=True)[:each].sort().values]
    coords = torch.cat([pad(shell, (1, 0), value=i) for i in range(rows)])
    return Voxels(torch.empty(len(coords), *flow.shape, device="meta"), ShapesOnly(coords, rows))


def without_encoders(modules: Iterable[nn.Module]) -> None:
    """Put shapes alone in the place of every codec, and of the empty text that a flow is given with its data."""
    for module in modules:
        for denoiser in module.modules():
            if isinstance(denoiser, FlowDenoiser) and denoiser.condition == TEXT:
                denoiser.empty = _told(denoiser)[TEXT]
            elif isinstance(denoiser, Denoiser) and denoiser.codec is not None:
                denoiser.codec = _NoEncoders(_told(denoiser))  # type: ignore[assignment]


class _NoEncoders:
    """In a codec's place: the empty prompt in shapes alone. Training takes prompts and latents from caches."""

    reads_text = True

    def __init__(self, row: dict[str, Tensor]) -> None:
        self.row = row

    def null(self) -> dict[str, Tensor]:
        return self.row


def _told(denoiser: Denoiser) -> dict[str, Tensor]:
    """One row of a condition; see `FlowDenoiser`, `StableDiffusionDenoiser` and `SanaDenoiser`."""
    if isinstance(denoiser, FlowDenoiser):
        kind, width = denoiser.condition, denoiser.net.args.cond_channels
        return {kind: torch.empty(1, TOKENS[kind], width, device="meta")}
    config: Any = getattr(denoiser.net, "config", None)
    if denoiser.family == "sana":
        shapes = {"text": (1, LENGTH, config.caption_channels), "text_mask": (1, LENGTH)}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    text = {"text": torch.empty(1, 77, config.cross_attention_dim, device="meta")}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text |= {"pooled": torch.empty(1, pooled, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    return text
