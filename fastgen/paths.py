"""Paths between data and noise, and every way a network can state the same posterior.

A path is x_t = alpha(t) x0 + sigma(t) eps. Whatever a network predicts is a linear form of the pair (x0, eps), so all
families meet in `Pair`, and two paths meet where alpha / sigma agree. Times and levels are float32 or float64.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastgen.layout import expand


@dataclass(frozen=True, kw_only=True)
class Path:
    """x_t = alpha(t) x0 + sigma(t) eps for t from `end` (clean, or nearly) to `start` (noise, or nearly)."""

    start: ClassVar[float] = 1.0
    end: ClassVar[float] = 0.0
    # What a run's first state is, over unit noise: sigma(start), or hypot(alpha, sigma) where alpha never reaches 0.
    init: ClassVar[Literal["sigma", "unit"]] = "sigma"

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t, shaped as t; differentiable."""
        raise NotImplementedError

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time whose alpha : sigma is the given one, clamped to [end, start]; scale-free and differentiable."""
        raise NotImplementedError

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for x0, eps [B, ...] and t [B]."""
        return Pair(x0, eps).at(*self.levels(t))

    def grid(self, n: int) -> tuple[float, ...]:
        """n evaluation times from `start` downwards, evenly spaced; the step after the last ends on clean data."""
        return tuple(self.start + (self.end - self.start) * i / n for i in range(n))


def shift_time(t: Tensor | float, k: float) -> Any:
    """Rectified-flow time shifted by k (SD3: 3), k t / (1 + (k - 1) t): sigma / alpha grows k-fold; 1 / k undoes it."""
    return k * t / (1 + (k - 1) * t)


def _ratio(sigma: Tensor, alpha: Tensor, low: float, high: float) -> Tensor:
    """sigma / alpha clamped to [low, high]; alpha may be 0, where a bare division would make the gradient NaN."""
    return (sigma / alpha.maximum(sigma.detach() / (2 * high))).clamp(low, high)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Path):
    """alpha = 1 - t, sigma = m + (1 - m) t with t = 1 noise (2209.03003 run backwards; m = 1e-5 for TRELLIS)."""

    sigma_min: float = 0.0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.sigma_min + (1 - self.sigma_min) * t

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        m = self.sigma_min
        return ((sigma - m * alpha) / (sigma + (1 - m) * alpha)).clamp(self.end, self.start)


@dataclass(frozen=True, kw_only=True)
class TrigFlow(Path):
    """alpha = cos t, sigma = sd sin t, t in [0, pi / 2] (2410.11081, section 3; eps has unit variance, z = sd eps)."""

    sd: float = 1.0
    start: ClassVar[float] = math.pi / 2

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Not cos(t), which in float32 is -4e-8 at the start: alpha is exactly 0 there.
        return (self.start - t).sin(), self.sd * t.sin()

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(sigma, self.sd * alpha).clamp(self.end, self.start)


@dataclass(frozen=True, kw_only=True)
class EDM(Path):
    """alpha = 1, sigma = t: variance exploding, time is the noise level (2206.00364)."""

    start: float = 80.0  # type: ignore[misc]
    end: float = 0.002  # type: ignore[misc]
    rho: float = 7.0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _ratio(sigma, alpha, self.end, self.start)

    def grid(self, n: int) -> tuple[float, ...]:
        """Equation 5 of 2206.00364: n levels, even in sigma^(1 / rho)."""
        high, low = self.start ** (1 / self.rho), self.end ** (1 / self.rho)
        levels = ((high + (low - high) * i / max(n - 1, 1)) ** self.rho for i in range(n))
        return tuple(min(max(level, self.end), self.start) for level in levels)


