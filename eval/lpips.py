"""LPIPS, the learned perceptual distance of Zhang et al. (CVPR 2018, 1801.03924), version 0.1, from local weight files.

    d(a, b) = sum_l mean_hw w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2

f_l are activations of a frozen AlexNet or VGG-16, w_l >= 0 the published linear heads. The modules carry torchvision's
and the lpips package's key names, so that their public files load as they are; neither package is needed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgen.errors import UserError, suggestion
from fastgen.files import load_pickled, load_tensors

Layers = tuple[int | tuple[int, int, int, int], ...]

# (channels, kernel, stride, padding) of a convolution, each followed by a ReLU; an integer is a max pooling of that
# kernel with stride 2. Cut after the last activation that LPIPS reads.
ALEX: Layers = ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
VGG: Layers = (
    *[(64, 3, 1, 1)] * 2,
    2,
    *[(128, 3, 1, 1)] * 2,
    2,
    *[(256, 3, 1, 1)] * 3,
    2,
    *[(512, 3, 1, 1)] * 3,
    2,
    *[(512, 3, 1, 1)] * 3,
)


class _Net(NamedTuple):
    layers: Layers
    reads: tuple[int, ...]  # indices in torchvision's `features` of the activations that are compared
    widths: tuple[int, ...]  # and their channels
    least_side: int  # of an image that reaches the last of them


NETS = {
    "alex": _Net(ALEX, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "vgg": _Net(VGG, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
}
SOURCES = {
    ("alex", "trunk"): "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ("vgg", "trunk"): "https://download.pytorch.org/models/vgg16-397923af.pth",
    ("alex", "heads"): "https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1/alex.pth)",
    ("vgg", "heads"): "https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1/vgg.pth)",
}
# ImageNet's mean and deviation for [0, 1], moved to inputs in [-1, 1] and rounded as the lpips package has them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of image batches: (a, b) -> [N], both float [N, 3, H, W] in [-1, 1], sides >= 31 (alex) or 16 (vgg).

    Gradients reach the inputs; the weights are frozen and stay so in `train()`. trunk: the torchvision checkpoint;
    heads: the lpips package's file of that net; each .safetensors, or .pth read with weights_only. `trunk_sha256` and
    `heads_sha256` are the files' hashes, as sha256sum prints them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, trunk: str | Path, heads: str | Path) -> None:
        super().__init__()
        if net not in NETS:
            raise UserError(f"lpips.net={net}: no such net; {suggestion(net, NETS)}")
        layers, self.reads, widths, self.least_side = NETS[net]
        self.features = _trunk(layers)
        for i, width in enumerate(widths):
            self.add_module(f"lin{i}", _Head(width))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.trunk_sha256 = self._load(Path(trunk), net, "trunk", "features.")
        self.heads_sha256 = self._load(Path(heads), net, "heads", "lin")
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N]: >= 0, and 0 for equal images."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[-2:]) < self.least_side:
            raise ValueError(
                f"images must be two [N, 3, H, W] with sides of at least {self.least_side}, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        total = a.new_zeros(len(a))
        for i, (x, y) in enumerate(zip(self.activations(a), self.activations(b), strict=True)):
            head = self.get_submodule(f"lin{i}")
            total = total + head((_unit(x) - _unit(y)).square()).mean((1, 2, 3))
        return total

    def activations(self, x: Tensor) -> list[Tensor]:
        """The five activations [N, C_l, H_l, W_l] of images [N, 3, H, W] in [-1, 1]."""
        found, x = [], (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.reads:
                found.append(x)
        return found

    def train(self, mode: bool = True) -> LPIPS:
        """A measure has no training mode: a trainer that switches its modules must not switch this one."""
        return super().train(False)

    def _load(self, path: Path, net: str, part: str, prefix: str) -> str:
        """Fill the parameters that begin with `prefix` from a file; exactly those keys and shapes must be in it."""
        if not path.is_file():
            raise UserError(f"lpips.{part}={path}: no such file; it is {SOURCES[net, part]}")
        mend = f"the right file is {SOURCES[net, part]}"
        found = load_tensors(path) if path.suffix == ".safetensors" else load_pickled(path, mend=mend)
        # Torchvision's file also holds what comes after the convolutions.
        found = {k: v for k, v in found.items() if part == "heads" or not k.startswith("classifier.")}
        wanted = {k: v for k, v in self.state_dict().items() if k.startswith(prefix)}
        wrong = sorted(found.keys() ^ wanted.keys())
        wrong += sorted(k for k in found.keys() & wanted.keys() if found[k].shape != wanted[k].shape)
        if wrong:
            names = ", ".join(wrong[:3])
            raise UserError(
                f"lpips.{part}={path}: not the {part} of lpips.net={net}: {len(wrong)} keys missing, unknown or of "
                f"another shape ({names}); the right file is {SOURCES[net, part]}"
            )
        self.load_state_dict(found, strict=False)
        return _sha256(path)


def _sha256(path: Path) -> str:
    """In blocks: the public VGG-16 file has 528 MB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _trunk(layers: Layers) -> nn.Sequential:
    modules: list[nn.Module] = []
    width = 3
    for layer in layers:
        if isinstance(layer, int):
            modules.append(nn.MaxPool2d(layer, 2))
        else:
            out, kernel, stride, padding = layer
            modules += [nn.Conv2d(width, out, kernel, stride, padding), nn.ReLU()]
            width = out
    return nn.Sequential(*modules)


class _Head(nn.Module):
    """One linear head: a 1x1 convolution to one channel; the place of the published module's dropout is kept, since
    the key is `model.1.weight`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _unit(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Unit length over channels; where all channels are 0 they stay so."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)
