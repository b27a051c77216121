"""What decoders make of latents: Gaussians, radiance fields, meshes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastgen.sparse import Voxels
from fastgen.teachers.trellis.gaussian_decoder import Gaussians, hammersley
from fastgen.teachers.trellis.models import make
from tests.teachers.trellis.nets import GAUSSIANS, TRUNK, small, voxels


def gaussians(feats_of: float = 0.0, **changes: object) -> tuple[list[Gaussians], Voxels]:
    net = make("SLatGaussianDecoder", TRUNK | {"representation_config": GAUSSIANS | changes}, "here")
    x = voxels(4)
    return net.represent(x.with_feats(torch.full((len(x.coords), 448), feats_of))), x


def test_offsets_are_a_hammersley_sequence():
    points = hammersley(32)
    assert points[0].tolist() == [0, 0, 0]
    assert points[5].tolist() == pytest.approx([5 / 32, 0.625, 2 / 3 + 1 / 9])  # 101 and 12
    net = small("SLatGaussianDecoder").float()
    expected = torch.tensor([[-0.80471896] * 3, [-0.73316853, 0.0, -0.22599256]])  # of the official module
    torch.testing.assert_close(net.offset_perturbation[:2], expected, rtol=0, atol=1e-7)


def test_zeros_are_the_biases():
    (first, second), x = gaussians()
    assert len(first.xyz) == 32 * int(x.lengths[0]) and len(second.xyz) == 32 * int(x.lengths[1])
    assert first.features_dc.shape == (len(first.xyz), 1, 3)
    torch.testing.assert_close(first.opacity, torch.full_like(first.opacity, 0.1))
    torch.testing.assert_close(first.scales, torch.full_like(first.scales, math.hypot(4e-3, 9e-4)))
    torch.testing.assert_close(first.log_scales, first.scales.log())
    assert first.rotation.unique(dim=0).tolist() == [[1, 0, 0, 0]]
    # (2 h - 1) / 1.5 of half a voxel times 1.5 from the voxel's centre: the sequence, spread over the voxel.
    centre = (x[0].coords[3, 1:] + 0.5) / 8
    torch.testing.assert_close(first.position[96:128], centre + (2 * hammersley(32) - 1) / 16)
    torch.testing.assert_close(first.xyz, first.position - 0.5)


def test_without_perturbation_they_start_at_the_centre():
    (first, _), x = gaussians(perturb_offset=False)
    torch.testing.assert_close(first.position[:32], ((x[0].coords[0, 1:] + 0.5) / 8).expand(32, 3).float())
    (far, _), x = gaussians(100.0)
    torch.testing.assert_close(far.position[:32] - (x[0].coords[0, 1:] + 0.5) / 8, torch.full((32, 3), 1.5 / 16))


def test_exponential_scales():
    (first, _), _ = gaussians(0.3, scaling_activation="exp")
    expected = math.hypot(4e-3 * math.exp(0.3), 9e-4)
    torch.testing.assert_close(first.scales, torch.full_like(first.scales, expected))


def test_channels_and_rates():
    """Attributes lie in blocks of channels, all Gaussians of a voxel for each; rotations are multiplied by a tenth."""
    net = make("SLatGaussianDecoder", TRUNK | {"representation_config": GAUSSIANS}, "here")
    x = voxels(4, batch=1)
    channels = torch.arange(448.0).expand(len(x.coords), 448)
    (one,) = net.represent(x.with_feats(channels))
    assert one.features_dc[1].tolist() == [[99, 100, 101]]
    assert one.raw_scaling[1].tolist() == [195, 196, 197]
    torch.testing.assert_close(one.raw_rotation[1], 0.1 * torch.arange(292.0, 296.0))
    assert one.raw_opacity[31].tolist() == [447]


def test_a_saturated_opacity_keeps_its_logit():
    (first, _), _ = gaussians()
    sure = replace(first, raw_opacity=torch.full_like(first.raw_opacity, 40.0))
    torch.testing.assert_close(sure.opacity_logit, torch.full_like(sure.raw_opacity, 40 + math.log(0.1 / 0.9)))
    assert sure.opacity.max() == 1


def test_the_radiance_fields_tensors():
    net, x = small("SLatRadianceFieldDecoder"), voxels(4)
    channels = torch.arange(4 * (3 * 3 + 4), dtype=torch.float64)
    first, second = net.represent(x.with_feats(channels.expand(len(x.coords), -1)))
    n = int(x.lengths[0])
    assert first.trivec.shape == (n, 4, 3, 3) and first.features_dc.shape == (n, 4, 1, 3) and first.resolution == 8
    assert first.trivec[0, 1, 2].tolist() == [16, 17, 18]  # 1 more than the channels
    assert first.density[0].tolist() == [36, 37, 38, 39] and first.features_dc[0, 1].tolist() == [[43, 44, 45]]
    torch.testing.assert_close(second.position, (x[1].coords[:, 1:] + 0.5).double() / 8)


def test_the_mesh_decoder_divides_twice():
    net, x = small("SLatMeshDecoder", resolution=4), voxels(4, size=4, share=0.1)
    with torch.no_grad():
        found = net(x)
    assert len(found.coords) == 64 * len(x.coords) and found.feats.shape[1] == 101
    assert torch.equal(found.coords[::64, 1:], 4 * x.coords[:, 1:])
    for mesh, sample in zip(net.represent(found), x.split(), strict=True):
        low, high = sample.coords[:, 1:].amin(0) / 4 - 0.5, (sample.coords[:, 1:].amax(0) + 1) / 4 - 0.5
        # Cubes one beyond the voxels hold surface too, and their vertices move by up to half a cube.
        assert (mesh.vertices > low - 2 / 16).all() and (mesh.vertices < high + 2 / 16).all()
        assert len(mesh.faces) > 0 and mesh.colours is not None and mesh.colours.shape == mesh.vertices.shape


def test_a_fresh_subdivision_is_its_skip_divided():
    block = make("SLatMeshDecoder", TRUNK | {"model_channels": 256, "representation_config": {"use_color": True}}, "m")
    x = voxels(256, size=4, share=0.1).float()
    first = block.upsample[0]
    expected = first.skip_connection(x).feats.repeat_interleave(8, dim=0)
    torch.testing.assert_close(first(x).feats, expected)
    # Not the linear layer of that weight: the memory is read as (in, out).
    weight, bias = first.skip_connection.conv.weight, first.skip_connection.conv.bias
    torch.testing.assert_close(expected[::8], x.feats @ weight.reshape(256, 64) + bias)
