"""Sparse voxel tensors: a batch of samples of unequal sizes, one row of features per active voxel.

`Voxels` behaves like a dense batch where that has one meaning: elementwise arithmetic, `len` and `shape[0]` are the
number of samples, `fastgen.layout` reduces and expands per sample. To pytrees its features are the only leaf, so that
torch.func transforms and trees of samples need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from fastgen.sparse.sites import Sites


def _method(name: str) -> Callable[..., Any]:
    """A method of Tensor, on features."""
    function = getattr(Tensor, name)

    def method(self: Voxels, *args: Any, **kwargs: Any) -> Any:
        return _elementwise(function, (self, *args), kwargs)

    method.__name__, method.__doc__ = name, f"Tensor.{name} of the features."
    return method


class Voxels:
    """Features [N, C] on the active voxels of a batch of samples.

    coords is int32 [N, 4] = (sample, x, y, z) with the number of samples beside it (empty ones at the end are not seen
    otherwise), or the `Sites` of other voxels. `shape` is (B, C). Arithmetic with numbers, with 0-dimensional, [1, C],
    [N, 1] or [N, C] tensors and with voxels on the same sites; per-sample numbers [B] through `layout.expand`.
    """

    __slots__ = ("feats", "sites")

    def __init__(self, feats: Tensor, coords: Tensor | Sites, batch: int | None = None) -> None:
        if isinstance(coords, Tensor):
            if batch is None:
                raise ValueError("coords alone do not say how many samples there are; give batch")
            coords = Sites(coords, batch)
        if feats.ndim != 2 or len(feats) != len(coords):
            raise ValueError(f"features are [N, C] with N = {len(coords)}, not {list(feats.shape)}")
        self.feats, self.sites = feats, coords

    def with_feats(self, feats: Tensor) -> Voxels:
        """Other features on the same voxels; what is known of the sites is kept."""
        return Voxels(feats, self.sites)

    @property
    def coords(self) -> Tensor:
        return self.sites.coords

    @property
    def batch(self) -> int:
        return self.sites.batch

    @property
    def row_batch(self) -> Tensor:
        """The sample of each row, long [N]."""
        return self.sites.once("row_batch", lambda: self.coords[:, 0].long())

    @property
    def lengths(self) -> Tensor:
        return self.sites.lengths

    @property
    def slices(self) -> tuple[slice, ...]:
        return self.sites.slices

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, self.feats.shape[1]))

    ndim = 2

    @property
    def device(self) -> torch.device:
        return self.feats.device

    @property
    def dtype(self) -> torch.dtype:
        return self.feats.dtype

    @property
    def requires_grad(self) -> bool:
        return self.feats.requires_grad

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the features [N, C]."""
        return self.feats.grad

    def __len__(self) -> int:
        return self.batch

    def __repr__(self) -> str:
        return f"Voxels({len(self.sites)} voxels, batch={self.batch}, channels={self.feats.shape[1]}, {self.dtype})"

    def rows(self, values: Tensor) -> Tensor:
        """Per-sample values [B, ...] on each row of their sample, [N, ...]; the gradient is summed in a fixed order."""
        if len(values) != self.batch:
            raise ValueError(f"{len(values)} per-sample values for {self.batch} samples")
        if self.batch == 1:
            return values.expand(len(self.sites), *values.shape[1:])
        parts = [values[i : i + 1].expand(n, *values.shape[1:]) for i, n in enumerate(self.sites.sizes)]
        return torch.cat(parts) if parts else values

    def parts(self) -> Sequence[Tensor]:
        """The features of each sample, [N_b, C]."""
        return self.feats.split(self.sites.sizes) if self.batch else ()

    @staticmethod
    def cat(samples: Iterable[Voxels]) -> Voxels:
        """Batches after one another as one batch."""
        samples = list(samples)
        if not samples:
            raise ValueError("no voxels to join")
        first = list(accumulate((v.batch for v in samples), initial=0))
        shifts = [
            torch.tensor([[n, 0, 0, 0]], dtype=torch.int32, device=v.coords.device)
            for n, v in zip(first, samples, strict=False)
        ]
        coords = torch.cat([v.coords + shift for v, shift in zip(samples, shifts, strict=True)])
        return Voxels(torch.cat([v.feats for v in samples]), coords, first[-1])

    def split(self) -> list[Voxels]:
        """Each sample as a batch of one."""
        return [self[i] for i in range(self.batch)]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Voxels:
        """Some of the samples, in the order asked for, as a batch (of one for a number)."""
        numbers = range(self.batch)
        if isinstance(index, int):
            picked = [numbers[index]]
        elif isinstance(index, slice):
            picked = list(numbers[index])
        else:
            picked = [numbers[i] for i in torch.as_tensor(index).tolist()]
        slices = self.slices
        samples = []
        for new, old in enumerate(picked):
            coords = self.coords[slices[old]].clone()
            coords[:, 0] = new
            samples.append((self.feats[slices[old]], coords))
        if not samples:
            return Voxels(self.feats[:0], self.coords[:0], 0)
        feats, coords = (torch.cat(column) if len(column) > 1 else column[0] for column in zip(*samples, strict=True))
        return Voxels(feats, coords, len(picked))

    def to(self, *args: Any, **kwargs: Any) -> Voxels:
        """As Tensor.to on the features; the coordinates follow to another device."""
        feats = self.feats.to(*args, **kwargs)
        if feats.device == self.coords.device:
            return self.with_feats(feats)
        return Voxels(feats, self.sites.to(feats.device))

    def type(self, dtype: torch.dtype) -> Voxels:
        return self.to(dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Voxels:
        self.feats.requires_grad_(requires_grad)
        return self

    def is_floating_point(self) -> bool:
        return self.feats.is_floating_point()

    def all(self) -> Tensor:
        """Whether every feature of the batch is true."""
        return self.feats.all()

    def norm(self) -> Tensor:
        """The norm of the whole batch."""
        return self.feats.norm()

    abs, square, sqrt, exp, clamp = (_method(name) for name in ("abs", "square", "sqrt", "exp", "clamp"))
    lerp, where, maximum, minimum = (_method(name) for name in ("lerp", "where", "maximum", "minimum"))
    detach, clone, float, double = (_method(name) for name in ("detach", "clone", "float", "double"))
    isfinite, nan_to_num = _method("isfinite"), _method("nan_to_num")
    __add__, __radd__, __sub__, __rsub__ = (_method(f"__{name}__") for name in ("add", "radd", "sub", "rsub"))
    __mul__, __rmul__ = _method("__mul__"), _method("__rmul__")
    __truediv__, __rtruediv__ = _method("__truediv__"), _method("__rtruediv__")
    __neg__, __pow__ = _method("__neg__"), _method("__pow__")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Elementwise functions of torch act on the features."""
        if func not in _ELEMENTWISE:
            name = getattr(func, "__name__", func)
            raise TypeError(f"torch's {name} has no meaning for Voxels; give it their features, or see fastgen.layout")
        return _elementwise(func, args, kwargs or {})


def _elementwise(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A function of features on the same sites; every tensor it returns is a feature again."""
    leaves = tree_leaves((args, kwargs), is_leaf=_is_voxels)
    first, *others = [leaf for leaf in leaves if isinstance(leaf, Voxels)]
    for other in others:
        if other.sites is not first.sites and other.sites != first.sites:
            raise ValueError(f"voxels on different sites do not combine: {first} and {other}")
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim and (leaf.ndim != 2 or leaf.shape[0] not in (1, len(first.sites))):
            raise ValueError(
                f"{first} combines with tensors [], [1, C], [N, 1] and [N, C], not {list(leaf.shape)}; "
                "layout.expand brings per-sample numbers to rows"
            )

    def bare(leaf: Any) -> Any:
        return leaf.feats if isinstance(leaf, Voxels) else leaf

    args, kwargs = tree_map(bare, (args, kwargs), is_leaf=_is_voxels)
    return tree_map(lambda made: first.with_feats(made) if isinstance(made, Tensor) else made, func(*args, **kwargs))


def _is_voxels(leaf: Any) -> bool:
    return isinstance(leaf, Voxels)


METHODS: tuple[str, ...] = ("clone", "contiguous", "detach", "double", "float", "isfinite", "nan_to_num")
METHODS += ("abs", "clamp", "cos", "exp", "log", "neg", "pow", "sin", "sqrt", "square", "tanh")
METHODS += ("add", "div", "lerp", "maximum", "minimum", "mul", "sub")
OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow")
FUNCTIONS = ("where", "zeros_like", "ones_like", "empty_like", "full_like", "randn_like")

_ELEMENTWISE = {
    *(getattr(torch, name) for name in (*METHODS, *FUNCTIONS) if hasattr(torch, name)),
    *(getattr(Tensor, name) for name in (*METHODS, *(f"__{name}__" for name in OPERATORS))),
    torch._VF._make_dual,
    torch._VF._unpack_dual,
}


def _rebuild(children: Iterable[Any], sites: Sites) -> Voxels:
    # Without the checks: transforms put placeholders in the place of tensors.
    made = object.__new__(Voxels)
    (made.feats,), made.sites = children, sites
    return made


register_pytree_node(Voxels, lambda v: ([v.feats], v.sites), _rebuild, serialized_type_name="fastgen.Voxels")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision that torch.autocast, where it is on, gives to matrix products."""
    if has_torch_function(tensors):  # a mode that plans memory casts in its own way
        return handle_torch_function(autocast, tensors, *tensors)
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(device)) for t in tensors)


def as_they_are(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of `like`, which the meta device does not know anyway."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