@dataclass(frozen=True, kw_only=True)
class VP(Path):
    """Variance preserving, over a table of n betas; t is the table's index and may be fractional.

    Between indices ln(sigma / alpha) is linear (the k-diffusion rule), so that t can be differentiated. Zero terminal
    SNR (2305.08891, algorithm 1) rescales the table so that alpha[n - 1] is exactly 0.
    """

    init: ClassVar[Literal["sigma", "unit"]] = "unit"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    n: int = 1000
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in (known := ("linear", "scaled_linear", "squaredcos_cap_v2")):
            raise ValueError(f"unknown beta schedule {self.schedule!r}; known: {', '.join(known)}")
        if self.n < 2:
            raise ValueError(f"a table of n={self.n} betas is no path; n >= 2")

    @property
    def start(self) -> float:  # type: ignore[override]
        return float(self.n - 1)

    def table(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the integer indices, float64 [n]."""
        alpha, sigma, _ = (torch.tensor(row) for row in _vp_table(self))
        return alpha, sigma

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        logs = _vp_logs(self, t)
        low = t.detach().floor().clamp(0, self.n - 2).long()
        ratio = torch.lerp(logs[low], logs[low + 1], t - low).exp()
        alpha = (1 + ratio * ratio).rsqrt()
        sigma = ratio * alpha
        if not self.zero_snr:
            return alpha, sigma
        # The logarithms end on a floor; the last level itself is exact, with the derivative of the interval before it.
        last = t.detach() >= self.n - 1
        return alpha - torch.where(last, alpha, 0).detach(), sigma + torch.where(last, 1 - sigma, 0).detach()

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        logs = _vp_logs(self, alpha)
        first, last = _vp_table(self)[2, [0, -1]]
        log = _ratio(sigma, alpha, math.exp(first), math.exp(last)).log()
        low = (torch.searchsorted(logs, log.detach().contiguous(), right=True) - 1).clamp(0, self.n - 2)
        return (low + (log - logs[low]) / (logs[low + 1] - logs[low])).clamp(self.end, self.start)

    def grid(self, n: int) -> tuple[float, ...]:
        """diffusers' "trailing" spacing: n - 1 first, steps of n / steps, rounded to whole indices."""
        return tuple(float(round(self.n - i * self.n / n) - 1) for i in range(n))


@functools.lru_cache(maxsize=32)
def _vp_table(path: VP) -> np.ndarray:
    """Rows alpha, sigma, ln(sigma / alpha), float64 [3, n]; in numpy, out of reach of torch's modes and devices."""
    if path.schedule == "scaled_linear":
        betas = np.linspace(path.beta_start**0.5, path.beta_end**0.5, path.n) ** 2
    elif path.schedule == "linear":
        betas = np.linspace(path.beta_start, path.beta_end, path.n)
    else:  # 2102.09672, equation 17
        u = np.arange(path.n + 1) / path.n
        bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    alpha = np.sqrt(np.cumprod(1 - betas))
    if path.zero_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    sigma = np.sqrt(1 - alpha * alpha)
    floored = alpha.copy()
    if path.zero_snr:
        floored[-1] = 2.0**-12  # diffusers' floor (2^-24 for the square), used only inside the last interval
    return np.stack([alpha, sigma, np.log(np.sqrt(1 - floored * floored) / floored)])


def _vp_logs(path: VP, like: Tensor) -> Tensor:
    """ln(sigma / alpha) [n], in the dtype and on the device of some times or levels.

    Copied at each call: a kept tensor would carry the mode of its first caller (inference, functorch, fake) to others.
    """
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"times and levels are float32 or float64, not {like.dtype}: anything less moves the index")
    # So few bytes are staged by the CUDA driver at once: the host need not wait for the device.
    logs = torch.from_numpy(_vp_table(path)[2])
    return logs.to(like.device, like.dtype, non_blocking=like.device.type == "cuda")


PATHS: dict[str, type[Path]] = {kind.__name__: kind for kind in (RectifiedFlow, TrigFlow, EDM, VP)}


def path_to_dict(path: Path) -> dict[str, Any]:
    """Plain data for a file: {"name": class, parameter: value, ...}."""
    return {"name": type(path).__name__, **asdict(path)}


def path_from_dict(data: dict[str, Any]) -> Path:
    """The inverse of `path_to_dict`; unknown names and parameters raise ValueError."""
    parameters = dict(data)
    name = parameters.pop("name", None)
    if name not in PATHS:
        raise ValueError(f"unknown path {name!r}; known: {', '.join(PATHS)}")
    try:
        return PATHS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"path {name}: {error}") from error


