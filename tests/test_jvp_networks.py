"""Each route on tiny networks of the real classes, against the derivative in float64.

    python -m tests.test_jvp_networks          prints the table of docs/jvp.md

The float64 networks are those of diffusers with two changes. Their sinusoidal embedding of the time is computed in
float64: stock code casts times to float32 there, which a difference over 2 h enlarges by 1 / 2 h. And SANA, FLUX and
SD3 cast to float32 within norms and attention, so that they are differentiated by `torch.func.jvp`, which is no part
of the code under test, instead of a difference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.errors import UserError
from fastgen.jvp import JvpConfig, check, value_and_tangent
from tests import tiny

ROUTES = ("two_pass", "single_pass", "finite")
Call = Callable[[Any, Tensor, Tensor], Tensor]


def seeded(net: Any) -> Any:
    """Random weights also where a network begins with zeros, whose derivative would be none."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def unet() -> tuple[Any, Call, tuple[int, ...], float]:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return net, lambda net, x, t: net(x, t, return_dict=False)[0], (3, 8, 8), 1000.0


def conditional() -> tuple[Any, Call, tuple[int, ...], float]:
    torch.manual_seed(0)
    text = normal(2, 7, tiny.TEXT)
    return (
        tiny.unet(),
        lambda net, x, t: net(x, t, text.to(x.dtype), return_dict=False)[0],
        (4, tiny.LATENT, tiny.LATENT),
        1000.0,
    )


def dit() -> tuple[Any, Call, tuple[int, ...], float]:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8
    )
    labels = torch.tensor([3, 7])
    return net, lambda net, x, t: net(x, t, class_labels=labels, return_dict=False)[0], (4, 8, 8), 1000.0


def sd3() -> tuple[Any, Call, tuple[int, ...], float]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    text, pooled = normal(2, 7, 16), normal(2, 12)

    def call(net: Any, x: Tensor, t: Tensor) -> Tensor:
        return net(x, text.to(x.dtype), pooled.to(x.dtype), t, return_dict=False)[0]

    return net, call, (4, 8, 8), 1000.0


def flux() -> tuple[Any, Call, tuple[int, ...], float]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    text, pooled = normal(2, 5, 16), normal(2, 12)
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))

    def call(net: Any, x: Tensor, t: Tensor) -> Tensor:
        options = {"txt_ids": torch.zeros(5, 3), "img_ids": image_ids, "guidance": torch.full_like(t, 3.5)}
        told = {"encoder_hidden_states": text.to(x.dtype), "pooled_projections": pooled.to(x.dtype)}
        return net(x, timestep=t, return_dict=False, **told, **options)[0]

    return net, call, (16, 16), 1.0


def sana(qk_norm: str | None = "rms_norm_across_heads") -> tuple[Any, Call, tuple[int, ...], float]:
    torch.manual_seed(0)
    net = tiny.sana_transformer(num_layers=4, sample_size=8, qk_norm=qk_norm)
    text, mask = normal(2, 6, 16), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])

    def call(net: Any, x: Tensor, t: Tensor) -> Tensor:
        return net(x, text.to(x.dtype), t, encoder_attention_mask=mask, return_dict=False)[0]

    return net, call, (4, 8, 8), 1.0 if qk_norm else 1000.0


NETWORKS: dict[str, Callable[[], tuple[Any, Call, tuple[int, ...], float]]] = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional,
    "DiTTransformer2DModel": dit,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel, qk_norm, time in 0 .. 1": sana,
    "SanaTransformer2DModel, bare, time in 0 .. 1000": lambda: sana(None),
}
DIFFERENCED = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


def sinusoidal(module: Any, times: Tensor) -> Tensor:
    """diffusers' `get_timestep_embedding`, but in float64."""
    half = module.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - module.downscale_freq_shift)
    angles = module.scale * times.double()[:, None] * exponent.exp()
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts[::-1] if module.flip_sin_to_cos else parts, -1)


def exact(net: Any) -> Any:
    from diffusers.models.embeddings import Timesteps

    net = copy.deepcopy(net).double()
    for module in net.modules():
        if isinstance(module, Timesteps):
            module.forward = lambda times, module=module: sinusoidal(module, times)
    return net


