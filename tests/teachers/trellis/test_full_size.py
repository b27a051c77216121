"""A full-size folder with random weights in the released dtypes: loaded strictly, each stage run once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from fastgen.zoo import trellis
from tests.teachers.trellis.test_official import COUNTS, NORM, TORSO

NAME = "trellis-image-large"
GIB = 2**30
WRITE = """
import resource, sys
from pathlib import Path
from fastgen.zoo import trellis
trellis.write(Path(sys.argv[1]), sys.argv[2], full=True)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
RUN = """
import resource, sys, torch
from pathlib import Path
from fastgen.shapes import Shapes
from fastgen.teachers.trellis.folder import DECODERS, ROLES, TrellisFolder
torch.set_num_threads(2)
folder = TrellisFolder.read(Path(sys.argv[1]))
for role in ROLES:  # headers against the released dtypes' network
    assert folder.checked(role).args.use_fp16
shapes = Shapes(folder)
cond = {"image": torch.randn(1, 1374, 1024, generator=torch.Generator().manual_seed(0))}
plain = {"steps": 1, "cfg_strength": 0.0}
print("structure", len(shapes.structure(cond, **plain)), flush=True)
x, y, z = torch.meshgrid(*[torch.arange(64.0) - 31.5] * 3, indexing="ij")
shell = ((x**2 + y**2 + z**2).sqrt() - 10).abs() < 0.6
injected = torch.cat([torch.zeros(int(shell.sum()), 1), shell.nonzero()], 1).int()
latents = shapes.latents(cond, injected, **plain)
assert latents.feats.isfinite().all() and latents.feats.std() > 0.1
print("voxels", len(injected), flush=True)
mesh = shapes.meshes(latents)[0]
assert mesh.vertices.isfinite().all() and mesh.colours is not None
print("faces", len(mesh.faces), flush=True)
print("gaussians", len(shapes.gaussians(latents)[0].xyz), flush=True)
decoder = shapes._network(DECODERS["radiance field"])
print("field", len(decoder.represent(decoder(latents))[0].trivec), flush=True)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def told(code: str, *words: object) -> dict[str, int]:
    """The figures that a process of its own prints: its peak of memory, mapped files included, is nobody else's."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


def header(file):
    """name -> (dtype, entries) of a safetensors file, read by hand."""
    with file.open("rb") as opened:
        described = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    described.pop("__metadata__", None)

    def entries(tensor):
        low, high = tensor["data_offsets"]
        return (high - low) // {"F16": 2, "F32": 4}[tensor["dtype"]]

    return {key: (tensor["dtype"], entries(tensor)) for key, tensor in described.items()}


def check_dtypes(folder):
    """Each tensor of each file as released: F16 in the torso but for norms, F32 elsewhere."""
    for stem in trellis.VAES | trellis.FLOWS[NAME]:
        tensors, (_, keys) = header(folder / f"{stem}.safetensors"), COUNTS[stem.removeprefix("ckpts/")]
        assert keys is None or len(tensors) == keys
        for key, (dtype, _) in tensors.items():
            torso = re.match(TORSO, key) and not re.fullmatch(NORM, key)
            assert dtype == ("F16" if torso else "F32"), f"{stem}: {key}"
    flow = header(folder / "ckpts" / "ss_flow_img_dit_L_16l8_fp16.safetensors")
    assert sum(n for dtype, n in flow.values() if dtype == "F16") == 554_115_072
    assert sum(n for key, (_, n) in flow.items() if key != "pos_emb") == 555_543_560


@pytest.mark.slow
def test_a_full_size_folder_runs_in_eight_gigabytes(tmp_path):
    """1 step, no guidance, the structure injected; float32 on a CPU. Takes 3.1 GB of disk, and minutes."""
    folder = tmp_path / NAME
    try:
        written = told(WRITE, folder, NAME)
        check_dtypes(folder)
        seen = told(RUN, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"written within {written['peak'] / GIB:.2f} GiB; {seen}, peak {seen['peak'] / GIB:.2f} GiB")
    assert written["peak"] < 8 * GIB
    assert seen["structure"] > 0 and 500 < seen["voxels"] <= 2000 and seen["faces"] > 0
    assert seen["gaussians"] == 32 * seen["voxels"] and seen["field"] == seen["voxels"]
    assert seen["peak"] < 8 * GIB
