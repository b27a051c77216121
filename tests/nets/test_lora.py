"""Adapters: equal at first, merged exactly, one set of base weights under many of them, and the names others read."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from fastgen.errors import UserError
from fastgen.nets import lora
from fastgen.nets.lora import LoraConfig, add_lora, enable_gradient_checkpointing, merged, share
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.teachers import mlp
from fastgen.teachers.unet import UNetConfig, UNetDenoiser, build
from tests.tiny import unet

X, T = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8), torch.tensor([0.3, 0.8])


def pixels(seed: int = 0) -> UNetDenoiser:
    torch.manual_seed(seed)
    denoiser = build(UNetConfig(block_out_channels=(8, 16), layers_per_block=1), (4, 8, 8), None)
    torch.nn.init.normal_(denoiser.net.conv_out.weight, std=0.1)  # zero in a fresh network, which would hide everything
    return denoiser.eval()


def stirred(denoiser):
    """The same with adapters that are not zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in lora.lora_tensors(denoiser).values():
            tensor.normal_(0, 0.1)
    return denoiser


def out(denoiser):
    with torch.no_grad():
        return denoiser(X, T).x0


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained():
    base = pixels()
    adapted = add_lora(copy.deepcopy(base), LoraConfig(rank=2), seed=0)
    assert torch.equal(out(adapted), out(base))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name} and trained
    assert len(trained) == len(lora.lora_tensors(adapted))
    stirred(adapted)
    assert not torch.allclose(out(adapted), out(base), atol=1e-3)


def test_the_seed_decides_the_adapters_and_torchs_generator_stays_where_it_was():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (lora.lora_tensors(add_lora(pixels(), LoraConfig(rank=2), seed)) for seed in (4, 4, 5))
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    torch.manual_seed(1)
    add_lora(copy.deepcopy(BASE), LoraConfig(rank=2), seed=9)
    assert torch.equal(torch.rand(3), expected)


BASE = pixels()


def test_shared_networks_hold_one_set_of_base_weights():
    teacher = pixels()
    before = {name: p for name, p in teacher.named_parameters()}
    student, fake = (stirred(add_lora(share(teacher), LoraConfig(rank=2), seed)) for seed in (0, 1))
    own = [{id(p) for p in net.parameters() if not p.requires_grad} for net in (student, fake)]
    assert own[0] == own[1] == {id(p) for p in teacher.parameters()}
    assert {id(p) for p in student.parameters() if p.requires_grad}.isdisjoint(id(p) for p in fake.parameters())
    assert dict(teacher.named_parameters()).keys() == before.keys()  # no adapters found their way into it
    assert not torch.allclose(out(student), out(teacher), atol=1e-3)
    moved = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        teacher.net.conv_in.weight.mul_(2)
    assert torch.equal(student.net.conv_in.weight, 2 * moved["net.conv_in.weight"])


@pytest.mark.parametrize("alpha", [None, 0.5, 6.0])
def test_merged_is_the_plain_network_that_computes_the_same(alpha):
    adapted = stirred(add_lora(pixels(), LoraConfig(rank=3, alpha=alpha), seed=0))
    plain = merged(adapted)
    assert plain.state_dict().keys() == pixels().state_dict().keys()
    assert not hasattr(plain.net, "peft_config")
    torch.testing.assert_close(out(plain), out(adapted), atol=1e-5, rtol=1e-4)
    name = "net.down_blocks.0.resnets.0.conv1.weight"
    a, b = (lora.lora_tensors(adapted)[f"unet.down_blocks.0.resnets.0.conv1.lora_{x}.weight"] for x in "AB")
    delta = (alpha or 3) / 3 * torch.einsum("or,rihw->oihw", b[..., 0, 0].double(), a.double())
    expected = pixels().state_dict()[name].double() + delta
    torch.testing.assert_close(plain.state_dict()[name].double(), expected, atol=1e-6, rtol=1e-5)


def test_merging_adds_in_float32_whatever_the_base_is_kept_in():
    adapted = stirred(add_lora(pixels(), LoraConfig(rank=2), seed=0))
    half = stirred(add_lora(pixels().to(torch.bfloat16), LoraConfig(rank=2), seed=0))
    assert all(tensor.dtype == torch.float32 for tensor in lora.lora_tensors(half).values())
    base, float_merged = pixels().state_dict(), merged(adapted).state_dict()
    for name, tensor in merged(half).state_dict().items():
        exact = base[name].bfloat16().float() + (float_merged[name] - base[name])
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), exact, atol=1e-6, rtol=2**-8)  # half a unit in the last place


def test_a_plain_network_merges_to_a_copy_of_itself():
    base = pixels()
    plain = merged(base)
    assert torch.equal(out(plain), out(base)) and plain.net is not base.net


