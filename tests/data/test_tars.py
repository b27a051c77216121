"""WebDataset tars: which members make a sample, and every way a tar can be broken."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
import torch

from fastgen.data.tars import tars
from fastgen.errors import UserError
from tests.data import captioned_sets
from tests.data.captioned_sets import load, samples

IMAGE = next(iter(samples().values()))[1]  # a PNG


def write(tmp_path, *members):
    """A tar of (name, content) pairs and ready-made TarInfos."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_sample_is_what_shares_a_name_up_to_its_first_dot(tmp_path):
    path = write(
        tmp_path,
        special("./d", tarfile.DIRTYPE),
        ("./d/b.png", IMAGE),
        ("./d/b.txt", b"second"),
        ("./d/b.json", b"{}"),
        ("./d/._b.png", b"resource fork"),
        ("d/a.seg.png", b"not the image"),
        ("d/a.JPG", IMAGE),
        ("d/a.json", b'{"text": "first", "caption": "other"}'),
        ("c.webp", IMAGE),
        ("c.txt", "\ufeff zeroth\n".encode()),
    )
    store = tars(path)
    assert (store.problems, store.captions) == ([], ["zeroth", "first", "second"])
    assert [sample.key for sample in store.samples] == ["c", "d/a", "d/b"]
    assert [store.encoded(row) for row in range(3)] == [IMAGE] * 3
    assert store.place(1) == f"{path} member d/a.JPG"


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (
            [("a.b.png", IMAGE), ("a.b.txt", b"x")],
            r"member a\.b\.png: sample 'a' has no image \(it has b\.png, b\.txt\)",
        ),
        ([("a", b""), ("a.png", IMAGE)], r"member a\.png: no caption: sample 'a' has no ending, png"),
        ([special("a.png", tarfile.SYMTYPE, "b"), ("a.txt", b"x")], r"member a\.png: a link or a sparse file"),
        ([("a.png", IMAGE), special("a.txt", tarfile.LNKTYPE, "b")], r"member a\.txt: a link or a sparse file"),
        ([("a.png", IMAGE), ("a.txt", b"")], r"member a\.txt: an empty caption"),
        ([("a.png", IMAGE), ("a.json", b"\xff")], r"member a\.json: not UTF-8"),
        ([("a.png", IMAGE), ("a.json", b"[" * 100_000)], r"member a\.json: not JSON"),
    ],
)
def test_what_is_no_sample_is_named(tmp_path, members, problem):
    store = tars(write(tmp_path, *members, ("z.png", IMAGE), ("z.txt", b"whole")))
    assert store.captions == ["whole"] and len(store.problems) == 1
    with pytest.raises(UserError, match=r"a\.tar " + problem):
        load(tmp_path / "a.tar")


def test_a_key_that_comes_a_second_time_is_named(tmp_path):
    sample = [("a.png", IMAGE), ("a.txt", b"x")]
    store = tars(write(tmp_path, *sample, ("b.png", IMAGE), ("b.txt", b"y"), *sample))
    assert store.captions == ["x", "y"]
    assert [problem.split("a.tar ")[1] for problem in store.problems] == ["member a.png: key 'a' comes a second time"]


def test_tars_may_count_their_keys_anew(tmp_path):
    for name, text in (("1.tar", b"later"), ("0.tar", b"sooner")):
        write(tmp_path, ("a.png", IMAGE), ("a.txt", text)).rename(tmp_path / name)
    assert tars(tmp_path).captions == ["sooner", "later"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_dialect(tmp_path, format):
    folder = "f" * 99
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as file:
        for ending, data in (("png", IMAGE), ("txt", b"a fox")):
            info = tarfile.TarInfo(f"{folder}/{'n' * 60}.{ending}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    store = tars(tmp_path / "a.tar")
    assert store.captions == ["a fox"] and store.encoded(0) == IMAGE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return captioned_sets.tars(tmp_path_factory.mktemp("tars") / "tars", samples()) / "0.tar"


def test_a_tar_cut_anywhere_is_said_to_be_truncated(tmp_path, whole):
    data, path = whole.read_bytes(), tmp_path / "cut.tar"
    with tarfile.open(whole) as file:
        end = file.getmembers()[-1].offset_data + 512
    for cut in [*range(0, end, 100), end - 1, end, end + 511]:
        path.write_bytes(data[:cut])
        with pytest.raises(
            UserError, match=r"cut\.tar(: | member .*)(truncated|not a whole tar).*fetch it again"
        ) as raised:
            load(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(data[: end + 512])  # one block of zeros ends a tar
    assert load(path).captions == load(whole).captions


def test_the_samples_before_the_cut_are_kept_when_skipping(tmp_path, whole):
    with tarfile.open(whole) as file:
        member = file.getmembers()[6]  # the image of the fourth sample
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: member.offset_data + 10])
    first = sorted(list(samples())[:3])
    assert load(tmp_path / "cut.tar", on_bad="skip").captions == [samples()[key][2] for key in first]
    with pytest.raises(UserError, match=rf"cut\.tar member {member.name}: truncated"):
        load(tmp_path / "cut.tar")


def test_a_damaged_header_is_no_end(tmp_path, whole):
    with tarfile.open(whole) as file:
        member = file.getmembers()[4]
    data = bytearray(whole.read_bytes())
    data[member.offset + 3] ^= 1
    (tmp_path / "odd.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"odd\.tar: damaged after member .*\.txt; fetch it again"):
        load(tmp_path / "odd.tar")


def test_random_damage_never_escapes_as_another_error(tmp_path, whole):
    random.seed(0)
    data, path, refused = whole.read_bytes(), tmp_path / "odd.tar", 0
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    for _ in range(300):
        odd = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            odd[random.choice(headers) + random.randrange(512)] = random.randrange(256)
        for header in headers:  # a checksum that fits, so that the damage is believed
            if random.random() < 0.9:
                odd[header + 148 : header + 156] = b" " * 8
                odd[header + 148 : header + 156] = b"%06o\0 " % sum(odd[header : header + 512])
        path.write_bytes(odd)
        try:
            found = load(path)
            found.get(torch.arange(len(found)))
        except UserError:
            refused += 1
    assert 50 < refused < 300


def test_a_packed_tar_is_refused(tmp_path, whole):
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as file:
        file.add(whole)
    with pytest.raises(UserError, match=r"packed\.tar: not a whole tar"):
        load(tmp_path / "packed.tar")
