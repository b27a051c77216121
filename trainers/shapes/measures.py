"""What the autoencoders give back of solids that they were not trained on, against the solids themselves."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from fastgen.data.solids import Solid
from fastgen.eval.meshes import sample
from fastgen.geometry.mesh import Mesh, is_closed
from fastgen.trainers.shapes.bodies import Bodies

POINTS, MARKS = 20_000, 1000  # of a mesh, and of the solid that it should be
NOTHING = 1.0  # the distance of a mesh without faces, more than any within the cube


@torch.no_grad()
def structures(net: Any, bodies: Bodies) -> dict[str, Any]:
    """IoU of full voxels with what their latents decode to, and the latents' std by channel."""
    found, means = [], []
    for i in range(len(bodies)):
        grid = bodies.get(torch.tensor([i]))["x0"]
        mean = net.encoder(grid.to(_device(net)))[0]
        full, truth = (net.decoder(mean) > 0).cpu(), grid > 0.5
        found.append(float((full & truth).sum() / (full | truth).sum()))
        means.append(mean)
    std = torch.cat(means).movedim(1, 0).flatten(1).std(1).tolist()
    return {"iou": fmean(found), "iou_worst": min(found), "std": std}


@torch.no_grad()
def meshes(net: Any, bodies: Bodies) -> dict[str, Any]:
    """Distance of decoded meshes from their solids, in widths of voxels, how many are closed, how far their colours are
    off (mean over vertices and channels, of 1); the latents' std."""
    distances, closed, colours, means = [], [], [], []
    for i, solid in enumerate(bodies.solids):
        shown = bodies.get(torch.tensor([i]))["x0"]
        mean = net.encoder(shown.to(_device(net)))[0]
        (mesh,) = net.decoder.represent(net.decoder(mean))
        distances.append(chamfer(solid, mesh.to("cpu")) * bodies.resolution)
        closed.append(len(mesh.faces) > 0 and is_closed(mesh))
        colours.append(colour_error(solid, mesh.to("cpu")))
        means.append(mean.feats)
    std = torch.cat(means).std(0).tolist()
    off = {"chamfer": fmean(distances), "chamfer_worst": max(distances), "colour": fmean(colours)}
    return {**off, "closed": fmean(closed), "std": std}


def chamfer(solid: Solid, mesh: Mesh) -> float:
    """CD-L1 of a mesh to a solid where it lies: the mean of both ways' means. There by the solid's exact distance, back
    to the nearest of the mesh's points, whose floor is half of sqrt(area / POINTS)."""
    if len(mesh.faces) == 0:
        return NOTHING
    points = sample(mesh, POINTS)[0].float()
    there = solid.distance(points).abs().mean()
    back = torch.cdist(solid.points(MARKS), points).amin(1).mean()
    return float(there + back) / 2


def colour_error(solid: Solid, mesh: Mesh) -> float:
    """Mean distance of a mesh's colours from its solid's; 1 where there are none."""
    if mesh.colours is None or len(mesh.colours) == 0:
        return NOTHING
    return float((mesh.colours - torch.tensor(solid.colour)).abs().mean())


def _device(net: Any) -> torch.device:
    return next(net.parameters()).device
