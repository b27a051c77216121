"""The one way to a directional derivative of a network: d/dh fn(x + h v, t + h u) at h = 0.

Of torch's attention kernels none but the plain one has a forward-mode rule, and half precision drowns the derivative:
hence the rules of `nets.dual` on every device, float32, outside autocast. The derivative carries no gradient: methods
use it as a target.

    two_pass     the derivative by forward-mode differentiation without gradients, then the network once more as it is
                 trained (autocast, gradient checkpointing, any attention kernel)
    single_pass  one forward-mode pass, in float32, whose value keeps its gradient: less time, more memory, and no
                 gradient checkpointing
    finite       a central difference, for networks with operations that have no forward-mode rule; then as two_pass
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from fastgen.config import Model
from fastgen.errors import RunFailed, UserError, require
from fastgen.layout import wide
from fastgen.nets.dual import Rules, split

logger = logging.getLogger("fastgen")

Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]
State = tuple[Tensor, tuple[torch.device, Tensor] | None]

LADDER = tuple(10 ** (-i / 2) for i in range(10))  # steps of the differences that `check` compares with
APART = (
    0.05  # the part of the derivative by which a route may differ from the best of them, beside that one's own error
)
ROUNDING = 1e-3  # a derivative below this part of the value's size counts as that
FLASH = "jvp_flash_attention.jvp_attention"
MISSING = re.compile(r"forward(-| )mode|forward AD|\bjvp\b|setup_context")  # in what torch says of a missing rule


class JvpConfig(Model):
    """How a derivative is taken.

    route      see the module
    step       h of `finite`, whose error is O(h^2) plus round-off over h
    attention  `math`: written out, in chunks of queries; `jvp_flash`: the package jvp_flash_attention, CUDA only
    """

    route: Literal["two_pass", "single_pass", "finite"] = "two_pass"
    step: float = Field(default=1e-3, gt=0)
    attention: Literal["math", "jvp_flash"] = "math"

    @model_validator(mode="after")
    def _used(self) -> JvpConfig:
        if self.route == "finite" and self.attention != "math":
            raise ValueError(
                f"attention={self.attention} is for forward-mode routes; route=finite needs no such kernel"
            )
        return self


def value_and_tangent(fn: Function, primals: Tensors, tangents: Tensors, config: JvpConfig) -> tuple[Tensor, Tensor]:
    """fn(*primals) with its gradient, and its derivative along `tangents` without one, both [B, ...].

    Each primal is floating point and has a tangent of its shape; conditions are closed over. Dropout draws the same
    masks in every evaluation of one call. A UserError where an operation has no forward-mode rule; a RunFailed that
    names the module where the derivative is not finite.
    """
    if primals[0].device.type == "meta":
        raise UserError("a derivative along the path cannot be planned, only run: its memory is not known beforehand")
    state, single = _random_state(primals[0].device), config.route == "single_pass"
    with torch.set_grad_enabled(single and torch.is_grad_enabled()):
        value, tangent = _derivative(fn, primals, tangents, config, state)
    if not single:
        _restore(state)
        value = fn(*primals)
    return value, tangent.detach()


def check(fn: Function, primals: Tensors, tangents: Tensors, config: JvpConfig, student: nn.Module) -> None:
    """Try the route on a few rows before the first step; log in one line what is used, and how far it is from the best
    central difference in float32. A UserError where the student cannot be differentiated so, or where the two differ.
    """
    _refuse(config, student)
    state, rules = _random_state(primals[0].device), _rules(config, primals[0].device)
    with torch.set_grad_enabled(config.route == "single_pass"):
        _, tangent = _derivative(fn, primals, tangents, config, state, rules)
    with torch.no_grad():
        step, difference, doubt, size = _best_difference(fn, *_wide(primals, tangents), state)
        apart = float((tangent - difference).norm() / size)
    _restore(state)
    used = f"{config.route}{_kernels(rules)}, float32"
    told = f"{apart:.1e} of its size from a central difference (step {step:.0e}, itself good to {doubt:.1e})"
    logger.info("derivative along the path: %s; %s", used, told)
    if not apart <= APART + 3 * doubt:
        mend = "an operation of the network drops or mistakes it; set method.jvp.route=finite"
        if config.route == "finite":
            mend = f"its step {config.step:g} is too long or too short; set method.jvp.step near {step:.0e}"
        raise UserError(
            f"method.jvp.route={config.route}: the derivative is {apart:.0%} of its size away from the best central "
            f"difference (itself good to {doubt:.0%}): {mend}"
        )


def _wide(primals: Tensors, tangents: Tensors) -> tuple[Tensors, Tensors]:
    """Both in float32 at least."""
    points = tuple(wide(p) for p in primals)
    return points, tuple(v.detach().to(p.dtype) for p, v in zip(points, tangents, strict=True))


def _derivative(
    fn: Function, primals: Tensors, tangents: Tensors, config: JvpConfig, state: State, rules: Rules | None = None
) -> tuple[Tensor, Tensor]:
    """A value (not that of `finite`, which has none) and the derivative; a RunFailed where that is not finite."""
    points, along = _wide(primals, tangents)
    rules = rules or _rules(config, points[0].device)

    def run() -> tuple[Tensor, Tensor]:
        _restore(state)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(points[0].device.type, enabled=False):
            if rules is None:
                difference = _central(fn, points, along, config.step, state)
                return difference, difference
            return _forward_mode(fn, points, along, rules)

    with _explained(config):
        value, tangent = run()
        if not torch.isfinite(tangent).all():
            raise RunFailed(f"the derivative along the path is not finite{_first_bad(run)}; lower loop.optim.lr")
    return value, tangent


def _forward_mode(fn: Function, points: Tensors, along: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    # Dual numbers rather than torch.func.jvp: less work per operation, and the rules see plain tensors.
    with forward_ad.dual_level(), rules:
        duals = (forward_ad.make_dual(p, v) for p, v in zip(points, along, strict=True))
        value, tangent = forward_ad.unpack_dual(fn(*duals))
    return value, torch.zeros_like(value) if tangent is None else tangent


def _central(fn: Function, points: Tensors, along: Tensors, h: float, state: State) -> Tensor:
    def at(h: float) -> Tensor:
        _restore(state)
        return fn(*(p + h * v for p, v in zip(points, along, strict=True)))

    return (at(h) - at(-h)) / (2 * h)


def _best_difference(
    fn: Function, points: Tensors, along: Tensors, state: State
) -> tuple[float, Tensor, float, Tensor]:
    """A step; the central difference by it; the part of its size by which that by a step 3.2 times as long differs from
    it: those two neighbours on `LADDER` that differ least; and its size, not less than float32 can tell."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(points[0].device.type, enabled=False):
        found = [_central(fn, points, along, h, state) for h in LADDER]
        _restore(state)
        least = (ROUNDING * fn(*points).norm()).clamp_min(ROUNDING)
    sizes = [difference.norm().maximum(least) for difference in found]
    doubts = [float((b - a).norm() / size) for (a, b), size in zip(itertools.pairwise(found), sizes[1:], strict=True)]
    finite = [i for i, doubt in enumerate(doubts) if math.isfinite(doubt)]
    if not finite:
        raise RunFailed("the network's values beside the first rows are not finite; see whether its weights are")
    best = min(finite, key=lambda i: doubts[i])
    return LADDER[best + 1], found[best + 1], doubts[best], sizes[best + 1]