@dataclass(frozen=True)
class Pair:
    """What a network believes of x: its clean part x0 and its unit noise eps, both [B, ...]."""

    x0: Tensor
    eps: Tensor

    @property
    def velocity(self) -> Tensor:
        """d x / d t on the rectified-flow path with t = 1 noise: eps - x0."""
        return self.eps - self.x0

    def lerp(self, other: Pair, w: float | Tensor) -> Pair:
        """self + w (other - self). Guidance is `unconditional.lerp(conditional, w)`: linear in every target."""
        w = expand(w, self.x0) if isinstance(w, Tensor) else w
        return Pair(self.x0 + w * (other.x0 - self.x0), self.eps + w * (other.eps - self.eps))

    def at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha x0 + sigma eps for levels [B] (or scalars). From one level to another this is a first-order step:
        Euler on a rectified flow, DDIM (2010.02502, equation 12 with eta = 0) on VP."""
        return expand(alpha, self.x0) * self.x0 + expand(sigma, self.x0) * self.eps


def carry(x: Tensor, t: Tensor, here: Path, there: Path) -> tuple[Tensor, Tensor]:
    """The same noisy sample on another path: (x', t'). The ratio of norms never divides by alpha.

    Levels beyond the end of `there` are clamped, and then x' is only near its marginal: `Denoiser` mends the pair.
    """
    alpha, sigma = here.levels(t)
    t_there = there.time(alpha, sigma)
    ratio = torch.hypot(*there.levels(t_there)) / torch.hypot(alpha, sigma)
    return x * expand(ratio, x).to(x.dtype), t_there


Kind = Literal["eps", "x0", "v", "flow", "trig", "edm", "cm"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network's output y means: y = a1 x0 + q1 eps, with (a1, q1) depending on the level (alpha, sigma).

    kind  y                                   paths                      ill-conditioned
    eps   eps                                 VP, never with zero SNR    alpha -> 0
    x0    x0                                  any                        sigma -> 0
    v     alpha eps - sigma x0                VP (2202.00512)            nowhere
    flow  (1 - sigma_min) eps - x0            rectified flow             nowhere
    trig  cos(t) eps - sin(t) x0 / sd         TrigFlow of the same sd    nowhere
    edm   raw output of EDM's preconditioner  EDM (2206.00364, table 1)  nowhere
    cm    the same, but x0 = x at sigma_min   EDM (2303.01469, app. C)   sigma -> sigma_min
    """

    kind: Kind
    sd: float = 0.5
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown prediction kind {self.kind!r}; known: {', '.join(get_args(Kind))}")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a1, q1), shaped as the levels."""
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        match self.kind:
            case "eps":
                return zero, one
            case "x0":
                return one, zero
            case "v":
                return -sigma, alpha
            case "flow":
                return -one, (1 - self.sigma_min) * one
            case "trig":
                return -sigma / self.sd**2, alpha
            case "edm":
                norm = torch.hypot(sigma, self.sd * one)
                return sigma / (self.sd * norm), -self.sd / norm
            case "cm":
                skip, out = self._boundary(sigma)
                return (1 - skip) / out, -skip * sigma / out

    def _boundary(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out of a consistency model, x0 = c_skip x + c_out y: 1 and 0 at sigma_min."""
        above = sigma - self.sigma_min
        return self.sd**2 / (above**2 + self.sd**2), self.sd * above / torch.hypot(
            sigma, self.sd * torch.ones_like(sigma)
        )

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """What x is multiplied by before it enters the network: EDM's c_in, else nothing."""
        return 1 / torch.hypot(sigma, self.sd * torch.ones_like(sigma)) if self.kind in ("edm", "cm") else None

    def to_pair(self, y: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Pair:
        """Solve y = a1 x0 + q1 eps, x = alpha x0 + sigma eps for the pair; y, x [B, ...], levels [B]."""
        if self.kind == "cm":  # whose coefficients are infinite at sigma_min, where x0 = x
            skip, out = (expand(c, x) for c in self._boundary(sigma))
            x0 = skip * x + out * y
            return Pair(x0, (x - x0) / expand(sigma, x))
        a1, q1 = self.coefficients(alpha, sigma)
        w = alpha * q1 - a1 * sigma
        xs = [expand(c / w, x) for c in (q1, sigma, alpha, a1)]
        return Pair(xs[0] * x - xs[1] * y, xs[2] * y - xs[3] * x)

    def from_pair(self, pair: Pair, alpha: Tensor, sigma: Tensor) -> Tensor:
        """y = a1 x0 + q1 eps."""
        return pair.at(*self.coefficients(alpha, sigma))
