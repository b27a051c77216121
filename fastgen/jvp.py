"""The one way to a directional derivative of a network: d/dh fn(x + h v, t + h u) at h = 0.

Of the attention kernels only the plain one has a forward-mode rule, and half precision drowns the tangent: hence the
MATH kernel on every device, float32, outside autocast. The tangent carries no gradient: methods use it as a target.

    two_pass     the tangent by forward-mode differentiation without gradients, then the network once more as it is
                 trained (autocast, gradient checkpointing, any attention kernel)
    single_pass  one forward-mode pass whose value keeps its gradient: less time, more memory, no checkpointing
    finite       a central difference, for networks with operations that have no forward-mode rule; then as two_pass
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.config import Model
from fastgen.errors import RunFailed

logger = logging.getLogger("fastgen")


class JvpConfig(Model):
    """route: see the module. step: h of `finite`, whose error is O(h^2) plus round-off over h."""

    route: Literal["two_pass", "single_pass", "finite"] = "two_pass"
    step: float = Field(default=1e-3, gt=0)


def value_and_tangent(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], config: JvpConfig
) -> tuple[Tensor, Tensor]:
    """fn(*primals) with its gradient, and its derivative along `tangents` without one, both [B, ...].

    Dropout draws the same masks in every evaluation of one call. A tangent that is not finite is a RunFailed.
    """
    device = primals[0].device.type
    wide = tuple(p if p.dtype == torch.float64 else p.float() for p in primals)
    along = tuple(v.to(p.dtype) for v, p in zip(tangents, wide, strict=True))
    state = torch.random.get_rng_state()
    single = config.route == "single_pass"
    with torch.set_grad_enabled(single), sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
        if config.route == "finite":
            tangent = _central(fn, wide, along, config.step, state)
        else:
            value, tangent = torch.func.jvp(fn, wide, along)[:2]
    if not torch.isfinite(tangent).all():
        raise RunFailed("the directional derivative of the network is not finite; see whether its output or inputs are")
    if not single:
        torch.random.set_rng_state(state)
        value = fn(*primals)
    return value, tangent.detach()


def _central(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], h: float, state: Tensor
) -> Tensor:
    def at(h: float) -> Tensor:
        torch.random.set_rng_state(state)
        return fn(*(p + h * v for p, v in zip(primals, tangents, strict=True)))

    return (at(h) - at(-h)) / (2 * h)


def check(
    fn: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    config: JvpConfig,
    student: nn.Module,
) -> None:
    """Try the route on a few rows before the first step, and log how far it is from a finite difference."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _, tangent = value_and_tangent(fn, primals, tangents, config)
        _, other = value_and_tangent(fn, primals, tangents, JvpConfig(route="finite"))
    error = float((tangent - other).norm() / other.norm().clamp_min(1e-12))
    logger.info("derivative along the path: %s, %.1e from a finite difference", config.route, error)
