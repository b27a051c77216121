"""Images to feature vectors: the spaces in which distributions of images are compared.

A Frechet distance is named after its space, "FD-<extractor>", and carries the hash of the space's weights: numbers of
two hashes must not be compared. None of these is the Inception network of 2015, so none of the numbers is the score
that papers print.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fastgen import noise
from fastgen.data import DataSet
from fastgen.data.digits import Digits
from fastgen.errors import UserError, suggestion
from fastgen.eval.classifier import FEATURES, WEIGHTS, ConvNet, load_classifier, train_classifier
from fastgen.eval.inception import InceptionExtractor

NAMES = ("pooled-pixels", "random-conv", "classifier", "inception")
BATCH = 250


@runtime_checkable
class Extractor(Protocol):
    """Images float32 [N, C, H, W] in [-1, 1] to features float32 [N, dim], row by row, on the images' device."""

    name: str
    dim: int
    channels: int
    sha256: str
    input_spec: str

    def __call__(self, images: Tensor) -> Tensor: ...


def _batched(net: nn.Module, images: Tensor, channels: int, width: int) -> Tensor:
    """Rows of net(images) without gradients, 250 at a time; values beyond [-1, 1] clamped, as a saved picture's are."""
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(f"images must be float [N, {channels}, H, W], got {images.dtype} {list(images.shape)}")
    net.to(images.device)
    # Made outside inference mode: an inference tensor could not be used in anybody's later in-place arithmetic.
    rows = torch.empty(len(images), width, device=images.device)
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            rows[start : start + BATCH] = net(images[start : start + BATCH].float().clamp(-1, 1))
    return rows


def weights_sha256(net: nn.Module) -> str:
    """What sha256sum would say of the network's weights saved as a safetensors file without metadata."""
    return hashlib.sha256(save({k: v.cpu().contiguous() for k, v in net.state_dict().items()})).hexdigest()


class PooledPixels:
    """Pixels averaged down to at most 8 x 8 and flattened: nothing learned, blind to what the mean and covariance of
    pixels do not show (it takes one Gaussian for the data)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.channels, height, width = shape
        self.size = (min(8, height), min(8, width))
        self.dim = self.channels * self.size[0] * self.size[1]
        self.name = "pooled-pixels"
        self.input_spec = f"{self.channels} x {height} x {width}, clamped to [-1, 1]"
        # There are no weights: the recipe itself is what has to be equal.
        self.sha256 = hashlib.sha256(f"adaptive average to {self.channels} x {self.size}".encode()).hexdigest()
        self._net = nn.Sequential(nn.AdaptiveAvgPool2d(self.size), nn.Flatten())

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, dim]."""
        return _batched(self._net, images, self.channels, self.dim)


class _RandomConvNet(nn.Module):
    """Three 3x3 convolutions with orthogonal filters, then mean and maximum of positions: [N, C, H, W] -> [N, 256]."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128)
        self.convs = nn.ModuleList()
        for i in range(3):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            conv.weight.data = _orthogonal(seed, i, conv.weight.shape)
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def _orthogonal(seed: int, layer: int, shape: torch.Size) -> Tensor:
    """Orthonormal rows (or columns, if rows are more) times the ReLU gain sqrt 2, the same bits on every machine.

    QR in float64 on counter-based noise, signs fixed, then a grid of 2^-12: round-off differs between machines' LAPACK,
    and one different bit would be another hash.
    """
    out, fan_in = shape[0], shape[1:].numel()
    flat = noise.normal(seed, f"random-conv {layer}", torch.arange(out), (fan_in,)).double()
    q, r = torch.linalg.qr(flat if out >= fan_in else flat.T)
    q = q * r.diagonal().sign()
    q = (q if out >= fan_in else q.T) * 2**0.5
    return (q * 4096).round().div(4096).float().reshape(shape)


class RandomConv:
    """An untrained convolutional network with a fixed seed: needs no labels, and still grows under blur, noise and
    dropped classes."""

    dim = 256
    name = "random-conv"

    def __init__(self, channels: int, seed: int = 0) -> None:
        self.channels = channels
        self.input_spec = f"{channels} channels, clamped to [-1, 1]"
        self._net = _RandomConvNet(channels, seed).eval().requires_grad_(False)
        self.sha256 = weights_sha256(self._net)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, 256]."""
        return _batched(self._net, images, self.channels, self.dim)


class Classifier:
    """The penultimate layer of a small trained classifier, and its verdicts."""

    dim = FEATURES

    def __init__(self, net: ConvNet, name: str, sha256: str | None = None) -> None:
        self.net = net.eval().requires_grad_(False)
        self.name = name
        self.channels, self.num_classes = net.conv1.in_channels, net.head.out_features
        self.input_spec = f"{self.channels} channels, sides of 8 to 64, clamped to [-1, 1]"
        self.sha256 = sha256 or weights_sha256(net)

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Classifier:
        """From a safetensors file; the hash is the file's, as sha256sum prints it."""
        net = load_classifier(path)
        return cls(net, name or Path(path).stem, hashlib.sha256(Path(path).read_bytes()).hexdigest())

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, 128]."""
        return _batched(_Features(self.net), images, self.channels, self.dim)

    def classify(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> class probabilities [N, num_classes]; argmax(1) are the labels."""
        return _batched(self.net, images, self.channels, self.num_classes).softmax(1)


class _Features(nn.Module):
    """A classifier without its head."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.features(x)


def load_extractor(name: str, data: DataSet, steps: int = 1000) -> Extractor:
    """The extractor of that name for a data set's images.

    name: "pooled-pixels", "random-conv", "classifier" (for digits the shipped weights, for any other labelled data set
    one trained here and now, seed 0, `steps` steps, a minute or two), "inception" (from a local file, resize "tf"), or
    the path of a classifier's .safetensors file.
    """
    if name == "pooled-pixels":
        return PooledPixels(data.shape)
    if name == "random-conv":
        return RandomConv(data.shape[0])
    if name == "classifier":
        if isinstance(data, Digits):  # by type: the held-out part of a user's folder may be called digits/... too
            return Classifier.load(WEIGHTS)
        return Classifier(train_classifier(data, steps=steps), f"{data.name.split('/')[0]}-classifier")
    if name == "inception":
        return InceptionExtractor.load(channels=data.shape[0])
    if name.endswith(".safetensors"):
        return Classifier.load(name)
    raise UserError(f"unknown extractor '{name}'; {suggestion(name, NAMES)}")
