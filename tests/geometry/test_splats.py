"""Pictures of Gaussian splats against formulas, and against every pixel by itself."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from fastgen.errors import UserError
from fastgen.geometry import splats as module
from fastgen.geometry.cameras import Camera, looking_in
from fastgen.geometry.gaussian_ply import ReadSplats
from fastgen.geometry.splats import HARMONIC, KERNEL, Cloud, render, rotations, turntable

STRAIGHT = Camera(eye=(0, -2, 0), size=48)
COLOUR = (0.9, 0.3, 0.1)


def splats(xyz, scales, opacity, colours, rotation=None):
    xyz = torch.tensor(xyz, dtype=torch.float32)
    n = len(xyz)
    rotation = torch.tensor([[1.0, 0, 0, 0]]).expand(n, 4) if rotation is None else rotation
    return ReadSplats(
        xyz,
        (torch.tensor(colours, dtype=torch.float32).expand(n, 3) - 0.5) / HARMONIC,
        torch.logit(torch.tensor(opacity, dtype=torch.float64)).float().expand(n),
        torch.tensor(scales, dtype=torch.float32).log().expand(n, 3),
        rotation,
    )


def scattered(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return ReadSplats(0.2 * normal(n, 3), normal(n, 3), normal(n), 0.5 * normal(n, 3) - 3, normal(n, 4))


def test_one_gaussian_is_its_formula():
    """Alone before the camera: exp(-d^2 / 2 s^2) with s^2 = (f r / z)^2 + kernel, dimmed by the kernel's share."""
    radius, opacity = 0.08, 0.7
    colour, alpha = render(splats([[0, 0, 0]], [[radius] * 3], [opacity], [COLOUR]), STRAIGHT)
    bare = (STRAIGHT.focal * radius / 2) ** 2
    wide = bare + KERNEL
    line = torch.arange(48) + 0.5 - 24
    expected = opacity * bare / wide * torch.exp(-(line[:, None] ** 2 + line[None] ** 2) / (2 * wide))
    expected = torch.where(expected < 1 / 255, 0.0, expected)
    torch.testing.assert_close(alpha, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(colour, expected[..., None] * torch.tensor(COLOUR), atol=1e-5, rtol=1e-4)
    assert 0 < (expected > 0).sum() < 48 * 48


def test_a_pixel_sized_gaussian_is_dimmed_by_the_kernel():
    tiny = splats([[0, 0, 0]], [[1e-4] * 3], [0.9], [COLOUR])
    _, sharp = render(tiny, STRAIGHT, kernel=1e-12)
    _, soft = render(tiny, STRAIGHT, kernel=0.1)
    assert sharp.max() == 0 == soft.max()  # between four pixels' centres, and then too faint
    through = splats([[0.5 / STRAIGHT.focal * 2, 0, 0.5 / STRAIGHT.focal * 2]], [[0.01] * 3], [0.9], [COLOUR])
    bare = (STRAIGHT.focal * 0.01 / 2) ** 2
    assert float(render(through, STRAIGHT)[1].max()) == pytest.approx(0.9 * bare / (bare + KERNEL), rel=1e-3)


def brute(cloud, camera, kernel):
    """Pixel by pixel, in float64, the projection's derivative by autograd."""
    size, seen = camera.size, []
    for i in range(len(cloud.means)):
        mean = cloud.means[i].double()
        spot = camera.project(mean[None])[0]
        slope = torch.autograd.functional.jacobian(lambda p: camera.project(p[None])[0, :2], mean)
        turn = rotations(cloud.quaternions[i : i + 1].double())[0]
        bare = slope @ turn @ torch.diag(cloud.scales[i].double() ** 2) @ turn.T @ slope.T
        matrix = bare + kernel * torch.eye(2)
        opacity = cloud.opacities[i].double() * (torch.det(bare) / torch.det(matrix)).sqrt()
        seen.append((float(spot[2]), spot[:2], torch.linalg.inv(matrix), opacity, cloud.colours[i].double()))
    colour, through = torch.zeros(size, size, 3, dtype=torch.float64), torch.ones(size, size, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="xy"), -1).double()
    for _, spot, inverse, opacity, shade in sorted(seen, key=lambda one: one[0]):
        away = grid - spot
        alpha = (opacity * (-0.5 * torch.einsum("hwi,ij,hwj->hw", away, inverse, away)).exp()).clamp(max=0.999)
        alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
        colour += (through * alpha)[..., None] * shade
        through *= 1 - alpha
    return colour.float(), (1 - through).float()