def test_saved_adapters_load_onto_the_same_base():
    adapted = stirred(add_lora(pixels(), LoraConfig(rank=2, alpha=5.0, targets=("to_q", "attentions.0.to_k")), seed=0))
    settings, tensors = lora.lora_settings(adapted), lora.lora_tensors(adapted)
    assert settings == {"rank": 2, "alpha": 5.0, "targets": ["attentions.0.to_k", "to_q"]}
    again = lora.load_lora(pixels(), tensors, settings)
    assert torch.equal(out(again), out(adapted))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(next(iter(t))), "no tensor 'unet"),
        (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.zeros(2, 2)}), "no place in the network for"),
        (lambda t: t.update({next(iter(t)): torch.zeros(9, 9)}), r"is \(9, 9\), the network's"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, expected):
    adapted = add_lora(pixels(), LoraConfig(rank=2), seed=0)
    tensors = lora.lora_tensors(adapted)
    change(tensors)
    with pytest.raises(UserError, match=expected):
        lora.load_lora(pixels(), tensors, lora.lora_settings(adapted))


def test_targets_that_match_nothing_are_named_with_a_near_one():
    with pytest.raises(UserError, match=r"lora.targets: no linear or convolution layer 'to_qq' \(did you mean 'to_q'"):
        add_lora(pixels(), LoraConfig(targets=("to_q", "to_qq")), seed=0)
    with pytest.raises(UserError, match=r"'down_blocks\.0'"):  # a block is no layer
        add_lora(pixels(), LoraConfig(targets=("down_blocks.0",)), seed=0)
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(add_lora(pixels(), LoraConfig(rank=2), seed=0), LoraConfig(rank=2), seed=0)


def test_an_mlp_takes_adapters_where_its_layers_are_named():
    torch.manual_seed(0)
    denoiser = mlp.build(mlp.MLPConfig(width=8, depth=1), (4, 8, 8), None)
    with pytest.raises(UserError, match=r"none of a U-Net's layers; name some of its own \(known: .*expand.*outer"):
        add_lora(copy.deepcopy(denoiser), LoraConfig(), seed=0)
    adapted = stirred(add_lora(copy.deepcopy(denoiser), LoraConfig(rank=2, targets=("outer", "expand")), seed=0))
    assert not torch.allclose(out(adapted), out(denoiser), atol=1e-3)
    torch.testing.assert_close(out(merged(adapted)), out(adapted), atol=1e-6, rtol=1e-5)


def test_dropout_of_the_adapters_acts_in_training_alone():
    adapted = stirred(add_lora(pixels(), LoraConfig(rank=2, dropout=0.5), seed=0))
    assert torch.equal(out(adapted), out(adapted))
    adapted.train()
    assert not torch.equal(out(adapted), out(adapted))


def test_adapters_on_the_meta_device_take_no_memory():
    with torch.device("meta"):
        net = UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    denoiser = UNetDenoiser(net, RectifiedFlow(), Prediction(kind="flow"), shape=(4, 8, 8))
    assert all(tensor.is_meta for tensor in lora.lora_tensors(add_lora(denoiser, LoraConfig(rank=2), seed=0)).values())


def test_what_stock_diffusers_loads_is_what_was_trained():
    """`load_lora_adapter` of the stock network on our tensors and settings, in a network without adapters."""
    torch.manual_seed(0)
    net = unet()
    assert isinstance(net, UNet2DConditionModel)
    plain = copy.deepcopy(net).eval()
    ours = UNetDenoiser(net, RectifiedFlow(), Prediction(kind="flow"), shape=(4, 8, 8)).eval()
    stirred(add_lora(ours, LoraConfig(rank=2), seed=0))
    plain.load_lora_adapter(lora.lora_tensors(ours), prefix="unet")
    side = net.config.sample_size
    x = torch.linspace(-1, 1, 4 * side * side).reshape(1, 4, side, side)
    text = torch.linspace(-1, 1, 3 * net.config.cross_attention_dim).reshape(1, 3, -1)
    with torch.no_grad():
        torch.testing.assert_close(plain(x, 7, text).sample, ours.net(x, 7, text).sample, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(frozen):
    """Of the weights, and of the input through a frozen network, where reentrant checkpoints would lose it."""
    found = []
    for checkpointed in (False, True):
        denoiser = pixels().train().requires_grad_(not frozen)
        if checkpointed:
            enable_gradient_checkpointing(denoiser)
        calls: list[int] = []
        for block in denoiser.net.down_blocks[0].resnets:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        x = X.clone().requires_grad_()
        denoiser(x, T).x0.square().mean().backward()
        assert len(calls) == (2 if checkpointed else 1)
        found.append([x.grad, *(p.grad for p in denoiser.parameters() if p.grad is not None)])
    plain, again = found
    assert len(plain) == len(again) == (1 if frozen else 1 + len(list(pixels().parameters())))
    for a, b in zip(plain, again, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, atol=1e-7, rtol=1e-5)


def test_checkpointing_of_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"student\.gradient_checkpointing: this mlp network"):
        enable_gradient_checkpointing(mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None))
