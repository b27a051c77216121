"""Data: images from files as samples in [-1, 1], prompts, and pairs of noise and end point kept in shards.

A data set is addressed by number and keeps no position: `get(index)` is a pure function of the index, so which rows a
step sees is decided in one place (`source.Source`) and resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pydantic import Field

from fastgen.config import Model
from fastgen.errors import UserError
from fastgen.files import peek_json

if TYPE_CHECKING:  # the config is read by commands that must start without torch
    from torch import Tensor

LAYOUTS = (
    "a folder of .png/.jpg/.webp images (flat, or one sub-folder per class), .parquet files with the columns image and "
    "label, MNIST's IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, ...), captioned images (NAME.txt "
    "beside NAME.jpg, metadata.jsonl, .parquet with image and text, WebDataset .tar), prompts (.txt, .tsv, .csv or "
    ".jsonl), latents of shapes (`fastgen latents`)"
)
EXAMPLES = Path(__file__).with_name("examples.txt")  # data={kind: prompts, path: examples}
LATENTS: Final = "trellis latents"  # what the manifest of a folder of shapes calls itself
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class DataSet(Protocol):
    """What `open_data` returns and `source.Source` reads."""

    name: str

    @property
    def num_classes(self) -> int | None: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample; () where there are texts alone."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """The text of every row, or None: no texts."""
        ...

    def __len__(self) -> int: ...

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """For index int64 [B]: {"x0": float32 [B, C, H, W] in [-1, 1], "label": int64 [B] where there are labels}.

        Captioned images bring their framing, int64 [B, 2] each: "original", the (height, width) of the picture, and
        "corner", the (top, left) of the crop in pixels of the resized picture. Prompts bring nothing.
        """
        ...


class DataConfig(Model):
    """Where images come from. A field that the kind cannot use is refused unless it has its default value."""

    kind: Literal[
        "auto", "digits", "idx", "parquet", "folder", "captioned", "prompts", "latents", "synthetic", "closed_form"
    ] = "auto"
    """auto: what lies at `path`; without a path the shipped digits. latents: shapes, of `fastgen latents`.
    closed_form: draws of the run's teacher, a mixture."""
    path: str | None = None
    split: str = "train"
    """digits: train, held_out, all; IDX folder: train, test; folder of parquet files: how their names begin."""
    size: int | None = Field(default=None, ge=1)
    """Short side after resizing, then cropped in the centre to a square; None: images must agree. synthetic: 32.
    Captioned images need it."""
    channels: Literal[1, 3] = 3
    classes: int | None = Field(default=None, ge=1)
    """parquet, IDX: how many classes (None: the largest label + 1). synthetic: None makes unlabelled images."""
    rows: int = Field(default=4096, ge=1)
    """synthetic, closed_form: how many samples."""
    captions: bool = False
    """synthetic: whether each image has a text."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What an image that cannot be read does: stop the run, or give its place to the next good one (and a warning).
    captioned: bad samples are left out, for which all images are read once at the start."""


_USES = {
    "digits": {"split"},
    "idx": {"path", "split", "classes"},
    "parquet": {"path", "split", "size", "channels", "classes", "on_bad"},
    "folder": {"path", "size", "channels", "on_bad"},
    "captioned": {"path", "split", "size", "channels", "on_bad"},
    "prompts": {"path"},
    "latents": {"path"},
    "synthetic": {"size", "channels", "classes", "rows", "captions"},
    "closed_form": {"rows"},
}


def open_data(config: DataConfig) -> DataSet:
    """The data set that a config describes; everything that can be wrong with it is a UserError."""
    path = Path(config.path).expanduser() if config.path is not None else None
    if config.kind == "prompts" and config.path == EXAMPLES.stem:
        path = EXAMPLES
    if path is not None and not path.exists():
        raise UserError(f"data.path={config.path}: no such file or folder; understood are {LAYOUTS}")
    kind = detect(path) if config.kind == "auto" else config.kind
    _refuse_unused(config, kind, path)
    if kind == "digits":
        from fastgen.data.digits import Digits

        return Digits(config.split)
    if kind == "closed_form":
        raise UserError("data.kind=closed_form: draws of a run's closed-form teacher; it is training data and no other")
    if kind == "synthetic":
        from fastgen.data.synthetic import Synthetic

        size = config.size or 32
        return Synthetic((config.channels, size, size), config.classes, config.rows, captions=config.captions)
    if path is None:
        raise UserError(f"data.kind={kind} needs data.path; understood are {LAYOUTS}")
    if kind == "latents":
        raise UserError(
            f"{path}: latents of shapes, which a train stage reads that has part: structure or part: latent, and no "
            "other command"
        )
    if kind == "idx":
        from fastgen.data.idx import Idx

        return Idx(path, config.split, config.classes)
    if kind == "parquet":
        from fastgen.data.parquet import Parquet

        return Parquet(path, config.split, config.size, config.channels, config.classes, config.on_bad)
    if kind == "prompts":
        from fastgen.data.prompts import Prompts

        return Prompts(path)
    if kind == "captioned":
        return _open_captioned(path, config)
    from fastgen.data.folder import Folder

    return Folder(path, config.size, config.channels, config.on_bad)


def _open_captioned(path: Path, config: DataConfig) -> DataSet:
    from fastgen.data.captioned import Captioned, open_store

    if config.size is None:
        raise UserError(f"{path}: captioned images need data.size, the side in pixels that a model is trained at (512)")
    return Captioned(open_store(path, config.split), config.size, config.channels, config.on_bad)


def detect(path: Path | None) -> str:
    """The kind of data at `path` ("digits" where there is none); a UserError says what is understood."""
    if path is None:
        return "digits"
    names = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if not names:
        raise UserError(f"{path}: an empty folder; understood are {LAYOUTS}")
    if any("-ubyte" in name for name in names):
        return "idx"
    if "manifest.json" in names and any(name.startswith("shard-") for name in names):
        raise UserError(f"{path}: a set of pairs, not of images; it is read where a method asks for pairs")
    if peek_json(path / "manifest.json").get("kind") == LATENTS:
        return "latents"
    from fastgen.data import prompts
    from fastgen.data.captioned import is_captioned
    from fastgen.data.pixels import ENDINGS

    if is_captioned(path):
        return "captioned"
    if any(name.lower().endswith(".parquet") for name in names):
        return "parquet"
    if path.is_dir() and any((path / name).is_dir() or name.lower().endswith(ENDINGS) for name in names):
        return "folder"
    if path.is_file() and path.suffix.lower() in prompts.ENDINGS:
        return "prompts"
    raise UserError(f"{path}: nothing known here (found {', '.join(names[:3])}); understood are {LAYOUTS}")


def _refuse_unused(config: DataConfig, kind: str, path: Path | None) -> None:
    for name, field in DataConfig.model_fields.items():
        if name != "kind" and name not in _USES[kind] and getattr(config, name) != field.default:
            raise UserError(f"data.{name} is not used by kind={kind} (it uses {', '.join(sorted(_USES[kind]))})")
    if path is not None and path.is_file() and config.split != DataConfig.model_fields["split"].default:
        raise UserError(f"data.split={config.split} chooses among the files of a folder; {path} is one file")
