from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgen import noise
from fastgen.data import shards
from fastgen.data.shards import PairShards, missing, plan, shard_path, write_shard
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.files import write_json
from tests.data.pair_sets import MANIFEST, check_whole, hashes, make, pairs


def journal(folder: Path, worker: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / f"journal-{worker}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """The sha256 of every shard of a set made without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "pairs"
    make(folder)
    assert len(hashes(folder)) == 3
    return hashes(folder)


def test_a_set_comes_back_as_written_with_its_noise(tmp_path):
    make(tmp_path)
    data = PairShards(tmp_path)
    assert (len(data), data.shape, data.num_classes, data.rejected) == (11, (1, 2, 2), 10, [])
    index = torch.tensor([10, 0, 5, 4, 5])
    batch, truth = data.get(index), pairs(index)
    assert set(batch) == {"x0", "eps", "row", "label"}
    assert torch.equal(batch["x0"], truth["x0"]) and torch.equal(batch["row"], index)
    assert torch.equal(batch["label"], index % 10)
    assert torch.equal(batch["eps"], noise.normal(7, "pairs", index, (1, 2, 2)))
    assert torch.equal(batch["eps"].tanh(), batch["x0"])


def test_a_source_meets_every_pair_once_per_epoch(tmp_path):
    make(tmp_path)
    assert sorted(Source(PairShards(tmp_path), 0).get(torch.arange(11, 22))["row"].tolist()) == list(range(11))


def test_the_journal_agrees_with_sha256sum(tmp_path, whole):
    make(tmp_path)
    assert [(line["index"], line["count"], line["rejected"]) for line in journal(tmp_path)] == [
        (0, 4, []),
        (1, 4, []),
        (2, 3, []),
    ]
    assert [line["sha256"] for line in journal(tmp_path)] == list(whole.values())


def test_the_order_of_rows_handed_in_does_not_matter(tmp_path, whole):
    plan(tmp_path, MANIFEST)
    for index in (2, 0, 1):
        write_shard(tmp_path, index, pairs(reversed(MANIFEST.rows(index))))
    check_whole(tmp_path, whole)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_and_float32_comes_back(tmp_path, dtype):
    make(tmp_path, MANIFEST.model_copy(update={"dtype": dtype}))
    assert load_file(shard_path(tmp_path, 0))["x0"].dtype == getattr(torch, dtype)
    x0 = PairShards(tmp_path).get(torch.arange(11))["x0"]
    assert x0.dtype == torch.float32
    assert torch.equal(x0, pairs(range(11))["x0"].to(getattr(torch, dtype)).float())


def test_broken_rows_are_left_out_and_recorded(tmp_path, caplog):
    plan(tmp_path, MANIFEST)
    for index in range(3):
        tensors = pairs(r for r in MANIFEST.rows(index) if r != 6)
        for row, value in ((1, float("nan")), (4, float("-inf")), (9, 20.5)):
            tensors["x0"][tensors["row"] == row, 0, 1, 0] = value
        line = write_shard(tmp_path, index, tensors, rejected=[6] if index == 1 else [])
        assert line["rejected"] == [[1], [4, 6], [9]][index] and line["count"] == [3, 2, 2][index]
    data = PairShards(tmp_path)
    assert data.rejected == [1, 4, 6, 9] and missing(tmp_path) == []
    assert data.get(torch.arange(7))["row"].tolist() == [0, 2, 3, 5, 7, 8, 10]
    assert len(caplog.records) == 3


def test_a_shard_may_lose_all_its_rows_but_not_every_shard(tmp_path):
    plan(tmp_path, MANIFEST)
    for index in range(3):
        tensors = pairs(MANIFEST.rows(index))
        if index != 1:
            tensors["x0"].fill_(float("nan"))
        write_shard(tmp_path, index, tensors)
    assert PairShards(tmp_path).get(torch.arange(4))["row"].tolist() == [4, 5, 6, 7]
    write_shard(tmp_path, 1, {name: value[:0] for name, value in tensors.items()}, rejected=[4, 5, 6, 7])
    with pytest.raises(UserError, match=r"every row was rejected: not finite, or beyond pairs\.limit=20;"):
        PairShards(tmp_path)


def test_gaps_doubles_and_strange_tensors_are_refused(tmp_path):
    plan(tmp_path, MANIFEST)
    good = pairs(range(4))
    for rows in (range(3), range(5), [0, 1, 2, 2], range(4, 8)):
        with pytest.raises(ValueError, match="every row"):
            write_shard(tmp_path, 0, pairs(rows))
    with pytest.raises(ValueError, match="every row"):
        write_shard(tmp_path, 0, good, rejected=[3])
    for extra in ({"label": good["row"]}, {"cond.eps": good["row"]}):
        with pytest.raises(ValueError, match=r"a shard holds x0, row and cond\.NAME"):
            write_shard(tmp_path, 0, good | extra)
    with pytest.raises(ValueError, match="the manifest's shape"):
        write_shard(tmp_path, 0, good | {"x0": torch.zeros(4, 1, 2, 3)})
    assert hashes(tmp_path) == {}


def test_a_shard_without_its_line_is_verified_and_gets_it(tmp_path, whole, monkeypatch):
    make(tmp_path)
    (tmp_path / "journal-0.jsonl").unlink()
    damage(shard_path(tmp_path, 1))
    with pytest.raises(UserError, match="3 of 3 shards are missing"):
        PairShards(tmp_path)
    assert missing(tmp_path) == [1]
    assert [line["index"] for line in journal(tmp_path)] == [0, 2]
    write_shard(tmp_path, 1, pairs(MANIFEST.rows(1)))
    check_whole(tmp_path, whole)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_share_the_shards_without_overlap(tmp_path, whole, workers):
    plan(tmp_path, MANIFEST)
    shares = [missing(tmp_path, worker, workers) for worker in range(workers)]
    assert sorted(index for share in shares for index in share) == [0, 1, 2]
    for worker in reversed(range(workers)):
        make(tmp_path, worker=worker, workers=workers)
    check_whole(tmp_path, whole)


def test_the_hash_of_a_set_depends_on_its_content_alone(tmp_path):
    for name, workers, manifest in (("a", 1, MANIFEST), ("b", 3, MANIFEST), ("c", 1, LONGER), ("d", 1, MANIFEST)):
        for worker in range(workers):
            make(tmp_path / name, manifest, worker, workers)
    tensors = pairs(MANIFEST.rows(1))
    tensors["cond.label"][0] += 1
    write_shard(tmp_path / "d", 1, tensors)
    a, b, c, d = (PairShards(tmp_path / name).sha256 for name in "abcd")
    assert a == b and len({a, c, d}) == 3


LONGER = MANIFEST.model_copy(update={"steps": 50})


def test_another_number_of_workers_resumes(tmp_path, whole):
    make(tmp_path, worker=1, workers=3)
    assert [missing(tmp_path, worker, 2) for worker in range(2)] == [[0, 2], []]
    make(tmp_path)
    check_whole(tmp_path, whole)


def test_a_worker_leaves_the_half_written_shard_of_another_alone(tmp_path):
    plan(tmp_path, MANIFEST)
    for index in range(3):
        (tmp_path / f".tmp-{shard_path(tmp_path, index).name}").write_bytes(b"half")
    missing(tmp_path, 0, 2)
    assert [p.name for p in tmp_path.glob(".tmp-*")] == [".tmp-shard-000001.safetensors"]


def test_workers_that_plan_at_once_agree(tmp_path, whole):
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            try:
                make(tmp_path / "set", worker=worker, workers=4)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    check_whole(tmp_path / "set", whole)


def test_a_worker_whose_staging_was_tidied_away_by_a_quicker_one_goes_on(tmp_path, monkeypatch, whole):
    def overtaken(path, value):
        write_json(tmp_path / "manifest.json", value)
        shutil.rmtree(path.parent)
        write_json(path, value)

    monkeypatch.setattr(shards, "write_json", overtaken)
    make(tmp_path)
    check_whole(tmp_path, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 26}, "steps=25, asked for is 26"),
        ({"guidance": 2.0}, "guidance=None, asked for is 2.0"),
        ({"path": {"name": "VP"}}, "path=.*asked for is {'name': 'VP'}"),
        ({"shape": (1, 2, 3)}, "shape="),
        ({"teacher": "1" * 64}, "teacher="),
    ],
)
def test_another_plan_for_the_same_folder_is_refused_by_its_key(tmp_path, change, named):
    make(tmp_path)
    plan(tmp_path, MANIFEST.model_dump())  # the same one, as plain data
    with pytest.raises(UserError, match=named):
        plan(tmp_path, MANIFEST.model_copy(update=change))


