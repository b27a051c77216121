"""Triangle meshes: extracted from voxels, cleaned, measured on grids, rendered and written, all without a GPU."""
