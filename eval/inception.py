"""Inception-v3 of December 2015 (Szegedy et al., 1512.00567), the network that FID and IS are defined by.

It differs from torchvision's network of that name: 1008 outputs, average pools that leave the padding out, and a max
pool in the last block. Names and shapes are those of the public weights, so that file loads as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import UserError, suggestion
from fastgen.eval.resize import RECIPES, RESIZERS, centre_squares, recipe_name
from fastgen.files import load_pickled, load_tensors, sha256
from fastgen.images import to_uint8

SIZE = 299
FEATURES = 2048
FILE = "weights-inception-2015-12-05-6726825d.pth"
# The same bytes under the name that pytorch-fid gives them.
NAMES = (FILE, "pt_inception-2015-12-05-6726825d.pth")
SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + FILE
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FOLDER = "FASTGEN_WEIGHTS_DIR"
BATCH = 32  # 150 MB of activations an image at the widest place, in float32


class Conv(nn.Module):
    """Convolution without bias, batch normalisation with the graph's epsilon, ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else 0
        self.conv = nn.Conv2d(width, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined along channels: each a chain of convolutions by name, and one pool at the end.

    pool: "avg" and "max" keep the size (stride 1), "shrink" is the max pool of stride 2 without a convolution behind.
    forks: the last two names of such a chain both read what comes before them (the 1x3 and the 3x1 of block E).
    """

    def __init__(self, convs: dict[str, Conv], chains: list[list[str]], pool: str, forks: bool = False) -> None:
        super().__init__()
        for name, conv in convs.items():
            self.add_module(name, conv)
        self.chains, self.pool, self.forks = chains, pool, forks

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            forked = self.forks and len(chain) > 1
            y = x
            for name in chain[:-2] if forked else chain:
                y = self.get_submodule(name)(y)
            out += [self.get_submodule(name)(y) for name in chain[-2:]] if forked else [y]
        if self.pool == "shrink":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.pool == "avg" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*out, self.get_submodule("branch_pool")(y)], 1)


def _mixed_a(width: int, pooled: int) -> Mixed:
    convs = {
        "branch1x1": Conv(width, 64, 1),
        "branch5x5_1": Conv(width, 48, 1),
        "branch5x5_2": Conv(48, 64, 5),
        "branch3x3dbl_1": Conv(width, 64, 1),
        "branch3x3dbl_2": Conv(64, 96, 3),
        "branch3x3dbl_3": Conv(96, 96, 3),
        "branch_pool": Conv(width, pooled, 1),
    }
    return Mixed(convs, [["branch1x1"], _chain("branch5x5", 2), _chain("branch3x3dbl", 3)], "avg")


def _mixed_b(width: int) -> Mixed:
    convs = {
        "branch3x3": Conv(width, 384, 3, 2, same=False),
        "branch3x3dbl_1": Conv(width, 64, 1),
        "branch3x3dbl_2": Conv(64, 96, 3),
        "branch3x3dbl_3": Conv(96, 96, 3, 2, same=False),
    }
    return Mixed(convs, [["branch3x3"], _chain("branch3x3dbl", 3)], "shrink")


def _mixed_c(width: int, inner: int) -> Mixed:
    flat, tall = (1, 7), (7, 1)
    convs = {
        "branch1x1": Conv(width, 192, 1),
        "branch7x7_1": Conv(width, inner, 1),
        "branch7x7_2": Conv(inner, inner, flat),
        "branch7x7_3": Conv(inner, 192, tall),
        "branch7x7dbl_1": Conv(width, inner, 1),
        "branch7x7dbl_2": Conv(inner, inner, tall),
        "branch7x7dbl_3": Conv(inner, inner, flat),
        "branch7x7dbl_4": Conv(inner, inner, tall),
        "branch7x7dbl_5": Conv(inner, 192, flat),
        "branch_pool": Conv(width, 192, 1),
    }
    return Mixed(convs, [["branch1x1"], _chain("branch7x7", 3), _chain("branch7x7dbl", 5)], "avg")


def _mixed_d(width: int) -> Mixed:
    convs = {
        "branch3x3_1": Conv(width, 192, 1),
        "branch3x3_2": Conv(192, 320, 3, 2, same=False),
        "branch7x7x3_1": Conv(width, 192, 1),
        "branch7x7x3_2": Conv(192, 192, (1, 7)),
        "branch7x7x3_3": Conv(192, 192, (7, 1)),
        "branch7x7x3_4": Conv(192, 192, 3, 2, same=False),
    }
    return Mixed(convs, [_chain("branch3x3", 2), _chain("branch7x7x3", 4)], "shrink")


def _mixed_e(width: int, pool: str) -> Mixed:
    convs = {
        "branch1x1": Conv(width, 320, 1),
        "branch3x3_1": Conv(width, 384, 1),
        "branch3x3_2a": Conv(384, 384, (1, 3)),
        "branch3x3_2b": Conv(384, 384, (3, 1)),
        "branch3x3dbl_1": Conv(width, 448, 1),
        "branch3x3dbl_2": Conv(448, 384, 3),
        "branch3x3dbl_3a": Conv(384, 384, (1, 3)),
        "branch3x3dbl_3b": Conv(384, 384, (3, 1)),
        "branch_pool": Conv(width, 192, 1),
    }
    chains = [
        ["branch1x1"],
        ["branch3x3_1", "branch3x3_2a", "branch3x3_2b"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b"],
    ]
    return Mixed(convs, chains, pool, forks=True)


def _chain(name: str, length: int) -> list[str]:
    return [f"{name}_{i + 1}" for i in range(length)]


class Inception(nn.Module):
    """Images float [N, 3, 299, 299] in 0 .. 255 -> features [N, 2048] (the graph's pool3)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b = _mixed_a(192, 32)
        self.Mixed_5c = _mixed_a(256, 64)
        self.Mixed_5d = _mixed_a(288, 64)
        self.Mixed_6a = _mixed_b(288)
        self.Mixed_6b = _mixed_c(768, 128)
        self.Mixed_6c = _mixed_c(768, 160)
        self.Mixed_6d = _mixed_c(768, 160)
        self.Mixed_6e = _mixed_c(768, 192)
        self.Mixed_7a = _mixed_d(768)
        self.Mixed_7b = _mixed_e(1280, "avg")
        self.Mixed_7c = _mixed_e(2048, "max")
        self.fc = nn.Linear(FEATURES, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """[N, 2048] -> [N, 1008] without the bias, as the graph of the Inception Score has them."""
        return features @ self.fc.weight.T


class InceptionExtractor:
    """Features of the network above, images brought to 299 x 299 by recipe `resize` ("tf" or "clean").

    Images are rounded to 8 bits first, as a saved picture is, and grey ones repeated to three channels. crop: before
    that their centre squares are brought to this side (`centre_squares`). `sha256` is the weight file's; `public` says
    that it is the one FID is defined by.
    """

    dim = FEATURES
    name = "inception"

    def __init__(
        self, net: Inception, sha256: str, resize: str = "tf", channels: int = 3, crop: int | None = None
    ) -> None:
        if resize not in RECIPES:
            raise UserError(f"--fid {resize}: no such recipe; {suggestion(resize, RECIPES)}")
        self.net = net.eval().requires_grad_(False)
        self.sha256, self.channels, self.recipe, self.crop = sha256, channels, resize, crop
        self.public = sha256 == SHA256
        self.resize = recipe_name(resize, SIZE, crop)
        self.input_spec = f"{channels} channels, rounded to 8 bits, {self.resize}"

    @classmethod
    def load(
        cls, weights: str | Path | None = None, resize: str = "tf", channels: int = 3, crop: int | None = None
    ) -> InceptionExtractor:
        """With the weights of a local file: the one given, else the public one in the folder FASTGEN_WEIGHTS_DIR."""
        path = find_weights(weights)
        return cls(read_inception(path), sha256(path), resize, channels, crop)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, 2048]."""
        if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            raise ValueError(f"images must be float [N, {self.channels}, H, W], got {images.dtype} {images.shape}")
        self.net.to(images.device)
        rows = torch.empty(len(images), FEATURES, device=images.device)
        # TF32, cuDNN's default, would move features in their third digit.
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            for start in range(0, len(images), BATCH):
                x = to_uint8(images[start : start + BATCH]).expand(-1, 3, -1, -1)
                x = x if self.crop is None else centre_squares(x, self.crop)
                rows[start : start + BATCH] = self.net(RESIZERS[self.recipe](x.float(), SIZE))
        return rows

    def probabilities(self, features: Tensor) -> Tensor:
        """p(y | x) of features [N, 2048]: [N, 1008] in float64, for the Inception Score."""
        weight = self.net.fc.weight.to(features.device)
        with torch.no_grad():
            return (features.double() @ weight.double().T).softmax(1)


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y | x) from p(y), over `splits` parts (Salimans et al. 2016): (mean, std).

    probabilities: [N, classes]. Rows are shuffled first, since images often come sorted by class.
    """
    p = probabilities.double().cpu()
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits {splits} must lie between 1 and the number of images, {len(p)}")
    p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))]
    scores = []
    for part in p.tensor_split(splits):
        # 0 log 0 is 0; a class that no image has is 0 in every row.
        log_ratio = part.clamp_min(1e-300).log() - part.mean(0).clamp_min(1e-300).log()
        scores.append((part * log_ratio).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def find_weights(weights: str | Path | None = None) -> Path:
    """The weight file: the one given, else the public one in FASTGEN_WEIGHTS_DIR. Nothing is ever downloaded."""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"--weights {weights}: no such file; the public one is {SOURCE}")
        return path
    folder = os.environ.get(FOLDER)
    if folder:
        for name in NAMES:
            if (Path(folder).expanduser() / name).is_file():
                return Path(folder).expanduser() / name
    where = f"into {folder} ({FOLDER})" if folder else f"into a folder and set {FOLDER} to it"
    raise UserError(f"{FILE}: not here; fetch {SOURCE} and put it {where}, or give it as --weights FILE")


def read_inception(path: Path) -> Inception:
    """The network with the weights of a .safetensors file, or of a .pth read with weights_only."""
    mend = f"the right file is {SOURCE}"
    state = load_tensors(path) if path.suffix == ".safetensors" else load_pickled(path, mend=mend)
    net = Inception()
    # Counters of training steps: some writers leave them out, and nothing reads them.
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(found.keys() ^ wanted.keys())
    wrong += sorted(k for k in found.keys() & wanted.keys() if found[k].shape != wanted[k].shape)
    if wrong:
        raise UserError(
            f"{path}: not the Inception-v3 of 2015: {len(wrong)} tensors missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}); the right file is {SOURCE}"
        )
    net.load_state_dict(found, strict=False)
    return net
