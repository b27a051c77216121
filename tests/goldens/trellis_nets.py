"""Kinds of the group `trellis` that are networks: official modules with random weights, run on a CPU in float32."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.sparse import Voxels
from fastgen.teachers.trellis import structure_vae
from fastgen.teachers.trellis.gaussian_decoder import Gaussians
from fastgen.teachers.trellis.models import make
from tests.goldens.case import Case
from tests.goldens.surfaces import same_surface

NEAR_ZERO = 1e-4  # logits so small may fall on either side
SUM = 1e-2  # between sums in float32 and float64


def network(case: Case, head: dict[str, Any] | None = None) -> Any:
    """The case's network with the weights of the case: every key of the one is a key of the other."""
    head = head or case.data
    net = make(head["class"], head["args"], str(case.file))
    weights = {match[1]: case[match[0]] for match in case.names(r"sd\.(.+)")}
    if "procedural_state_dict" in head:
        weights |= procedural(net, head["procedural_state_dict"]["params"])
    net.load_state_dict(weights, strict=True)
    return net.eval()


def procedural(net: nn.Module, rules: dict[str, Any]) -> dict[str, Tensor]:
    """Weights from numpy's seeds, by the rules of the case; buffers as they were made."""
    assert rules.keys() == dict(net.named_parameters()).keys()
    made = dict(net.state_dict())
    for name, told in rules.items():
        n = np.random.RandomState(told["seed"]).standard_normal(math.prod(told["shape"])).astype(np.float32)
        n = n.reshape(told["shape"])
        made[name] = torch.from_numpy(_ruled(n, told["rule"]))
        assert abs(float(made[name].double().sum()) - told["sum"]) < SUM, f"{name}: other numbers than the case's"
    return made


def _ruled(n: np.ndarray, rule: str) -> np.ndarray:
    """`0.1*n`, `1+0.2*n` or `n/sqrt(numel of p[0])`."""
    if rule == "n/sqrt(numel of p[0])":
        return (n / math.sqrt(n[0].size)).astype(np.float32)
    found = re.fullmatch(r"(?:([\d.]+)\+)?([\d.]+)\*n", rule)
    assert found, f"unknown rule {rule}"
    return (float(found[1] or 0) + float(found[2]) * n).astype(np.float32)


def voxels(case: Case) -> Voxels:
    """The case's input."""
    coords = case["in.coords"]
    return Voxels(case["in.feats"], coords, int(coords[:, 0].max()) + 1)


def middle(net: nn.Module, path: str) -> list[Any]:
    """Where what a part of a network returns will be put."""
    kept: list[Any] = []
    net.get_submodule(path).register_forward_hook(lambda _module, _args, out: kept.append(out))
    return kept


@torch.no_grad()
def ss_flow(case: Case) -> None:
    found = network(case)(case["in.x"], case["in.t"], case["in.cond"])
    case.close(found, case["out.v"], "velocity")


@torch.no_grad()
def ss_encoder(case: Case) -> None:
    mean, logvar = network(case)(case["in.x"])
    case.close(mean, case["out.mean"], "mean")
    case.close(logvar, case["out.logvar"], "log-variance")


@torch.no_grad()
def ss_decoder(case: Case) -> None:
    logits = network(case)(case["in.z"])
    expected, cells = case["out.logits"], case["out.coords"]
    case.close(logits, expected, "logits")
    torch.testing.assert_close(structure_vae.occupied(expected), cells, rtol=0, atol=0)
    found, doubtful = structure_vae.occupied(logits), expected.abs() < NEAR_ZERO
    assert _rows(found) ^ _rows(cells) <= _rows(doubtful.argwhere()[:, [0, 2, 3, 4]])


@torch.no_grad()
def slat_flow(case: Case) -> None:
    net, x = network(case), voxels(case)
    kept = {match[1]: middle(net, f"input_blocks.{match[1]}") for match in case.names(r"mid\.input_block(\d+)\.feats")}
    found = net(x, case["in.t"], case["in.cond"])
    case.close(found.feats, case["out.feats"], "velocity")
    for i, (block,) in kept.items():
        torch.testing.assert_close(block.coords, case[f"mid.input_block{i}.coords"], rtol=0, atol=0)
        case.close(block.feats, case[f"mid.input_block{i}.feats"], f"input block {i}")


def trunk(case: Case) -> tuple[Any, Any]:
    """A network with a trunk, and what it gives; the trunk's last block is compared here."""
    net = network(case)
    kept = middle(net, f"blocks.{len(net.blocks) - 1}")
    found = net(voxels(case))
    case.close(kept[0], case["mid.blocks_out.feats"], "last block")
    return net, found


@torch.no_grad()
def slat_enc(case: Case) -> None:
    _, (mean, logvar) = trunk(case)
    case.close(mean.feats, case["out.mean"], "mean")
    case.close(logvar.feats, case["out.logvar"], "log-variance")


@torch.no_grad()
def slat_dec_rf(case: Case) -> None:
    features(case, trunk(case)[1])


def features(case: Case, found: Voxels) -> None:
    torch.testing.assert_close(found.coords, case["out.coords"], rtol=0, atol=0)
    case.close(found.feats, case["out.feats"], "features")


@torch.no_grad()
def slat_dec_gs(case: Case) -> None:
    net, found = trunk(case)
    features(case, found)
    for i, one in enumerate(net.represent(found)):
        for name, value in attributes(one).items():
            case.close(value, case[f"gs{i}.{name}"], f"sample {i}: {name}")


def attributes(one: Gaussians) -> dict[str, Tensor]:
    """By the names of the original."""
    return {
        "_xyz": one.position,
        "_features_dc": one.features_dc,
        "_scaling": one.raw_scaling,
        "_rotation": one.raw_rotation,
        "_opacity": one.raw_opacity,
        "get_xyz": one.xyz,
        "get_scaling": one.scales,
        "get_rotation": one.rotation,
        "get_opacity": one.opacity,
        "ply_opacity": one.opacity_logit,
        "ply_scale": one.log_scales,
        "ply_rotation_untransformed": one.unnormalised_rotation,
    }


@torch.no_grad()
def slat_dec_mesh(case: Case) -> None:
    net, found = trunk(case)
    features(case, found)
    for i, mesh in enumerate(net.represent(found)):
        attributes = torch.cat([mesh.colours, mesh.normals], dim=1)
        vertices, drawn, faces = (case[f"mesh{i}.{name}"] for name in ("vertices", "vertex_attrs", "faces"))
        same_surface(case, (mesh.vertices, attributes, mesh.faces), (vertices, drawn, faces), f"mesh {i}")


def _rows(coords: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in coords.tolist()}
