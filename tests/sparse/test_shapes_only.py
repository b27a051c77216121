"""Sites on the meta device: what is worked out from them has the sizes that real ones have."""

from __future__ import annotations

import pytest
import torch

from fastgen.data.synthetic_shapes import SyntheticShapes
from fastgen.sparse import Voxels, attention, conv, spatial
from fastgen.sparse.shapes_only import ShapesOnly
from fastgen.teachers.trellis.models import make
from fastgen.zoo import trellis


@pytest.fixture
def both():
    """Two shells as voxels with values, and as shapes."""
    real = SyntheticShapes("latent", (8,), 16, "image", 32, 4).get(torch.arange(2))["x0"]
    return real, Voxels(real.feats.to("meta"), ShapesOnly(real.coords, real.batch))


def sizes(found):
    """Shapes of the tensors in what `Sites.once` keeps."""
    if isinstance(found, torch.Tensor):
        return tuple(found.shape)
    if isinstance(found, tuple):
        return tuple(map(sizes, found))
    if hasattr(found, "__dataclass_fields__"):
        return tuple(sizes(getattr(found, name)) for name in found.__dataclass_fields__)
    return len(found.coords) if hasattr(found, "coords") else found


@pytest.mark.parametrize(
    "found",
    [
        conv.neighbours,
        conv._table,
        spatial.halving,
        lambda sites: conv.neighbours(spatial.halving(sites).coarse),
        lambda sites: attention.windows(sites, 8, 4),
        lambda sites: (sites.sizes, sites.lengths),
    ],
)
def test_what_is_worked_out_is_of_the_real_size_and_on_the_meta_device(found, both):
    real, shapes = both
    made = found(shapes.sites)
    assert sizes(made) == sizes(found(real.sites))
    assert made is found(shapes.sites) or isinstance(made, tuple)  # once
    flat = [made[1]] if isinstance(made, tuple) else [made] if isinstance(made, torch.Tensor) else vars(made).values()
    assert all(t.is_meta for t in flat if isinstance(t, torch.Tensor)) and shapes.coords.is_meta


def kept(net, x, cond):
    """Bytes that a forward pass keeps for the backward pass beside the parameters, which then is run."""
    own, found = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # held, so that no other takes its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x, torch.full((2,), 500.0, device=x.device), cond)
    total = sum(storage.nbytes() for storage in found.values())
    out.feats.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    return total


def test_a_flow_keeps_as_much_for_shapes_as_for_voxels(both):
    kind, args = trellis.tiny(trellis.FLOWS["trellis-image-large"]["ckpts/slat_flow_img_dit_L_64l8p2_fp16"])
    for channels in (16, 64):  # narrow convolutions, and those offset by offset
        real, shapes = both
        net = make(kind, {**args, "io_block_channels": [channels]}, "flow")
        cond = torch.zeros(2, 5, 32)
        expected = kept(net, real, cond)
        assert kept(net.to("meta"), shapes, cond.to("meta")) == expected > 1e6
