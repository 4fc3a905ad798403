"""Options, operands and the closing table of `pytest benchmarks/`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from pyvolconv.backends.registry import REGISTRY, select
from pyvolconv.cost.machine import Machine, measure_machine
from pyvolconv.cost.pages import keep_pages
from pyvolconv.problem import LAYOUTS, PASSES

from .compare import table
from .problems import PROBLEM_SETS

RESULTS = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyvolconv", "what is timed")
    group.addoption("--quick", action="store_true", help="one small problem, two rounds: does everything still run?")
    group.addoption(
        "--problems",
        default="mission,suite",
        help=f"comma-separated sets ({', '.join(PROBLEM_SETS)}), names of entries, or problems such as "
        "n8ic16oc24-i15x15x30-k3-p1 (default: mission,suite)",
    )
    group.addoption("--backend", default="", help="comma-separated names or families; torch is always timed too")
    group.addoption("--dtype", default="float32", help="name of a torch dtype (default: float32)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption(
        "--longest", type=float, default=3.0, help="skip what is expected to take more seconds per call (default: 3)"
    )
    group.addoption(
        "--pages",
        choices=("kept", "returned"),
        default="kept",
        help="whether freed memory stays with the process, for every backend alike (default: kept)",
    )


def chosen_problems(config: pytest.Config) -> dict[str, str]:
    """Name and problem of everything that `--problems` asks for."""
    wanted = "quick" if config.getoption("quick") else config.getoption("problems")
    entries = {name: text for entry_set in PROBLEM_SETS.values() for name, text in reversed(entry_set.items())}
    chosen: dict[str, str] = {}
    for word in wanted.split(","):
        if word in PROBLEM_SETS:
            chosen |= PROBLEM_SETS[word]
        else:
            chosen[word] = entries.get(word, word)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every problem and pass, and for each of them, side by side, every backend in both layouts."""
    config = metafunc.config
    named = config.getoption("backend")
    backends = dict.fromkeys(backend for word in named.split(",") for backend in select(word)) if named else REGISTRY
    peers = [backend for backend in REGISTRY if not backend.ours]
    cases = itertools.product(chosen_problems(config).items(), PASSES, dict.fromkeys([*backends, *peers]), LAYOUTS)
    metafunc.parametrize(
        ("name", "text", "pass_", "backend", "layout"),
        [
            pytest.param(name, text, pass_, backend, layout, id=f"{name}-{pass_}-{backend.name}-{layout}")
            for (name, text), pass_, backend, layout in cases
        ],
    )


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """The machine with its ceilings, measured in this process."""
    return measure_machine(request.config.getoption("device"))


@pytest.fixture(scope="session", autouse=True)
def _pages(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.config.getoption("pages") == "returned":
        yield
        return
    with keep_pages() as kept:
        if not kept.active:
            request.config.issue_config_time_warning(UserWarning(f"pages are not kept: {kept.reason}"), stacklevel=1)
        yield


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """A row for the closing table."""
    row: dict[str, object] = {}
    yield row
    if row:
        request.config.stash.setdefault(RESULTS, []).append(row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, [])
    if results:
        terminalreporter.section("against torch's better layout")
        terminalreporter.write_line(table(results))
