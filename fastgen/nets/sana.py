"""Changes to diffusers' `SanaTransformer2DModel` that its own config knows: the guidance input, QK-norm, a dense time.

Each changes the network in place and says so in its config, so that `save_pretrained` and `from_pretrained` of stock
diffusers agree on it (2503.09641, section 3.1 and appendix; 2410.11081 for why a time derivative wants all three).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 0.1  # of the guidance weight, the stock config's default
QK_NORM = "rms_norm_across_heads"
GRID = 4096  # times at which the two embeddings are held against each other
STEEPEST = 32.0  # a hidden unit bends within about 4 / STEEPEST of [0, 1], and no sharper
RIDGE = 1e-3  # over the mean variance of the hidden units: so the second layer stays small, and bfloat16 can hold it


def embedder(net: Any) -> Any:
    """The two layers that embed the time, [B, 256] to [B, width]."""
    return net.time_embed.timestep_embedder if net.config.guidance_embeds else net.time_embed.emb.timestep_embedder


def add_guidance(net: Any) -> None:
    """Let the network be told a guidance weight; it answers bit for bit as before until that is trained.

    The first layer is N(0, 0.02^2) and the second zero, as NVlabs train it: with zeros in both, only the last bias
    would ever get a gradient, and the output could not come to depend on the weight. The numbers come from a generator
    of their own, the same for every run.
    """
    from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings

    old, layer = net.time_embed, embedder(net)
    made = SanaCombinedTimestepGuidanceEmbeddings(layer.linear_2.out_features)
    nn.init.normal_(made.guidance_embedder.linear_1.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    for zero in (made.guidance_embedder.linear_1.bias, *made.guidance_embedder.linear_2.parameters()):
        nn.init.zeros_(zero)
    made.guidance_embedder.to(layer.linear_2.weight)
    made.timestep_embedder, made.linear = layer, old.linear
    net.time_embed = made.train(net.training)
    net.register_to_config(guidance_embeds=True, guidance_embeds_scale=SCALE)


def add_qk_norm(net: Any) -> None:
    """Queries and keys of every attention divided by their root mean square over all heads, with weights of 1.

    In the linear attention that leaves the queries' part as it was (they stand above and below the fraction); the keys'
    part and the cross attention do change, which is what the preparation trains away.
    """
    from diffusers.models.normalization import RMSNorm

    for block in net.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            width, like = attention.inner_dim, attention.to_q.weight
            attention.norm_q, attention.norm_k = (RMSNorm(width, eps=1e-5).to(like) for _ in range(2))
    net.register_to_config(qk_norm=QK_NORM)


@torch.no_grad()
def make_time_dense(net: Any, scale: float) -> float:
    """Set the config's timestep_scale to one of at most 0.001, and give the network an embedding that follows the old.

    The first layer is set to bends spread over [0, 1], no steeper than STEEPEST, the second is solved for (least
    squares with a small ridge on GRID times): what the old embedding does faster than that is left out, and with it
    the large derivatives that the new one is for. Returns the relative error, RMS over times and entries.
    """
    layer, proj = embedder(net), _time_proj(net)
    if layer.linear_1.weight.is_meta:  # an architecture alone
        net.register_to_config(timestep_scale=scale)
        return 0.0
    r = torch.linspace(0, 1, GRID, device=layer.linear_1.weight.device)
    target = layer.double()(proj(1000 * net.config.timestep_scale * r).double())
    features = proj(1000 * scale * r).double()
    steep, place = _bends(layer.linear_1.out_features, features.device)
    # A ramp of all the sines, which rise over [0, 1]: each by itself is rounded in half precision, their mean less so.
    fast = features[-1, layer.linear_1.in_features // 2 :].asin()  # their frequencies: at r = 1 none is beyond pi / 2
    ramp = fast / fast.square().sum()
    layer.linear_1.weight.zero_()
    layer.linear_1.weight[:, layer.linear_1.in_features // 2 :] = steep[:, None] * ramp
    layer.linear_1.bias.copy_(-steep * ((place[:, None] * fast).sin() @ ramp))
    hidden = layer.act(layer.linear_1(features))
    weight, bias = _ridge(hidden, target)
    layer.linear_2.weight.copy_(weight.T)
    layer.linear_2.bias.copy_(bias)
    found = layer(features)
    net.register_to_config(timestep_scale=scale)
    layer.to(net.proj_out.weight.dtype)
    return float((found - target).square().mean().sqrt() / target.square().mean().sqrt())


def _time_proj(net: Any) -> Any:
    return net.time_embed.time_proj if net.config.guidance_embeds else net.time_embed.emb.time_proj


def _bends(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slope and place of n hidden units, [n] each: places even over [0, 1], slopes of both signs from 1 to STEEPEST by
    the golden ratio, so that every part of [0, 1] has units of every slope."""
    i = torch.arange(n, dtype=torch.float64, device=device)
    share = (i * (math.sqrt(5) - 1) / 2) % 1
    sign = 1 - 2 * (i % 2)
    return sign * STEEPEST**share, (i + 0.5) / n


def _ridge(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """weight [n, width] and bias [width] of the line from hidden [m, n] to target [m, width]."""
    centre, mean = hidden.mean(0), target.mean(0)
    h, y = hidden - centre, target - mean
    gram = h.T @ h
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, h.T @ y)
    return weight, mean - centre @ weight
