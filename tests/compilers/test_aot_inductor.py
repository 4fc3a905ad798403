"""AOTInductor: with this package's operators in processes that import it, decomposed in any process."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import pyvolconv

from .models import assert_close, sample

RUN = """
import sys
import torch
if sys.argv[4] == "import":
    import pyvolconv
package, x, y = sys.argv[1:4]
torch.save(torch._inductor.aoti_load_package(package)(torch.load(x)), y)
assert ("pyvolconv" in sys.modules) == (sys.argv[4] == "import")
"""


def run_elsewhere(package, x, folder, imports):
    torch.save(x, folder / "x.pt")
    command = [sys.executable, "-c", RUN, str(package), str(folder / "x.pt"), str(folder / "y.pt"), imports]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_compiled_packages(tmp_path):
    reference = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(4, 2, 2, 2))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    batch = torch.export.Dim("batch", min=2, max=16)
    kept = torch.export.export(model, (sample(),), dynamic_shapes=({0: batch},))
    x = sample(3)
    with torch.no_grad():
        expected = reference(x)
    packages = {"kept": kept, "decomposed": kept.run_decompositions(pyvolconv.decompositions())}
    for name, program in packages.items():
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))
        assert_close(torch._inductor.aoti_load_package(str(tmp_path / f"{name}.pt2"))(x), expected)
    for name, imports, runs in (
        ("kept", "import", True),
        ("kept", "no import", False),
        ("decomposed", "no import", True),
    ):
        package = tmp_path / f"{name}.pt2"
        ran = run_elsewhere(package, x, tmp_path, imports)
        if runs:
            assert ran.returncode == 0, ran.stderr
            assert_close(torch.load(tmp_path / "y.pt"), expected)
        else:
            assert ran.returncode != 0
            assert "Could not find schema for pyvolconv::" in ran.stderr
