"""Philox against the published answers and a plain re-derivation; noise as a pure function; its distribution."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from fastgen import noise

MASK = 0xFFFFFFFF
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# kat_vectors of Random123 for philox4x32, 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The paper's round function on Python's unbounded integers."""
    r0, l0, r1, l1 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * r0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * r1, 2**32)
        r0, l0, r1, l1 = high1 ^ l0 ^ k0, low1, high0 ^ l1 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return r0, l0, r1, l1


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert plain_philox(counter, key) == answer
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(word.item() for word in words) == answer


def test_bits_are_philox_of_block_row_draw_and_of_seed_tag() -> None:
    seed, tag, draw, n = 4_000_000_007, "eps", 3, 10
    numbers = (0, 1, 2**32 - 1, 2**32, 2**40 + 5)
    found = noise.bits(seed, tag, rows(*numbers), n, draw)
    for row, line in zip(numbers, found.tolist(), strict=True):
        blocks = [
            plain_philox((block, row % 2**32, row // 2**32, draw), (seed, zlib.crc32(tag.encode())))
            for block in range(3)
        ]
        assert line == [word for block in blocks for word in block][:n]


def test_normal_is_box_muller_of_those_bits() -> None:
    words = noise.bits(1, "z", rows(7), 4).tolist()[0]
    u = [(word + 0.5) / 2**32 for word in words]
    expected = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius = math.sqrt(-2 * math.log(first))
        expected += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    assert noise.normal(1, "z", rows(7), (3,)).tolist()[0] == pytest.approx(expected[:3], rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)])
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    numbers = rows(3, 10**10, 0, 3, 77)
    makers = {
        "normal": lambda r: noise.normal(5, "tag", r, shape, 2),
        "uniform": lambda r: noise.uniform(5, "tag", r, shape, 2),
        "integers": lambda r: noise.integers(5, "tag", r, 10, shape, 2),
    }
    for make in makers.values():
        whole = make(numbers)
        assert whole.shape == (5, *shape)
        assert torch.equal(torch.cat([make(numbers[i : i + 1]) for i in range(5)]), whole)
        assert torch.equal(make(numbers.flip(0)), whole.flip(0))
        assert torch.equal(whole[0], whole[3])
        assert torch.equal(make(numbers[:0]), whole[:0])
        assert torch.equal(make(numbers % 2**31), make((numbers % 2**31).int()))


def test_a_longer_sample_begins_with_the_shorter_one() -> None:
    """Positions are counted, so a shape change does not reshuffle what stays."""
    assert torch.equal(noise.normal(0, "z", rows(1, 2), (9,))[:, :4], noise.normal(0, "z", rows(1, 2), (4,)))


def test_neither_torch_seeds_nor_their_state_matter() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = noise.normal(0, "z", rows(1), (4,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise.normal(0, "z", rows(1), (4,)), first)


def test_seeds_tags_draws_and_rows_never_share_a_word() -> None:
    """Four words each of 7,680 streams: a 32-bit collision is expected now and then, a repeated block never."""
    seen = set()
    numbers = torch.cat([torch.arange(64), 2**32 + torch.arange(64)])
    for seed in (0, 1, 2**32 - 1):
        for tag in ("eps", "t", "x0", "init", ""):
            for draw in range(4):
                seen |= {tuple(block) for block in noise.bits(seed, tag, numbers, 4, draw).tolist()}
    assert len(seen) == 3 * 5 * 4 * 128
    row = noise.bits(0, "eps", rows(0), 4096).view(-1, 4).tolist()
    assert len({tuple(block) for block in row}) == 1024


def test_normals_are_normal() -> None:
    z = noise.normal(11, "z", torch.arange(1000), (400,)).double()
    n = z.numel()
    assert torch.isfinite(z).all() and z.abs().max() < 6.8  # the smallest u, 2^-33, gives 6.76
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov at the level 1e-4: 2.23 / sqrt(n).
    ordered = z.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (cdf - steps + 0.5 / n).abs().max() < 2.23 / math.sqrt(n)
    # Neighbours in a row, the two halves of a Box-Muller pair, and neighbouring rows are uncorrelated.
    for left, right in ((z[:, :-1], z[:, 1:]), (z[:, 0::2], z[:, 1::2]), (z[:-1], z[1:])):
        assert abs((left * right).mean()) < 4 / math.sqrt(left.numel())
        assert abs((left**2 * right**2).mean() - 1) < 4 * math.sqrt(8 / left.numel())


def test_draws_and_tags_are_uncorrelated() -> None:
    many = torch.arange(2000)
    streams = [noise.normal(0, tag, many, (32,), draw).flatten() for tag in ("a", "b") for draw in (0, 1)]
    correlation = torch.corrcoef(torch.stack(streams))
    assert (correlation - torch.eye(4)).abs().max() < 4.5 / math.sqrt(2000 * 32)


def test_uniforms_are_inside_the_open_interval() -> None:
    u = noise.uniform(0, "u", torch.arange(1000), (1000,))
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    assert abs(u.double().mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4.5 * math.sqrt(2 * 63)


def test_extreme_words_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """All zeros and all ones, which a million draws do not meet."""
    for word in (0, MASK):
        monkeypatch.setattr(noise, "bits", lambda seed, tag, r, n, draw=0, w=word: torch.full((len(r), n), w))
        assert 0 < noise.uniform(0, "u", rows(0)).item() < 1
        assert torch.isfinite(noise.normal(0, "z", rows(0), (2,))).all()
        assert noise.integers(0, "k", rows(0), 2**31).item() == (0 if word == 0 else 2**31 - 1)


def test_integers_cover_their_range_evenly() -> None:
    k = noise.integers(0, "k", torch.arange(70_000), 7)
    assert k.dtype == torch.int64
    counts = torch.bincount(k, minlength=7)
    assert len(counts) == 7 and ((counts - 10_000).double() ** 2 / 10_000).sum() < 6 + 4.5 * math.sqrt(12)
    assert noise.integers(0, "k", torch.arange(100), 1).max() == 0


def test_impossible_arguments_are_refused() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            noise.normal(seed, "z", rows(0), (2,))
    for high in (0, -3, 2**31 + 1):
        with pytest.raises(ValueError, match="high"):
            noise.integers(0, "k", rows(0), high)
