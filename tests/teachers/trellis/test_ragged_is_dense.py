"""On full grids the flow on voxels is a dense network: losses and gradients of the whole, in both precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.sparse import Voxels
from fastgen.teachers.trellis.blocks import positions
from fastgen.teachers.trellis.flows import LatentDenoiser, StructureDenoiser
from fastgen.trainers.flow_matching import RF, velocity_error
from tests.sparse.grids import PRECISION, apart
from tests.teachers.trellis.dense import DenseLatentFlow
from tests.teachers.trellis.nets import normal, small, told

SIDE = 4
TIMES = torch.tensor([0.9, 0.13], dtype=torch.float64)


def rows(grid: Tensor) -> Voxels:
    """A full grid [B, C, S, S, S] as voxels."""
    coords = torch.cartesian_prod(*[torch.arange(n, dtype=torch.int32) for n in (len(grid), *grid.shape[2:])])
    return Voxels(grid.movedim(1, -1).flatten(0, 3), coords, len(grid))


def slopes(denoiser: Any, x0: Any, eps: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The flow's loss, and its gradients in x0 (as rows) and in every parameter."""
    leaf = (x0.feats if isinstance(x0, Voxels) else x0).requires_grad_()
    t = TIMES.to(dtype)
    pair = denoiser(RF.mix(x0, eps, t), t, {"image": told()[1].to(dtype)}, on=RF)
    loss = velocity_error(pair.velocity, eps - x0)
    named = dict(denoiser.net.named_parameters())
    first, *others = torch.autograd.grad(loss, [leaf, *named.values()])
    first = first if isinstance(x0, Voxels) else rows(first).feats
    return loss, first, dict(zip(named, others, strict=True))


def with_convolutions(blocks: int) -> tuple[Any, Any]:
    """With the convolutions, the halving and the skips of the released networks: the tests' own dense code."""
    net = small("SLatFlowModel", num_io_res_blocks=blocks)
    return net, DenseLatentFlow(net)


def without(blocks: int) -> tuple[Any, Any]:
    """The same blocks on the same tokens as in the first stage's flow."""
    dense = small("SparseStructureFlowModel", qk_rms_norm_cross=True, num_blocks=blocks)
    sparse = small("SLatFlowModel", io_block_channels=None, patch_size=1, qk_rms_norm_cross=True, num_blocks=blocks)
    sparse.load_state_dict({key: value for key, value in dense.state_dict().items() if key != "pos_emb"}, strict=True)
    # The dense positions are kept in float32, as the official buffer is.
    dense.pos_emb.copy_(positions(torch.cartesian_prod(*[torch.arange(SIDE)] * 3), 24, torch.float64))
    return sparse, dense


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("make", [with_convolutions, without])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_losses_and_gradients_of_the_whole_flow(dtype: torch.dtype, make: Any, blocks: int) -> None:
    nets = [net.to(dtype) for net in make(blocks)]
    x0, eps = (normal(2, 3, *(SIDE,) * 3, seed=seed).to(dtype) for seed in (1, 2))
    sparse = slopes(LatentDenoiser(nets[0]), rows(x0), rows(eps), dtype)
    dense = slopes(StructureDenoiser(nets[1]), x0, eps, dtype)
    bound = PRECISION[dtype]
    assert dense[0] > 0.1 and apart(sparse[0], dense[0]) <= bound
    assert apart(sparse[1], dense[1]) <= bound
    gradients = {name.removeprefix("sparse."): grad for name, grad in dense[2].items()}
    assert sparse[2].keys() == gradients.keys() and len(gradients) > 50
    for name, expected in gradients.items():
        assert expected.any() and apart(sparse[2][name], expected) <= bound, name
