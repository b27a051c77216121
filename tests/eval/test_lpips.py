"""LPIPS with random weights against the formula written out again, and its weight files.

The key and shape tables are those of torchvision's and lpips' public files, typed here on their own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastgen.errors import UserError
from fastgen.eval.lpips import LPIPS

# torchvision's index of each convolution in `features`: (weight shape, stride, padding).
ALEX = {
    0: ((64, 3, 11, 11), 4, 2),
    3: ((192, 64, 5, 5), 1, 2),
    6: ((384, 192, 3, 3), 1, 1),
    8: ((256, 384, 3, 3), 1, 1),
    10: ((256, 256, 3, 3), 1, 1),
}
VGG_WIDTHS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
VGG_POOLS = (4, 9, 16, 23)
HEADS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def trunk_shapes(net: str) -> dict[int, tuple[tuple[int, ...], int, int]]:
    if net == "alex":
        return ALEX
    widths = [3, *VGG_WIDTHS.values()]
    return {index: ((widths[i + 1], widths[i], 3, 3), 1, 1) for i, index in enumerate(VGG_WIDTHS)}


def random_state(net: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    trunk = {}
    for index, (shape, _, _) in trunk_shapes(net).items():
        fan_in = shape[1] * shape[2] * shape[3]
        trunk[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        trunk[f"features.{index}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    trunk["classifier.1.weight"] = torch.zeros(4, 4)  # the public files hold the whole network
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(HEADS[net])
    }
    return trunk, heads


@pytest.fixture(scope="module", params=["alex", "vgg"])
def files(request, tmp_path_factory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    trunk, heads = random_state(request.param)
    torch.save(trunk, folder / "trunk.pth")
    torch.save(heads, folder / "heads.pth")
    return request.param, folder / "trunk.pth", folder / "heads.pth"


@pytest.fixture(scope="module")
def alex(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("alex")
    trunk, heads = random_state("alex")
    save_file(trunk, folder / "trunk.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return folder / "trunk.safetensors", folder / "heads.safetensors"


def images(side: int, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, side, side, generator=generator) * 2 - 1, torch.rand(
        n, 3, side, side, generator=generator
    ) * 2 - 1


def by_hand(net: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The formula, one layer after the other in float64."""
    trunk, heads = ({k: v.double() for k, v in state.items()} for state in random_state(net))
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    x = (torch.cat([a, b]).double() - shift) / scale
    # AlexNet pools 3 by 3 before its second and third convolution, VGG 2 by 2 between its stages; read are all five
    # convolutions of AlexNet and the last one of each VGG stage.
    pooled_before = (3, 6) if net == "alex" else tuple(i + 1 for i in VGG_POOLS)
    read = tuple(ALEX) if net == "alex" else (2, 7, 14, 21, 28)
    total = torch.zeros(len(a), dtype=torch.float64)
    for index, (_, stride, padding) in trunk_shapes(net).items():
        if index in pooled_before:
            x = F.max_pool2d(x, 3 if net == "alex" else 2, 2)
        x = F.conv2d(x, trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"], stride, padding).clamp_min(
            0
        )
        if index in read:
            f, g = (y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for y in x.chunk(2))
            weight = heads[f"lin{read.index(index)}.model.1.weight"].flatten()
            total += ((f - g).pow(2) * weight.view(-1, 1, 1)).sum(1).mean((1, 2))
    return total


def test_the_distance_is_the_formula(files):
    net, trunk, heads = files
    a, b = images(40)
    distance = LPIPS(net, trunk, heads)
    found = distance(a, b)
    assert found.shape == (2,) and found.min() > 0.1
    torch.testing.assert_close(found.double(), by_hand(net, a, b), rtol=1e-4, atol=0)
    torch.testing.assert_close(distance(b, a), found)
    assert torch.equal(distance(a, a), torch.zeros(2))


def test_the_keys_are_the_public_ones(files):
    net, trunk, heads = files
    module = LPIPS(net, trunk, heads)
    wanted = {**random_state(net)[0], **random_state(net)[1]}
    del wanted["classifier.1.weight"]
    state = module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    assert module.trunk_sha256 == hashlib.sha256(trunk.read_bytes()).hexdigest()
    assert module.heads_sha256 == hashlib.sha256(heads.read_bytes()).hexdigest()


