"""Sparse voxels in plain torch against dense convolution and padded attention, as ratios of times.

    OMP_NUM_THREADS=1 python benchmarks/sparse.py [--side 32] [--channels 64] [--runs 5] [--device cpu] [--json FILE]
        [--conv torch|spconv] [--attention torch|xformers|flash_attn] [--dtype float32]

The voxels are those nearest to the zero set of a smooth random field, which is how the surfaces of objects fill a grid:
5, 20 and 100 % of it, two samples. Forward pass without gradients, and forward with backward.

convolution  3 x 3 x 3, channels to channels; dense: conv3d over the whole grid
windows      windows of 8 shifted by 4, heads of 16; dense: each window padded to 512 tokens, with a mask
full         each sample attends to itself, the second with half its voxels, on a grid of half the side, which is
             where the flow does so; dense: both padded to the longer one

In each run the two take turns, so that a drifting machine slows both; a ratio is the median over runs of dense over
sparse time, and above 1 where sparse is quicker. Neighbours and windows are looked up before, once, as in a network;
`set-up` is that look-up in sparse forward passes. Differences of the two results are checked.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.eval.hardware import device_name
from fastgen.sparse import Sites, Voxels, attention, backends
from fastgen.sparse.conv import SparseConv3d, neighbours

SHARES, WINDOW, SHIFT, HEAD = (0.05, 0.2, 1.0), 8, 4, 16
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Function = Callable[..., Tensor]


def surface(share: float, side: int, generator: torch.Generator) -> Tensor:
    """bool [side, side, side] with this share of True, near the zero set of a field that is smooth over 8 voxels."""
    rough = torch.randn(1, 1, *(max(side // 8, 2),) * 3, generator=generator)
    field = functional.interpolate(rough, size=(side,) * 3, mode="trilinear", align_corners=True)[0, 0].abs()
    field = field + 1e-6 * torch.rand(field.shape, generator=generator)  # no ties
    return field <= field.flatten().kthvalue(max(round(share * field.numel()), 1)).values


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The time of the one thread, where there is one: other programs' share of the machine is left out."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def compare(ours: Function, theirs: Function, inputs: tuple[Tensor, ...], runs: int, train: bool) -> dict[str, float]:
    """Medians of seconds and of the ratio; one warming call each."""

    def step(fn: Function) -> Callable[[], Any]:
        def run() -> None:
            with torch.set_grad_enabled(train):
                out = fn(*(t.detach().requires_grad_(train) for t in inputs))
            if train:
                out.square().mean().backward()

        return run

    device = inputs[0].device
    for fn in (ours, theirs):
        step(fn)()
    times = [(seconds(step(ours), device), seconds(step(theirs), device)) for _ in range(runs)]
    sparse, dense = (statistics.median(column) for column in zip(*times, strict=True))
    return {"sparse_s": sparse, "dense_s": dense, "ratio": statistics.median(b / a for a, b in times)}


def convolution(mask: Tensor, options: argparse.Namespace) -> tuple[Function, Function, tuple[Tensor, ...]]:
    sites = Sites(mask.nonzero().int().contiguous(), len(mask))
    layer = SparseConv3d(options.channels, options.channels).to(mask.device, options.dtype)
    grid = torch.zeros(*mask.shape, options.channels, device=mask.device, dtype=options.dtype)
    weight = layer.conv.weight.detach().permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    feats = torch.randn(len(sites), options.channels, device=mask.device, dtype=options.dtype)
    places = mask.nonzero(as_tuple=True)

    def dense(feats: Tensor) -> Tensor:
        full = grid.index_put(places, feats).movedim(-1, 1)
        return functional.conv3d(full, weight, layer.conv.bias, padding=1).movedim(1, -1)[places]

    return lambda feats: layer(Voxels(feats, sites)).feats, dense, (feats,)


def padded(rows: Tensor, keep: Tensor) -> Function:
    """Attention over sets [W, L] of rows, all of one length, with a mask."""
    place = keep.flatten().nonzero().squeeze(1)
    back = torch.empty_like(place).scatter_(0, rows.flatten()[place], place)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[rows].transpose(1, 2) for t in (q, k, v))
        mask = keep[:, None, None].expand(-1, 1, rows.shape[1], -1)
        return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)[back]

    return dense


def ragged(mask: Tensor, options: argparse.Namespace, windows: bool) -> tuple[Function, Function, tuple[Tensor, ...]]:
    if not windows:
        mask = mask.clone()
        mask[1] &= torch.rand(mask[1].shape, device=mask.device) < 0.5
    sites = Sites(mask.nonzero().int().contiguous(), len(mask))
    like = Voxels(torch.empty(len(sites), 0, device=mask.device), sites)
    if windows:
        plan = attention.windows(sites, WINDOW, SHIFT)
        order, sizes, length = plan.order, torch.tensor(plan.sizes, device=mask.device), WINDOW**3
    else:
        order, sizes, length = torch.arange(len(sites), device=mask.device), sites.lengths, max(sites.sizes)
    starts, span = sizes.cumsum(0) - sizes, torch.arange(length, device=mask.device)
    rows = order[starts[:, None] + torch.minimum(span, sizes[:, None] - 1)]
    shape = (len(sites), max(options.channels // HEAD, 1), HEAD)
    qkv = tuple(torch.randn(shape, device=mask.device, dtype=options.dtype) for _ in range(3))

    def sparse(*qkv: Tensor) -> Tensor:
        return attention.windowed(*qkv, like, WINDOW, SHIFT) if windows else attention.full(*qkv, like)

    return sparse, padded(rows, span < sizes[:, None]), qkv


def set_up(mask: Tensor, what: str, runs: int) -> float:
    """Seconds of the look-up on fresh sites."""
    coords = mask.nonzero().int().contiguous()
    find = {
        "convolution": neighbours,
        "windows": lambda sites: attention.windows(sites, WINDOW, SHIFT),
        "full": lambda sites: attention._samples(sites),
    }[what]
    return statistics.median(seconds(lambda: find(Sites(coords, len(mask))), mask.device) for _ in range(runs))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for share in SHARES:
        generator = torch.Generator().manual_seed(0)
        masks = {
            what: torch.stack([surface(share, side, generator) for _ in range(2)]).to(options.device)
            for what, side in (("convolution", options.side), ("windows", options.side), ("full", options.side // 2))
        }
        for what, mask in masks.items():
            made = convolution(mask, options) if what == "convolution" else ragged(mask, options, what == "windows")
            with torch.no_grad():
                found, expected = (fn(*made[2]) for fn in made[:2])
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= CLOSE[options.dtype]:
                raise SystemExit(f"{what} at {share:.0%}: sparse and dense differ by {error:.1e}")
            row = {"what": what, "share": share, "voxels": len(made[2][0]), "error": error}
            for name, train in (("forward", False), ("training", True)):
                row[name] = compare(*made, options.runs, train)
            row["set_up"] = set_up(mask, what, options.runs) / row["forward"]["sparse_s"]
            rows.append(row)
            print(f"{what} {share:.0%}: {row['forward']['ratio']:.2f}, {row['training']['ratio']:.2f}", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | occupancy | voxels | forward, ms | times dense | forward and backward, ms | times dense | set-up |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["what"], f"{row['share']:.0%}", f"{row['voxels']:,}"]
        for name in ("forward", "training"):
            cells += [f"{1000 * row[name]['sparse_s']:.1f}", f"{row[name]['ratio']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['set_up']:.2f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--conv", default="torch")
    parser.add_argument("--attention", default="torch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with backends.use(conv=options.conv, attention=options.attention):
        used, rows = backends.describe(), measure(options)
    head = f"`{shlex.join(['python', *sys.argv])}`; {device_name(options.device)}, {used}, torch {torch.__version__}"
    print("\n".join([head, "", *table(rows)]))
    if options.json:
        told = {"command": shlex.join(sys.argv), "device": device_name(options.device), "back_ends": used, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
