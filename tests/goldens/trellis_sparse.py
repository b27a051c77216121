"""Kinds of the group `trellis` that need no network: convolution, resampling and windows of sparse voxels."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastgen.sparse import Voxels
from fastgen.sparse.attention import full, windowed, windows
from fastgen.sparse.conv import SparseConv3d
from fastgen.sparse.spatial import SparseGroupNorm32, downsample, subdivide, upsample
from fastgen.teachers.trellis.blocks import SelfAttention
from tests.goldens.case import Case


def voxels(case: Case) -> Voxels:
    coords = case["in.coords"]
    return Voxels(case["in.feats"], coords, int(coords[:, 0].max()) + 1)


def weights(case: Case) -> dict[str, Tensor]:
    return {match[1]: case[match[0]] for match in case.names(r"sd\.(.+)")}


def subm_conv(case: Case) -> None:
    """A convolution and its gradients of sum(out * grad_out)."""
    x, state = voxels(case), weights(case)
    layer = SparseConv3d(**case.data["args"], bias="conv.bias" in state)
    layer.load_state_dict(state)
    out = layer(x.requires_grad_())
    case.close(out.feats, case["out.feats"], "output")
    out.feats.backward(case["in.grad_out"])
    case.close(x.feats.grad, case["out.grad_feats"], "gradient of the features")
    for name, parameter in layer.conv.named_parameters():
        case.close(parameter.grad, case[f"out.grad_{name}"], f"gradient of the {name}")


def sparse_spatial(case: Case) -> None:
    """Half resolution and back, eight children each, group norm."""
    x = voxels(case)
    down = downsample(x)
    for name, found in (("down", down), ("up", upsample(down)), ("subdivide", subdivide(x))):
        case.close(found.feats, case[f"{name}.feats"], f"{name}: features")
        assert torch.equal(found.coords, case[f"{name}.coords"]), f"{name}: other coordinates or another order"
    groups = re.search(r"SparseGroupNorm32\((\d+),", case.data["class"])
    assert groups, "the case does not say how many groups there are"
    norm = SparseGroupNorm32(int(groups[1]), case.data["args"]["C"])
    norm.load_state_dict({"weight": case["gn.weight"], "bias": case["gn.bias"]})
    case.close(norm(x).feats, case["gn.out"], "group norm")


def window_attn(case: Case) -> None:
    """Self-attention within windows (or within samples), and which rows make a window."""
    x, state, args = voxels(case), weights(case), case.data["args"]
    layer = SelfAttention(args["channels"], args["num_heads"], qk_norm=args.get("qk_rms_norm", False))
    layer.load_state_dict(state)
    size, shift = args.get("window_size"), args.get("shift_window", 0)
    with torch.no_grad():
        out = layer(x.feats, lambda *qkv: windowed(*qkv, x, size, shift) if size else full(*qkv, x))
    case.close(out, case["out.feats"], "output")
    if size:
        plan = windows(x.sites, size, shift)
        expected = sets(case["part.fwd"], case["part.seq_lens"].tolist())
        assert sets(plan.order, plan.sizes) == expected, "other windows"
        samples = [int(x.row_batch[rows[0]]) for rows in expected]
        assert sorted(samples) == sorted(case["part.seq_batch"].tolist()), "windows of other samples"


def sets(order: Tensor, sizes: list[int] | tuple[int, ...]) -> list[list[int]]:
    """The rows of each set, both in an order that says nothing."""
    return sorted(sorted(rows.tolist()) for rows in order.split(list(sizes)))