def test_gradients_reach_the_images_and_nothing_else(alex):
    distance = LPIPS("alex", *alex)
    a, b = (x.requires_grad_(True) for x in images(32))
    distance(a, b).sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.train().training and not any(m.training for m in distance.modules())


def test_the_gradient_is_the_slope(alex):
    distance = LPIPS("alex", *alex).double()
    a, b = (x.double() for x in images(32, n=1))
    a.requires_grad_(True)
    (slope,) = torch.autograd.grad(distance(a, b).sum(), a)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-6 * direction
    measured = (distance(a + step, b) - distance(a - step, b)).sum() / 2e-6
    torch.testing.assert_close((slope * direction).sum(), measured, rtol=1e-4, atol=0)


def test_dead_activations_are_no_division_by_zero(alex, tmp_path):
    """With a first layer that never fires nothing tells two images apart: 0, and no NaN on the way back."""
    trunk = random_state("alex")[0]
    trunk["features.0.bias"] -= 1e4
    save_file(trunk, tmp_path / "dead.safetensors")
    distance = LPIPS("alex", tmp_path / "dead.safetensors", alex[1])
    a, b = (x.requires_grad_(True) for x in images(32))
    found = distance(a, b)
    assert torch.equal(found, torch.zeros(2))
    found.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("part", ["trunk", "heads"])
def test_a_missing_file_is_named_with_its_source(alex, tmp_path, part):
    paths = {"trunk": alex[0], "heads": alex[1], part: tmp_path / "absent.pth"}
    with pytest.raises(
        UserError, match=rf"absent\.pth: no such file; it is https://.*{'pytorch' if part == 'trunk' else 'richzhang'}"
    ):
        LPIPS("alex", **paths)


def damaged(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    trunk, heads = random_state("alex")
    if kind == "trunk key missing":
        del trunk["features.8.bias"]
    elif kind == "trunk key unknown":
        trunk["features.12.weight"] = torch.zeros(1)
    elif kind == "trunk of another shape":
        trunk["features.3.weight"] = torch.zeros(192, 64, 3, 3)
    elif kind == "head missing":
        del heads["lin4.model.1.weight"]
    elif kind == "heads of the other net":
        heads = random_state("vgg")[1]
    return trunk, heads


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("trunk key missing", "features.8.bias"),
        ("trunk key unknown", "features.12.weight"),
        ("trunk of another shape", "features.3.weight"),
        ("head missing", "lin4.model.1.weight"),
        ("heads of the other net", "lin1.model.1.weight"),
    ],
)
def test_a_file_with_other_keys_is_refused(tmp_path, kind, key):
    trunk, heads = damaged(kind)
    save_file(trunk, tmp_path / "trunk.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=f"not the (trunk|heads) of lpips.net=alex.*{key}"):
        LPIPS("alex", tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors")


class Payload:
    """What a pickle from a stranger may hold: a call made when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_that_runs_code_is_refused(alex, tmp_path):
    torch.save({"features.0.weight": Payload(tmp_path / "ran")}, tmp_path / "trunk.pth")
    with pytest.raises(UserError, match=r"trunk\.pth: holds something else .* reading it could run code"):
        LPIPS("alex", tmp_path / "trunk.pth", alex[1])
    assert not (tmp_path / "ran").exists()


def test_a_broken_or_foreign_file_is_refused(alex, tmp_path):
    (tmp_path / "trunk.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"trunk\.pth: .* the right file is https"):
        LPIPS("alex", tmp_path / "trunk.pth", alex[1])
    torch.save([torch.zeros(2)], tmp_path / "trunk.pth")
    with pytest.raises(UserError, match="not a state dict"):
        LPIPS("alex", tmp_path / "trunk.pth", alex[1])


def test_wrong_calls_are_refused(alex):
    with pytest.raises(UserError, match=r"lpips\.net=vggg.*did you mean 'vgg'"):
        LPIPS("vggg", *alex)
    distance = LPIPS("alex", *alex)
    for a, b in ((30, 30), (32, 33)):
        with pytest.raises(ValueError, match="sides of at least 31"):
            distance(images(a)[0], images(b)[0])
    with pytest.raises(ValueError, match="sides of at least 31"):
        distance(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    distance(images(31)[0], images(31)[1])
