"""Sparse voxels: features on the active sites of a grid, with convolution, resampling and attention in plain torch."""

from fastgen.sparse.sites import Sites
from fastgen.sparse.tensor import Voxels

__all__ = ["Sites", "Voxels"]
