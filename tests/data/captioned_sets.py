"""Twelve small pictures with captions, and the four layouts they can be written in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import DataConfig, open_data
from fastgen.data.captioned import Captioned

Samples = dict[str, tuple[str, bytes, str]]  # key -> (ending, the encoded image, its caption)


def samples() -> Samples:
    """Of four sizes and three formats; the keys are not in the order of their making."""
    rng, made = np.random.default_rng(0), {}
    for i in range(12):
        pixels = rng.integers(0, 256, ((8, 8), (12, 8), (9, 20), (5, 6))[i % 4] + (3,), np.uint8)
        ending, kind = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[i % 3]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, quality=95)
        made[f"{i * 7 % 12:02}-fox"] = ending, stream.getvalue(), f"a fox, number {i}, ü\nin two lines"
    return made


ALL = torch.arange(12)
CAPTIONS = [text for _, (_, _, text) in sorted(samples().items())]


def load(path: Path, **fields: Any) -> Captioned:
    """The data set at a path, at 8 x 8 pixels unless said otherwise."""
    data = open_data(DataConfig(path=str(path), **{"size": 8, **fields}))
    assert isinstance(data, Captioned)
    return data


def beside(folder: Path, made: Samples) -> Path:
    folder.mkdir(parents=True)
    for key, (ending, image, text) in made.items():
        (folder / f"{key}.{ending}").write_bytes(image)
        (folder / f"{key}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def metadata(folder: Path, made: Samples) -> Path:
    folder.mkdir(parents=True)
    for key, (ending, image, _) in made.items():
        (folder / f"{key}.{ending}").write_bytes(image)
    lines = [json.dumps({"file_name": f"{key}.{ending}", "text": text}) for key, (ending, _, text) in made.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def parquet(folder: Path, made: Samples) -> Path:
    """In the order of the keys, since a row has no name of its own."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rows = [made[key] for key in sorted(made)]
    for part, start in enumerate((0, 5)):
        some = rows[start : 5 if part == 0 else None]
        columns = {"image": [{"bytes": image, "path": None} for _, image, _ in some], "text": [row[2] for row in some]}
        pq.write_table(pa.table(columns), folder / f"train-{part}.parquet", row_group_size=3)
    return folder


def tars(folder: Path, made: Samples) -> Path:
    """Two tars, captions in .txt in one and in .json in the other."""
    folder.mkdir(parents=True)
    keys = list(made)
    tar(folder / "0.tar", ((f"{key}.{e}", d) for key in keys[:5] for e, d in members(made[key], "txt")))
    tar(folder / "1.tar", ((f"{key}.{e}", d) for key in keys[5:] for e, d in members(made[key], "json")))
    return folder


def members(sample: tuple[str, bytes, str], how: str) -> list[tuple[str, bytes]]:
    ending, image, text = sample
    return [(ending, image), (how, text.encode() if how == "txt" else json.dumps({"caption": text}).encode())]


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


LAYOUTS: dict[str, Callable[[Path, Samples], Path]] = {
    "beside": beside,
    "metadata": metadata,
    "parquet": parquet,
    "tars": tars,
}
