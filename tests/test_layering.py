"""The floors of docs/architecture.md: a file imports only from floors below its own, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import pyvolconv

PACKAGE = Path(pyvolconv.__file__).parent
REPOSITORY = PACKAGE.parent
FLOORS = (
    ("autocast", "epilogue", "precision", "host", "status", "kernels", "_C"),
    ("problem",),
    ("errors", "tuned_file"),
    ("backends",),
    ("tuned",),
    ("dispatch",),
    ("ops", "fused_voxels", "ordinary", "arguments", "elsewhere"),
    ("fused_ops",),
    ("activation_ops",),
    ("derivatives", "transforms", "decompositions"),
    ("fused_derivatives", "fused_transforms", "activation_derivatives"),
    ("activation_transforms",),
    ("shortcut", "cost", "candidates"),
    ("layouts",),
    ("functional", "instance_norm"),
    ("batch_norm",),
    ("fused_functional", "activation_functional", "nn", "patch"),
    ("links",),
    ("norm_chains",),
    ("stretches", "straight_forward"),
    ("chains",),
    ("fused_graph",),
    ("fusion", "wrappers", "autotune", "example_run"),
    ("accelerate", "fusion_report"),
    ("train", "info"),
    ("tune_model",),
    ("cli",),
    ("__main__",),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}


def _sources():
    """Module name -> file, of the package and of kernels/, which is installed inside it."""
    found = {}
    for root, prefix in ((PACKAGE, "pyvolconv"), (REPOSITORY / "kernels", "pyvolconv.kernels")):
        for path in sorted(root.rglob("*.py")):
            parts = [prefix, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


def _imports(module, lazily):
    """Modules of this package that `module` imports; with `lazily`, inside of functions too."""
    path = SOURCES[module]
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes = ast.walk(tree) if lazily else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pyvolconv")
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if target.split(".")[0] != "pyvolconv":
                continue
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                yield inner if inner in SOURCES or inner == "pyvolconv._C" else target


def _unit(module):
    return module.split(".")[1] if "." in module else ""


def test_the_sources_are_found():
    assert {"pyvolconv", "pyvolconv.problem", "pyvolconv.backends.base", "pyvolconv.kernels"} <= set(SOURCES)
    assert "pyvolconv.problem" in set(_imports("pyvolconv.ops", lazily=False))
    assert "pyvolconv._C" in set(_imports("pyvolconv.backends.cpp", lazily=True))


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "pyvolconv"])
def test_imports_go_down(module):
    unit = _unit(module)
    assert unit in FLOOR, f"{module} stands on no floor: add it to docs/architecture.md and to this test"
    for target in _imports(module, lazily=True):
        below = _unit(target)
        assert below, f"{module} imports the package itself, which imports {module}"
        if below != unit:
            assert FLOOR[below] < FLOOR[unit], f"{module} imports {target} from its own floor or from above"


@pytest.mark.parametrize("module", SOURCES)
def test_only_the_dispatcher_and_the_operators_know_backends(module):
    for target in _imports(module, lazily=True):
        if _unit(target) == "kernels":
            assert _unit(module) in ("backends", "kernels"), f"{module} imports {target}"
        if _unit(target) == "_C":
            # The machine's FMA peak is measured by the compiled part too.
            assert _unit(module) in ("backends", "cost"), f"{module} imports {target}"
        if _unit(target) == "backends":
            knowing = "backends tuned dispatch ops fused_ops activation_ops shortcut candidates instance_norm layouts"
            assert _unit(module) in knowing.split(), f"{module} imports {target}"


def test_no_circle():
    graph = {module: set(_imports(module, lazily=False)) - {module} for module in SOURCES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("pyvolconv.problem") < order.index("pyvolconv.dispatch") < order.index("pyvolconv")


def test_kernels_and_csrc_know_nothing_above_them():
    for module, path in SOURCES.items():
        if _unit(module) == "kernels":
            text = path.read_text()
            assert "torch.library" not in text
            assert "torch.nn.Module" not in text
            assert all(_unit(target) == "kernels" for target in _imports(module, lazily=True))
    sources = [*REPOSITORY.glob("csrc/**/*.h"), *REPOSITORY.glob("csrc/**/*.cpp")]
    assert sources
    for path in sources:
        text = path.read_text()
        for header in ("torch/", "ATen/", "c10/", "Python.h"):
            assert f"include <{header}" not in text, f"{path.name} includes {header}"


def test_import_is_light():
    """What only some paths need is loaded by those paths: a drop-in must not slow every import down."""
    heavy = ["numba", "triton", "matplotlib", "sklearn", "jinja2", "typer", "rich"]
    code = (
        # torch's FLOP counter, with which the operators register, loads triton by itself.
        "import sys, torch.utils.flop_counter; before = set(sys.modules); import pyvolconv; "
        f"print(*[name for name in {heavy} if name in sys.modules and name not in before])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