def _rules(config: JvpConfig, device: torch.device) -> Rules | None:
    """None for `finite`, which differentiates nothing."""
    if config.route == "finite":
        return None
    if config.attention == "math":
        return Rules()
    if device.type != "cuda":
        raise UserError(
            f"method.jvp.attention=jvp_flash: its kernels run on CUDA, not on {device.type}; use attention=math"
        )
    return Rules(require(FLASH, extra="jvp", purpose="method.jvp.attention=jvp_flash").JVPAttn.fwd_dual)


def _kernels(rules: Rules | None) -> str:
    """What attention went through, for the log; a UserError if a kernel that was asked for never fitted."""
    if rules is None or rules.kernel is None:
        return ", attention math"
    if not rules.fused:
        raise UserError(
            "method.jvp.attention=jvp_flash: no attention of this network fits it (self-attention without a mask, "
            "heads of 16, 32, 64, 128 or 256, tokens a multiple of 32); use attention=math"
        )
    return f", attention jvp_flash in {rules.fused} of {rules.fused + rules.written} calls"


def _refuse(config: JvpConfig, student: nn.Module) -> None:
    """What a student rules out: weights in half precision, and recomputation where one pass does both."""
    halves = {p.dtype for p in student.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if halves:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        raise UserError(
            f"weights in {names}: the derivative of the network would drown in it; set teacher_precision=fp32"
        )
    if config.route == "single_pass" and any(getattr(m, "gradient_checkpointing", False) for m in student.modules()):
        raise UserError(
            "method.jvp.route=single_pass keeps the graph that student.gradient_checkpointing drops; use route=two_pass"
        )


@contextmanager
def _explained(config: JvpConfig) -> Iterator[None]:
    """Turn torch's word for a missing forward-mode rule into one line with the cause and the remedy."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not MISSING.search(str(error)):
            raise
        cause = str(error).split(" that does not support it")[0].split("\n")[0].rstrip(".")
        raise UserError(
            f"method.jvp.route={config.route}: an operation of the network has no forward-mode rule ({cause}); take "
            "fused attention (xformers, flash) off the network, or set method.jvp.route=finite"
        ) from error


def _first_bad(run: Callable[[], Any]) -> str:
    """Run again and name the first module whose output, or its derivative, is not finite."""
    names: dict[nn.Module, str] = {}
    found: list[str] = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        if module not in names:  # the outermost one comes first, and knows the names of all within
            names.update({part: name for name, part in module.named_modules()})

    def leave(module: nn.Module, _inputs: Any, out: Any) -> None:
        pairs = [split(t) for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        if not found and any(not torch.isfinite(t).all() for pair in pairs for t in pair if t is not None):
            value = "" if all(torch.isfinite(value).all() for value, _ in pairs) else ", as is its value"
            found.append(f": first so in {names[module] or 'the network'} ({type(module).__name__}){value}")

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ", though every module's output is: see the path's times"


def _random_state(device: torch.device) -> State:
    """What dropout draws from: torch's generator, and the device's own with its number."""
    cuda = (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
    return torch.random.get_rng_state(), cuda


def _restore(state: State) -> None:
    torch.random.set_rng_state(state[0])
    if state[1] is not None:
        device, cuda = state[1]
        torch.cuda.set_rng_state(cuda, device)