def test_further_keys_of_the_manifest_bind_too(tmp_path):
    plan(tmp_path, MANIFEST.model_dump() | {"null_share": 0.1})
    with pytest.raises(UserError, match=r"null_share=0\.1, asked for is 0\.2"):
        plan(tmp_path, MANIFEST.model_dump() | {"null_share": 0.2})
    with pytest.raises(UserError, match=r"null_share=0\.1, asked for is None"):
        plan(tmp_path, MANIFEST)


def test_shards_without_a_manifest_are_not_adopted(tmp_path):
    make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"shards without manifest\.json"):
        plan(tmp_path, MANIFEST)
    with pytest.raises(UserError, match="no pair set"):
        PairShards(tmp_path)


def damage(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_one_damaged_byte_anywhere_is_named_with_the_mend(tmp_path, whole, at):
    make(tmp_path)
    damage(shard_path(tmp_path, 1), at)
    with pytest.raises(UserError, match=r"shard-000001\.safetensors: .*delete it, then run .*fastgen pairs"):
        PairShards(tmp_path).get(torch.arange(11))
    shard_path(tmp_path, 1).unlink()
    make(tmp_path)
    check_whole(tmp_path, whole)


def test_a_damaged_shard_is_made_again_even_if_it_was_not_deleted(tmp_path, whole, caplog):
    make(tmp_path)
    damage(shard_path(tmp_path, 2))
    assert missing(tmp_path) == [2] and "shard-000002" in caplog.text
    make(tmp_path)
    check_whole(tmp_path, whole)


def test_a_shard_of_another_set_is_refused(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", MANIFEST.model_copy(update={"seed": 8}))
    os.replace(shard_path(tmp_path / "b", 1), shard_path(tmp_path / "a", 1))
    with pytest.raises(UserError, match=r"shard-000001.*not the shard that its name"):
        PairShards(tmp_path / "a")
    assert missing(tmp_path / "a") == [1]


def test_a_shard_under_the_name_of_another_is_refused(tmp_path):
    make(tmp_path)
    shutil.copy(shard_path(tmp_path, 0), shard_path(tmp_path, 1))
    (tmp_path / "journal-0.jsonl").unlink()
    assert missing(tmp_path) == [1]


def test_a_shard_with_fewer_rows_than_its_header_says_is_refused(tmp_path):
    make(tmp_path)
    path = shard_path(tmp_path, 1)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({name: value[:3].clone() for name, value in load_file(path).items()}, path, facts)
    with pytest.raises(UserError, match="shard-000001"):
        PairShards(tmp_path)


def test_a_file_that_is_no_shard_is_made_again(tmp_path, whole):
    plan(tmp_path, MANIFEST)
    save_file({"x0": torch.zeros(3)}, shard_path(tmp_path, 0))
    shard_path(tmp_path, 1).write_bytes(b"")
    assert missing(tmp_path) == [0, 1, 2]
    make(tmp_path)
    check_whole(tmp_path, whole)


def test_an_unfinished_set_says_how_much_is_missing_and_how_to_resume(tmp_path):
    plan(tmp_path, MANIFEST)
    write_shard(tmp_path, 1, pairs(MANIFEST.rows(1)))
    with pytest.raises(UserError, match=r"2 of 3 shards are missing, the first is shard-000000.*fastgen pairs"):
        PairShards(tmp_path)


def test_an_index_outside_the_set_is_an_error(tmp_path):
    make(tmp_path)
    for index in (-1, 11):
        with pytest.raises(IndexError):
            PairShards(tmp_path).get(torch.tensor([index]))


def test_a_shard_is_read_when_first_touched_and_then_kept(tmp_path, monkeypatch):
    make(tmp_path)
    read = []
    real = shards.sha256
    monkeypatch.setattr(shards, "sha256", lambda path: read.append(path.name) or real(path))
    data = PairShards(tmp_path)
    assert read == []
    for _ in range(2):
        data.get(torch.tensor([9, 0]))
    assert read == ["shard-000000.safetensors", "shard-000002.safetensors"]
