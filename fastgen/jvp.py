"""The one way to a directional derivative of a network: d/dh fn(x + h v, t + h u) at h = 0.

Of the attention kernels only the plain one has a forward-mode rule, and half precision drowns the tangent: hence the
MATH kernel on every device, float32, outside autocast. The tangent carries no gradient: methods use it as a target and
run the network a second time for the gradient (two passes), which gradient checkpointing allows too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.errors import RunFailed

Route = Literal["forward", "finite"]
STEP = 1e-3  # of the central difference in float32: its error is O(h^2) plus round-off over h


def jvp(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], *, route: Route = "forward"
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivative along `tangents`, both [B, ...] without gradient.

    route  "forward": forward-mode differentiation; "finite": a central difference, for networks with operations that
           have no forward-mode rule (two more evaluations, error about 1e-3 relative in float32)
    A tangent that is not finite is a RunFailed. Dropout draws the same masks in every evaluation of one call.
    """
    device = primals[0].device.type
    wide = tuple(p if p.dtype == torch.float64 else p.float() for p in primals)
    along = tuple(v.to(p.dtype) for v, p in zip(tangents, wide, strict=True))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
        if route == "forward":
            value, tangent = torch.func.jvp(fn, wide, along)[:2]
        else:
            value, tangent = _central(fn, wide, along)
    if not torch.isfinite(tangent).all():
        raise RunFailed("the directional derivative of the network is not finite; see whether its output or inputs are")
    return value, tangent


def _central(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    state = torch.random.get_rng_state()

    def at(h: float) -> Tensor:
        torch.random.set_rng_state(state)
        return fn(*(p + h * v for p, v in zip(primals, tangents, strict=True)))

    return at(0.0), (at(STEP) - at(-STEP)) / (2 * STEP)
