"""AOTInductor: with this package's operators in processes that import it, decomposed in any process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pyvolconv

from .models import assert_close, pair, sample

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
@pytest.mark.parametrize("decomposed", [False, True])
def test_compiled_package(decomposed, tmp_path):
    reference, model = pair("code")
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (sample(),), dynamic_shapes=({0: batch},))
    if decomposed:
        program = program.run_decompositions(pyvolconv.decompositions())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = sample(3)
    with torch.no_grad():
        expected = reference(x)
    assert_close(torch._inductor.aoti_load_package(package)(x), expected)
    for imports in ("import", "no import"):
        ran = run_elsewhere(package, x, tmp_path, imports)
        if imports == "no import" and not decomposed:
            assert ran.returncode != 0
            assert "Could not find schema for pyvolconv::" in ran.stderr
        else:
            assert ran.returncode == 0, ran.stderr
            assert_close(torch.load(tmp_path / "y.pt"), expected)