def truth(name: str, net: Any, call: Call, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    net, (x, t), (v, u) = exact(net), (p.double() for p in primals), (v.double() for v in tangents)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return call(net, x, t)

    def difference(h: float) -> Tensor:
        return (fn(x + h * v, t + h * u) - fn(x - h * v, t - h * u)) / (2 * h)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if name in DIFFERENCED:
            return (4 * difference(1e-4) - difference(2e-4)) / 3
        return torch.func.jvp(fn, (x, t), (v, u))[1]


def made(name: str) -> tuple[Any, Callable[[Tensor, Tensor], Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(network, function of x and rectified-flow t, primals, tangents)."""
    net, call, shape, scale = NETWORKS[name]()
    net = seeded(net)
    primals, tangents = (normal(2, *shape), torch.tensor([0.3, 0.8])), (normal(3, *shape)[1:], torch.ones(2))
    return net, lambda x, t: call(net, x, scale * t), primals, tangents


def errors(name: str, steps: tuple[float, ...] = (1e-3,)) -> dict[str, float]:
    """Relative error of every route's derivative along (v, 1) in rectified-flow units; `finite` for every step."""
    net, fn, primals, tangents = made(name)
    _, call, _, scale = NETWORKS[name]()
    expected = truth(name, net, lambda net, x, t: call(net, x, scale * t), primals, tangents)
    configs = {route: JvpConfig(route=route) for route in ROUTES[:2]}
    configs |= {f"finite {h:g}": JvpConfig(route="finite", step=h) for h in steps}
    found = {}
    for told, config in configs.items():
        _, tangent = value_and_tangent(fn, primals, tangents, config)
        found[told] = float((tangent - expected).norm() / expected.norm())
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_differentiated(name):
    found = errors(name, (1e-4, 1e-5))
    # Times of 0 .. 1000 are rounded to 6e-5 in float32, and the fastest of their waves has a period of 2 pi.
    bound = 5e-6 if "0 .. 1," in name or name.endswith("0 .. 1") else 1e-4
    assert found["two_pass"] < bound and found["single_pass"] < bound
    assert min(found["finite 0.0001"], found["finite 1e-05"]) < 5e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_the_gradient_of_a_plain_one(name):
    net, fn, primals, tangents = made(name)
    value, _ = value_and_tangent(fn, primals, tangents, JvpConfig(route="single_pass"))
    value.sin().sum().backward()
    ours = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad(set_to_none=True)
    fn(*primals).sin().sum().backward()
    theirs = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 10
    size = torch.cat([g.flatten() for g in theirs]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm() < 1e-4 * size


@pytest.mark.parametrize("name", NETWORKS)
def test_the_look_at_the_start_lets_it_pass(name):
    net, fn, primals, tangents = made(name)
    check(fn, primals, tangents, JvpConfig(), net)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_gradient_checkpointing_and_two_passes(name, again):
    net, fn, primals, tangents = made(name)
    plain = copy.deepcopy(net)
    if again:
        net.enable_gradient_checkpointing()
    value, tangent = value_and_tangent(fn, primals, tangents, JvpConfig())
    value.sin().sum().backward()
    _, call, _, scale = NETWORKS[name]()
    call(plain, primals[0], scale * primals[1]).sin().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert tangent.isfinite().all()


def test_a_fused_processor_is_told_at_the_start():
    """As `enable_xformers_memory_efficient_attention` and `set_attention_backend` put them into a network."""

    class Fused:
        def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, **_options: Any) -> Tensor:
            told = x if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(x)[:, None], attn.to_k(told)[:, None], attn.to_v(told)[:, None]
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
            return attn.to_out[0](out[:, 0])

    net, fn, primals, tangents = made("UNet2DConditionModel")
    net.set_attn_processor(Fused())
    with pytest.raises(UserError, match=r"no forward-mode rule.*_scaled_dot_product_flash.*take fused attention"):
        check(fn, primals, tangents, JvpConfig(), net)


def table() -> None:
    torch.set_num_threads(1)
    steps = (1e-3, 1e-4, 1e-5)
    print("| network | two_pass | single_pass | " + " | ".join(f"finite, step {h:g}" for h in steps) + " |")
    for name in NETWORKS:
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors(name, steps).values()) + " |")


if __name__ == "__main__":
    table()
