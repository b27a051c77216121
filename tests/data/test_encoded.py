"""Caches of embeddings and latents: what they hold, what makes them another cache, and every way they can break."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.codec import Posterior
from fastgen.data.encoded import NULL, CaptionDropout, Texts, encode
from fastgen.data.source import Source
from fastgen.data.table import Table
from fastgen.errors import Stopped, UserError
from fastgen.trainers.engine.method import Batch

TEXTS = ["a fox", "an owl", "a fox", "a bear"]


class Toy:
    """A codec of two numbers a letter: it counts what it is asked to encode."""

    text_sha256, image_sha256, image_shape, tiling = "t", "i", (3, 4, 4), False

    def __init__(self, framed: bool = False) -> None:
        self.asked: list[str] = []
        self.images, self.released, self.framed = 0, 0, framed

    def encode_prompts(self, prompts, framing=None):
        self.asked += prompts
        text = torch.tensor([[[float(len(p)), float(ord(p[-1]))]] for p in prompts])
        return {"text": text} | ({"time_ids": self.time_ids(len(prompts), framing)} if self.framed else {})

    def null(self):
        return {"text": torch.zeros(1, 1, 2)} | ({"time_ids": self.time_ids(1)} if self.framed else {})

    def time_ids(self, n, framing=None):
        if not self.framed:
            return None
        return (
            torch.zeros(n, 6)
            if framing is None
            else torch.cat([framing.original, framing.corner, framing.corner], 1).float()
        )

    def encode(self, images: Tensor) -> Posterior:
        self.images += len(images)
        mean = images.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        return Posterior(mean, torch.full_like(mean, 0.5))

    def release(self):
        self.released += 1


class Pictures:
    """Four grey pictures with captions."""

    name, shape, num_classes, content_sha256 = "pictures", (3, 4, 4), None, "c"
    captions = TEXTS

    def __len__(self):
        return 4

    def get(self, index):
        level = (index.float() / 4).view(-1, 1, 1, 1)
        return {
            "x0": level.expand(-1, 3, 4, 4),
            "original": torch.stack([index + 10, index + 20], 1),
            "corner": torch.stack([index, index + 1], 1),
        }


def test_equal_texts_are_encoded_once_and_found_again(tmp_path):
    codec = Toy()
    texts = Texts(codec, TEXTS, tmp_path).make(batch=2)
    assert codec.asked == ["a fox", "an owl", "a bear"]
    rows = texts.rows(torch.tensor([2, NULL, 3, 0]))["cond.text"]
    assert rows.dtype == torch.float32
    assert rows[:, 0, 0].tolist() == [5, 0, 6, 5] and rows[1].eq(0).all()
    again = Toy()
    found = Texts(again, TEXTS, tmp_path).make()
    assert again.asked == [] and torch.equal(found.rows(torch.tensor([3]))["cond.text"], rows[2:3])


@pytest.mark.parametrize("change", ["codec", "text"])
def test_another_encoder_or_text_is_another_cache(tmp_path, change):
    Texts(Toy(), TEXTS, tmp_path).make()
    codec = Toy()
    if change == "codec":
        codec.text_sha256 = "other"
    Texts(codec, [*TEXTS[:3], "a wolf"] if change == "text" else TEXTS, tmp_path).make()
    assert codec.asked and len(list(tmp_path.iterdir())) == 2


def test_pictures_and_captions_come_as_latents_and_conditions(tmp_path):
    codec = Toy(framed=True)
    data = encode(codec, Pictures(), tmp_path, shape=(1, 2, 2), images=True)
    assert (codec.images, codec.released, len(data), data.shape) == (4, 1, 4, (1, 2, 2))
    batch = data.get(torch.tensor([3, 1]))
    assert batch["x0"].flatten(1)[:, 0].tolist() == [0.75, 0.25] and batch["x0_std"].eq(0.5).all()
    assert batch["cond.time_ids"].tolist() == [[13, 23, 3, 4, 3, 4], [11, 21, 1, 2, 1, 2]]
    assert batch["cond.text"][:, 0, 0].tolist() == [6, 6]
    codec.images = 0
    encode(codec, Pictures(), tmp_path, shape=(1, 2, 2), images=True)
    assert codec.images == 0
    assert "x0" not in encode(codec, Pictures(), tmp_path, shape=(1, 2, 2), images=False).get(torch.tensor([0]))


def test_a_batch_draws_from_the_posterior_by_row():
    mean, std = torch.ones(4, 1, 8, 8), torch.full((4, 1, 8, 8), 2.0)
    rows = torch.arange(4)
    batch = Batch({"x0": mean, "x0_std": std}, rows, seed=0, step=0, steps=1)
    drawn = batch.x0
    assert torch.equal(batch.x0, drawn) and abs(drawn.mean() - 1) < 0.5 and 1.5 < drawn.std() < 2.5
    part = Batch({"x0": mean[2:], "x0_std": std[2:]}, rows[2:], seed=0, step=5, steps=9)
    assert torch.equal(part.x0, drawn[2:])
    assert torch.equal(Batch({"x0": mean}, rows, seed=0, step=0, steps=1).x0, mean)


def test_dropped_captions_are_the_empty_prompt_and_keep_their_framing(tmp_path):
    codec = Toy(framed=True)
    data = encode(codec, Pictures(), tmp_path, shape=(1, 2, 2), images=True)
    source, rows = Source(data, seed=1), torch.arange(400)
    whole, dropped = source.get(rows), CaptionDropout(source, data.texts, 0.25).get(rows)
    empty = dropped["cond.text"].flatten(1).eq(0).all(1)
    assert 0.18 < empty.float().mean() < 0.32
    assert torch.equal(dropped["cond.text"][~empty], whole["cond.text"][~empty])
    assert torch.equal(dropped["cond.time_ids"], whole["cond.time_ids"]) and torch.equal(dropped["x0"], whole["x0"])
    part = CaptionDropout(source, data.texts, 0.25).get(rows[100:150])
    assert torch.equal(part["cond.text"], dropped["cond.text"][100:150])


# --- the table itself


def count(calls: list[list[int]]):
    def work(rows):
        calls.append(list(rows))
        return {"x": torch.tensor(rows).float()[:, None]}

    return work


def test_a_stopped_table_goes_on_where_it_stopped(tmp_path):
    calls: list[list[int]] = []
    table = Table(tmp_path, "t", {"a": 1}, 10, per_shard=4)
    asked = iter([False, True])
    with pytest.raises(Stopped, match="1 of 3 missing parts"):
        table.make(count(calls), batch=3, interrupt=lambda: next(asked))
    assert calls == [[0, 1, 2], [3]]
    Table(tmp_path, "t", {"a": 1}, 10, per_shard=4).make(count(calls))
    assert calls[2:] == [[4, 5, 6, 7], [8, 9]]
    assert table.get(np.array([9, 0, 5, 5]))["x"].flatten().tolist() == [9, 0, 5, 5]
    assert not [path for path in table.folder.iterdir() if path.name.startswith(".tmp")]


def test_a_damaged_or_stale_table_is_refused_in_one_line(tmp_path):
    table = Table(tmp_path, "t", {"a": 1}, 4, per_shard=4)
    table.make(count([]))
    file = table.folder / "rows-000000.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"rows-000000\.safetensors: missing or damaged .* delete it and run again"):
        Table(tmp_path, "t", {"a": 1}, 4, per_shard=4).get(np.array([0]))
    file.unlink()
    table.make(count([]))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"rows-000000\.safetensors: damaged \(its content is not what was written\)"):
        Table(tmp_path, "t", {"a": 1}, 4, per_shard=4).get(np.array([0]))
    manifest = table.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"a": 1', '"a": 2'))
    with pytest.raises(UserError, match="a stale cache: made with another a; delete the folder"):
        Table(tmp_path, "t", {"a": 1}, 4, per_shard=4).make(count([]))
