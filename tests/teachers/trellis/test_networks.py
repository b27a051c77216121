"""TRELLIS's networks: samples do not see one another, a full grid is the dense case, no route changes a result."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fastgen.sparse import Voxels
from fastgen.teachers.trellis.blocks import Grid, positions
from fastgen.teachers.trellis.models import make
from fastgen.teachers.trellis.structure_flow import patches, unpatches
from fastgen.teachers.trellis.structure_vae import Up, occupied
from tests.teachers.trellis.nets import DECODERS, SLAT, STRUCTURE, normal, small, told, voxels

EXACT = dict(rtol=0, atol=1e-10)
TRUNKS = (*DECODERS, "SLatEncoder")


def test_a_fresh_flow_stands_still_and_its_blocks_are_their_skips():
    time, cond = (v.float() for v in told())
    dense, x = make("SparseStructureFlowModel", STRUCTURE, "here"), normal(2, 3, 4, 4, 4).float()
    assert not dense(x, time, cond).any()
    sparse, v = make("SLatFlowModel", SLAT, "here"), voxels(3).float()
    assert not sparse(v, time, cond).feats.any()
    block, tokens = dense.blocks[0], normal(2, 7, 24).float()  # its gates are shut: nothing but the cross-attention
    crossed = tokens + block.cross_attn(block.norm2(tokens), cond, Grid().cross)
    torch.testing.assert_close(block(tokens, normal(2, 24).float(), cond, Grid()), crossed, rtol=0, atol=0)
    plain = make("SLatFlowModel", SLAT | {"num_io_res_blocks": 2}, "here").input_blocks[0]
    h = voxels(8).float()
    torch.testing.assert_close(plain(h, normal(2, 24).float()).feats, h.feats, rtol=0, atol=0)


def test_a_fresh_decoder_block_is_its_skip():
    net = make(
        "SparseStructureDecoder", dict(out_channels=1, latent_channels=4, num_res_blocks=1, channels=[8]), "here"
    )
    x = normal(1, 8, 3, 3, 3).float()
    torch.testing.assert_close(net.blocks[0](x), x, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"share_mod": True}, {"qk_rms_norm_cross": True}])
def test_samples_of_the_structure_flow_are_apart(changes):
    net, x, (time, cond) = small("SparseStructureFlowModel", **changes), normal(2, 3, 4, 4, 4), told()
    together = net(x, time, cond)
    assert together.abs().mean() > 0.1
    for i in range(2):
        torch.testing.assert_close(net(x[i : i + 1], time[i : i + 1], cond[i : i + 1])[0], together[i], **EXACT)


@pytest.mark.parametrize("changes", [{}, {"io_block_channels": None}, {"use_skip_connection": False}])
def test_samples_of_the_latent_flow_are_apart(changes):
    net, x, (time, cond) = small("SLatFlowModel", **changes), voxels(3), told()
    together = net(x, time, cond)
    assert together.sites is x.sites and together.feats.abs().mean() > 0.1
    for i in range(2):
        alone = net(x[i], time[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(alone.feats, together[i].feats, **EXACT)


@pytest.mark.parametrize("kind", TRUNKS)
def test_samples_of_encoder_and_decoders_are_apart(kind):
    net = small(kind)
    x = voxels(6 if kind == "SLatEncoder" else 4)
    with torch.no_grad():
        parts = [net(x), *(net(x[i]) for i in range(2))]
    together, *alone = [part[0] if kind == "SLatEncoder" else part for part in parts]
    assert together.feats.abs().mean() > 0.1
    for i in range(2):
        torch.testing.assert_close(alone[i].feats, together[i].feats, rtol=1e-9, atol=1e-9)


def test_the_order_of_rows_does_not_matter():
    for kind, channels in (("SLatFlowModel", 3), ("SLatGaussianDecoder", 4)):
        net, x = small(kind), voxels(channels, batch=1)
        order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(3))
        turned = Voxels(x.feats[order], x.coords[order], 1)
        extra = tuple(v[:1] for v in told()) if "Flow" in kind else ()
        torch.testing.assert_close(net(turned, *extra).feats, net(x, *extra).feats[order], **EXACT)


def test_windows_are_shifted_in_odd_blocks_only():
    """Voxels 3 and 4 lie in different windows of 4 in even blocks and in one window in odd blocks."""
    coords = torch.tensor([[0, 3, 0, 0], [0, 4, 0, 0]], dtype=torch.int32)
    feats = normal(2, 4)
    moved = torch.cat([feats[:1], feats[1:] + 1])
    for blocks, seen in ((1, False), (2, True)):
        net = small("SLatGaussianDecoder", num_blocks=blocks)
        a, b = (net(Voxels(f, coords, 1)).feats[0] for f in (feats, moved))
        assert torch.equal(a, b) is not seen
    full = small("SLatGaussianDecoder", num_blocks=1, attn_mode="full")
    assert not torch.equal(*(full(Voxels(f, coords, 1)).feats[0] for f in (feats, moved)))


def test_patches_and_their_inverse():
    x = normal(2, 3, 4, 4, 4)
    tokens = patches(x, 2)
    torch.testing.assert_close(unpatches(tokens, 2, 4), x, rtol=0, atol=0)
    # Token (1, 0, 1), channel c = 2 with the offset (1, 0, 1) inside its patch.
    torch.testing.assert_close(tokens[:, 1 * 4 + 0 * 2 + 1, ((2 * 2 + 1) * 2 + 0) * 2 + 1], x[:, 2, 3, 0, 3])


def test_positions_are_sines_then_cosines_of_each_axis():
    found = positions(torch.tensor([[3, 5, 7]]), 26, torch.float64)[0]
    steps = [10_000 ** (-j / 4) for j in range(4)]
    expected = [f(c * g) for c in (3, 5, 7) for f in (math.sin, math.cos) for g in steps]
    torch.testing.assert_close(found, torch.tensor([*expected, 0, 0], dtype=torch.float64))


def test_upsampling_shuffles_channels_into_cubes():
    up = Up(8, 2)
    torch.nn.init.zeros_(up.conv.weight)
    with torch.no_grad():
        up.conv.bias.copy_(torch.arange(16.0))
    cube = up(torch.zeros(1, 8, 1, 1, 1))[0]
    assert cube.tolist() == torch.arange(16.0).reshape(2, 2, 2, 2).tolist()


def test_occupied_cells_in_their_order():
    logits = torch.full((2, 1, 3, 3, 3), -1.0)
    for cell in ((1, 0, 0, 2, 1), (0, 0, 2, 0, 0), (0, 0, 1, 1, 2)):
        logits[cell] = 0.5
    logits[0, 0, 0, 0, 0] = 0.0
    assert occupied(logits).tolist() == [[0, 1, 1, 2], [0, 2, 0, 0], [1, 0, 2, 1]]
    assert occupied(logits).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["SparseStructureFlowModel", "SLatFlowModel", "SLatMeshDecoder", "SparseStructureDecoder"]
)
def test_a_half_precision_torso_answers_in_float32(kind, dtype):
    net = small(kind).float()
    inputs = {
        "SparseStructureFlowModel": (normal(2, 3, 4, 4, 4).float(), *(v.float() for v in told())),
        "SLatFlowModel": (voxels(3).float(), *(v.float() for v in told())),
        "SLatMeshDecoder": (voxels(4, size=4, share=0.1, batch=1).float(),),
        "SparseStructureDecoder": (normal(1, 4, 2, 2, 2).float(),),
    }[kind]
    with torch.no_grad():
        whole = net(*inputs)
        net.to_torso(dtype)
        half = net(*inputs)
    whole, half = (v.feats if isinstance(v, Voxels) else v for v in (whole, half))
    assert net.torso_dtype == dtype and half.dtype == torch.float32
    apart = (half - whole).norm() / whole.norm()
    assert 0 < apart < (0.01 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("kind", ["SparseStructureFlowModel", "SLatFlowModel", "SLatGaussianDecoder"])
def test_recomputed_activations_change_nothing(kind):
    def gradients(recompute: bool) -> list[torch.Tensor]:
        net, calls = small(kind, use_checkpoint=recompute), []
        net.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        x = normal(2, 3, 4, 4, 4) if "Structure" in kind else voxels(3 if "Flow" in kind else 4)
        out = net(x, *(told() if "Flow" in kind else ()))
        (out.feats if isinstance(out, Voxels) else out).square().mean().backward()
        assert len(calls) == 1 + recompute
        return [p.grad for p in net.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-9 * float(plain.abs().max()))


def test_the_time_is_embedded_as_cosines_then_sines():
    net = small("SparseStructureFlowModel")
    kept = []
    net.t_embedder.mlp[0].register_forward_hook(lambda _layer, args, _out: kept.append(args[0]))
    time, cond = told()
    net(normal(2, 3, 4, 4, 4), time, cond)
    angles = time[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    torch.testing.assert_close(kept[0], torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-9)


def test_the_last_norm_of_the_latent_flow_is_in_the_torsos_precision():
    """Trap 6 of the format: half precision goes into that norm and comes out of it."""
    net = small("SLatFlowModel").float()
    net.to_torso(torch.bfloat16)
    kept = []
    net.out_layer.register_forward_hook(lambda _layer, args, _out: kept.append(args[0]))
    net(voxels(3).float(), *(v.float() for v in told()))
    rounded = kept[0].bfloat16().float()
    assert kept[0].dtype == torch.float32 and torch.equal(kept[0], rounded)
    assert functional.mse_loss(kept[0].mean(1), torch.zeros(len(kept[0]))) < 1e-4