@pytest.mark.parametrize("pairs", [module.PAIRS, 300])
@pytest.mark.parametrize(("yaw", "pitch"), [(0.3, 0.4), (2.5, -0.7)])
def test_many_gaussians_are_laid_over_one_another(pairs, yaw, pitch, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", pairs)
    camera, cloud = looking_in(yaw, pitch, size=40), scattered()
    found, expected = render(cloud, camera), brute(Cloud.of(cloud), camera, KERNEL)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert expected[1].mean() > 0.1


def test_what_is_behind_the_camera_is_not_seen():
    colour, alpha = render(splats([[0, -4, 0], [0, -2, 0]], [[0.3] * 3], [0.9], [COLOUR]), STRAIGHT)
    assert not colour.any() and not alpha.any()


def test_the_nearer_one_hides_the_other_whatever_their_order():
    near, far = [0.0, -0.5, 0.0], [0.0, 0.5, 0.0]
    for places in ([near, far], [far, near]):
        shades = [[1.0, 0, 0] if place is near else [0, 0, 1.0] for place in places]
        colour, _ = render(splats(places, [[0.2] * 3], [0.99], shades), STRAIGHT)
        assert colour[24, 24, 0] > 0.95 > 0.05 > colour[24, 24, 2]


def test_rotations_are_those_of_the_axis():
    angle = 0.7
    half = torch.tensor([[math.cos(angle / 2), 0, 0, math.sin(angle / 2)]])
    turned = rotations(half)[0] @ torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(turned, torch.tensor([math.cos(angle), math.sin(angle), 0]))


def test_a_turntable_shows_them_on_white():
    pictures = turntable(splats([[0, 0, 0]], [[0.1] * 3], [0.95], [COLOUR]), frames=3, size=32)
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == torch.uint8
    assert pictures[:, 0, 0].eq(255).all() and pictures[:, 16, 16, 0].gt(pictures[:, 16, 16, 2]).all()


def test_gsplat_is_taken_by_name_and_refused_where_it_is_not(monkeypatch):
    camera, cloud = looking_in(0.4, 0.3, size=24), scattered(10)
    with pytest.raises(UserError, match="CUDA device only"):
        render(cloud, camera, backend="gsplat")
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(UserError, match="needs the package 'gsplat'"):
        module._by_gsplat(Cloud.of(cloud), camera, KERNEL)

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
        """Its documented answer, after its arguments were held against the camera."""
        assert options == {"near_plane": 0.01, "eps2d": 0.2, "rasterize_mode": "antialiased"}
        assert (width, height) == (24, 24) and opacities.shape == (10,) and quats.shape == (10, 4)
        seen = torch.cat([means, torch.ones(10, 1)], 1) @ viewmats[0].T
        flat = seen[:, :3] @ Ks[0].T
        place = torch.cat([flat[:, :2] / flat[:, 2:], seen[:, 2:3]], 1)
        torch.testing.assert_close(place, camera.project(means).float(), atol=1e-4, rtol=1e-4)
        colour, alpha = module._composed(Cloud(means, scales, quats, opacities, colors), camera, options["eps2d"])
        return colour[None], alpha[None, ..., None], {}

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    found = module._by_gsplat(Cloud.of(cloud), camera, 0.2)
    for a, b in zip(found, render(cloud, camera, kernel=0.2), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.cuda
def test_gsplat_agrees():
    pytest.importorskip("gsplat")
    camera, cloud = looking_in(0.4, 0.3, size=64), scattered()
    there = ReadSplats(*(getattr(cloud, name).cuda() for name in ReadSplats.__dataclass_fields__))
    for a, b in zip(render(there, camera, backend="gsplat"), render(there, camera), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
