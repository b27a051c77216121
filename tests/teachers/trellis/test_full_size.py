"""A full-size folder with random weights in the released dtypes: loaded strictly, each stage run once."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from pathlib import Path
from fastgen.shapes import Shapes
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.folder import ROLES, TrellisFolder
torch.set_num_threads(2)
folder = TrellisFolder.read(Path(sys.argv[1]))
assert all(sum(p.numel() for p in folder.checked(role).parameters()) for role in ROLES)
shapes = Shapes(folder)
cond = {"image": torch.randn(1, 1374, 1024)}
plain = {"steps": 1, "cfg_strength": 0.0}
coords = shapes.structure(cond, **plain)
print("structure", len(coords))
x, y, z = torch.meshgrid(*[torch.arange(64.0) - 31.5] * 3, indexing="ij")
shell = ((x**2 + y**2 + z**2).sqrt() - 10).abs() < 0.6
injected = torch.cat([torch.zeros(int(shell.sum()), 1), shell.nonzero()], 1).int()
assert 500 < len(injected) <= 2000
latents = shapes.latents(cond, injected, **plain)
print("voxels", len(injected))
print("mesh", len(shapes.meshes(latents)[0].faces))
print("gaussians", len(shapes.gaussians(latents)[0].xyz))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_full_size_folder_runs_in_eight_gigabytes(tmp_path):
    """1 step, no guidance, structure injected; written by a process of its own, so that the peak is its reader's."""
    name = "trellis-image-large"
    write = "import sys; from pathlib import Path; from fastgen.zoo import trellis; "
    write += f"trellis.write(Path(sys.argv[1]), {name!r}, full=True)"
    subprocess.run([sys.executable, "-c", write, str(tmp_path / name)], check=True)
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    print(told)
    assert told["structure"] > 0 and told["mesh"] > 0 and told["gaussians"] == 32 * told["voxels"]
    assert told["peak"] < 8 * 2**30
