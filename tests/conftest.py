"""What every test shares: seeds, the problem set, operands, the float64 reference and the error bound.

Inputs are fresh in each session and repeatable: the header prints the session's seed, and
PYVOLCONV_SEED=<that number> gives every test the same inputs again.
"""

from __future__ import annotations

import itertools
import os
import random
import zlib
from collections.abc import Callable, Iterator

# Before torch loads OpenMP: idle threads sleep instead of spinning, or a busy machine makes each tiny parallel
# region wait for a time slice (thirty times the time of this suite).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Nothing that this machine's user has tuned decides here, and no test leaves anything behind.
os.environ["PYVOLCONV_NO_CACHE"] = "1"

if torch.cuda.is_available():
    # Without it torch refuses matrix products while `poisoned` has it compute the same bits every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Triton reads this when it is imported: its kernels then run on the CPU, slowly and exactly as written.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyvolconv import tuned
from pyvolconv.backends.base import MEMORY_FORMAT, Accuracy, Backend, operand_shapes
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.cost import busy
from pyvolconv.dispatch import forget_choices
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Pass

from .error_bound import Product, defining_products, exact_result, relative_error, run_a_pass, summed_magnitude

try:
    from pyvolconv import _C
except ImportError:
    ISAS = []
else:
    ISAS = _C.supported_isas()

# In the environment, where the worker processes of pytest-xdist find it.
SESSION_SEED = int(os.environ.setdefault("PYVOLCONV_SEED", str(random.SystemRandom().randrange(2**31))))

PROBLEMS = (
    # The three layers of the mission's network: few input channels, then channel counts that fill vectors.
    "n2ic1oc16-i9x10x11-k3-p1",
    "n2ic16oc24-i5x6x7-k3-p1-bias",
    "n1ic24oc32-i4x5x6-k3-p1",
    "n2ic3oc8-i7x9x10-k5-s2-p2-bias",  # a stem: RGB, strided
    "n1ic64oc48-i3x4x5-k3-p1",  # a reduction of 1,728 products
    "n3ic5oc7-i5x4x9-k3-bias",  # channel counts that fill no vector
    "n1ic17oc33-i4x3x6-k3-p1",  # one more than full vectors
    "n1ic2oc3-i4x5x37-k3-p1",  # long rows
    "n2ic8oc8-i3x3x35-k1x1x5-p0x0x2",
    "n1ic16oc16-i1x1x1-k3-p1",  # all border
    "n3ic4oc6-i3x4x5-k3x4x5-bias",  # the kernel covers the input: one output voxel
    "n2ic4oc1-i4x5x6-k3-p1",
    # Kernels with axes of one tap.
    "n2ic12oc20-i3x5x7-k1-bias",
    "n2ic8oc16-i4x6x5-k1x3x3-p0x1x1",
    "n2ic8oc16-i6x3x5-k3x1x1-p1x0x0",
    "n2ic3oc5-i5x6x8-k1-s2",  # most voxels meet no tap
    # Strides, also larger than the kernel, and sizes that a stride does not divide.
    "n2ic4oc8-i8x9x10-k2-s2-bias",
    "n1ic3oc16-i7x8x9-k2x4x4-s2x4x4",
    "n2ic6oc10-i8x9x11-k3-s2-p1",
    "n2ic20oc12-i10x7x13-k3-s2-p0+2x1x3+0-bias",
    "n1ic16oc24-i5x10x15-k3-s1x2x2-p1x0x1+2",
    "n2ic3oc17-i4x9x14-k1x3x3-s1x2x2-p0x1x1",
    "n1ic4oc6-i9x8x10-k3x2x3-s3x2x1-p1x0x2-bias",
    "n1ic3oc4-i7x6x8-k2x1x2-s3x2x4",
    # As many packed voxels as there are in the tensor, so that channels are as far apart in both, in ncdhw.
    "n1ic2oc1-i2x2x2-k1x1x2-s2-p1-d2-bias",
    # Dilation alone, and with strides that do and do not divide it.
    "n2ic4oc8-i7x8x9-k3-p2-d2",
    "n1ic8oc16-i9x7x12-k3x2x3-p2x1x3-d2x1x3-bias",
    "n1ic20oc12-i7x6x13-k3-p4+1x0x2+3-d3x1x2-bias",
    "n2ic5oc8-i4x9x11-k1x3x3-p0x3x4-d5x3x4",  # the residues modulo the dilation have one to three voxels
    "n1ic4oc6-i10x11x12-k3-s2x3x4-p2-d3x3x2",
    "n1ic3oc5-i9x9x13-k2x3x3-s4x2x3-p1x2x3-d2x4x3",
    # Padding on one side only (causal, even "same"), and wider than the kernel.
    "n2ic4oc8-i5x6x7-k4x2x2-p1+2x0+1x0+1-bias",
    "n2ic8oc16-i4x5x6-k3-p2+0x1x1",
    "n1ic3oc4-i4x3x5-k2-s2x1x3-p3+0x0+4x2+3",
    "n1ic2oc3-i2x3x4-k3-p4",
    # Groups: several channels each, channel multipliers, depthwise.
    "n2g2ic8oc12-i5x4x6-k3-p1-bias",
    "n1g3ic9oc6-i4x6x5-k2x3x3-s2x1x1-p0x1x1",
    "n1g2ic32oc32-i3x4x5-k3-p1",
    "n2g8ic8oc8-i5x6x7-k3-p1-bias",
    "n1g5ic5oc10-i6x5x7-k3-s2-p1-d1x2x1",
    "n1g16ic16oc16-i5x6x9-k5x3x5-p2x1x2",
    "n1g4ic4oc4-i8x8x8-k7-p3",
)


# Few voxels and short loops, for backends that run in an interpreter here and for narrow dtypes.
SMALL_PROBLEMS = (
    "n1ic16oc16-i1x1x1-k3-p1",
    "n3ic4oc6-i3x4x5-k3x4x5-bias",
    "n1ic3oc4-i7x6x8-k2x1x2-s3x2x4",
    "n1ic2oc3-i2x3x4-k3-p4",
    "n1g3ic9oc6-i4x6x5-k2x3x3-s2x1x1-p0x1x1",
    "n2ic8oc16-i4x5x6-k3-p2+0x1x1",
)

DTYPES = {
    "problem": {"float32": PROBLEMS, "float64": PROBLEMS, "bfloat16": SMALL_PROBLEMS, "float16": SMALL_PROBLEMS},
    "float32_problem": {"float32": PROBLEMS},
}


def _problems(fixture: str) -> Iterator[ConvProblem]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for dtype, texts in DTYPES[fixture].items():
        for text, layout, device in itertools.product(texts, LAYOUTS, devices):
            yield ConvProblem.parse(f"{device}-{dtype}-{layout}-{text}")


def _cells(fixture: str) -> Iterator[tuple[Backend, ConvProblem, Pass, list[pytest.MarkDecorator]]]:
    """Backends, and the passes of problems that they do not refuse."""
    for backend in REGISTRY:
        for number, problem in enumerate(_problems(fixture)):
            marks = [pytest.mark.gpu] if problem.device == "cuda" else []
            if backend.family == "triton" and problem.device == "cpu":
                if not _is_interpreted(number, problem, fixture):
                    continue
                if not _is_small(problem):
                    marks = [pytest.mark.slow]
            for pass_ in PASSES:
                if not backend.unsupported_reasons(problem, pass_):
                    yield backend, problem, pass_, marks


def _is_small(problem: ConvProblem) -> bool:
    return any(str(problem).endswith(f"-{text}") for text in SMALL_PROBLEMS)


def _is_interpreted(number: int, problem: ConvProblem, fixture: str) -> bool:
    """Whether Triton's slow interpreter gets a problem: the small ones, the large ones for the error bound alone.

    A layout is only strides to these kernels, and a dtype only its conversion, so both layouts are taken for small
    problems in float32, and one or the other for the rest.
    """
    if problem.dtype != "float32":
        return problem.layout == ("ncdhw" if problem.dtype == "bfloat16" else "ndhwc")
    return _is_small(problem) or (fixture == "problem" and (number // 2 + number) % 2 == 0)


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "ci", derandomize=True, max_examples=200, deadline=None, suppress_health_check=list(HealthCheck)
    )
    settings.register_profile("fresh", parent=settings.get_profile("ci"), derandomize=False, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "fresh")


def pytest_report_header(config: pytest.Config) -> str:
    return f"PYVOLCONV_SEED={SESSION_SEED}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that names `pass_`, `backend`, `problem` or `float32_problem` runs for each of them.

    `problem` is the set in every dtype and layout, `float32_problem` that part of it. With all three, a test runs for
    what the backend does not refuse; test_backends checks that able ones refuse nothing.
    """
    fixture = next((name for name in DTYPES if name in metafunc.fixturenames), None)
    if fixture and {"backend", "pass_"} <= set(metafunc.fixturenames):
        cells = [
            pytest.param(backend, problem, pass_, marks=marks, id=f"{pass_}-{backend.name}-{problem}")
            for backend, problem, pass_, marks in _cells(fixture)
        ]
        metafunc.parametrize(("backend", fixture, "pass_"), cells)
        return
    if "pass_" in metafunc.fixturenames:
        metafunc.parametrize("pass_", PASSES)
    if fixture:
        metafunc.parametrize(fixture, list(_problems(fixture)), ids=str)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", REGISTRY, ids=lambda backend: backend.name)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) ^ SESSION_SEED)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs here is no part of any test."""
    monkeypatch.setattr(busy, "sample", lambda: None)


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    tuned.forget()
    forget_choices()
    yield
    tuned.forget()
    forget_choices()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor that torch allocates without a value for it is filled with NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    """Compute by the kernels of an instruction set, of `ISAS`; undone at the end."""
    before = _C.current_isa()
    yield _C.use_isa
    _C.use_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> str:
    """Each instruction set of this machine in turn, in use."""
    use_isa(request.param)
    return request.param


@pytest.fixture
def require() -> Callable[[Backend, ConvProblem, Pass], None]:
    """Skip where a backend says that it cannot run; test_backends checks that able ones do not say so."""

    def check(backend: Backend, problem: ConvProblem, pass_: Pass) -> None:
        reasons = backend.unsupported_reasons(problem, pass_)
        if reasons:
            pytest.skip(f"{backend.name}: {'; '.join(reasons)}")

    return check


@pytest.fixture
def operands() -> Callable[..., list[Tensor]]:
    """operands(problem, pass_, integers=False): random, dense in the problem's layout, between guards.

    Each lies inside a larger buffer of NaN, at an odd address, so that a read outside of it shows and
    nobody can rely on an alignment. Integers are between -3 and 3: their sums are exact.
    """

    def make(problem: ConvProblem, pass_: Pass, integers: bool = False) -> list[Tensor]:
        made = []
        bias = [(problem.out_channels,)] if problem.bias and pass_ == "forward" else []
        for shape in [*operand_shapes(problem, pass_), *bias]:
            values = torch.randint(-3, 4, shape) if integers else torch.randn(shape, dtype=torch.float64)
            dense = values.to(getattr(torch, problem.dtype))
            if len(shape) == 5:
                dense = dense.contiguous(memory_format=MEMORY_FORMAT[problem.layout])
            made.append(between_guards(dense.to(problem.device)))
        return made

    return make


def between_guards(dense: Tensor, guard: int = 67) -> Tensor:
    """The same values and strides inside a buffer that holds NaN before and after them."""
    buffer = torch.full((dense.numel() + 2 * guard,), float("nan"), dtype=dense.dtype, device=dense.device)
    inside = buffer.as_strided(dense.shape, dense.stride(), guard)
    return inside.copy_(dense)


@pytest.fixture
def run_pass() -> Callable[[Backend, ConvProblem, Pass, list[Tensor]], Tensor]:
    """run_pass(backend, problem, pass_, operands), called as `pyvolconv.ops` calls a backend."""
    return run_a_pass


@pytest.fixture
def reference() -> Callable[[ConvProblem, Pass, list[Tensor]], Tensor]:
    """reference(problem, pass_, operands): ATen in float64; test_reference checks it against the definition."""
    return exact_result


@pytest.fixture
def magnitude() -> Callable[[ConvProblem, Pass, list[Tensor], tuple[int, int, int]], Tensor]:
    """magnitude(problem, pass_, absolute operands, reach): what the bound of an `Accuracy` is a multiple of."""
    return summed_magnitude


@pytest.fixture
def error_in_bounds() -> Callable[[Tensor, ConvProblem, Pass, list[Tensor], Accuracy], float]:
    """error_in_bounds(got, ...): the largest error as a multiple of the bound that `Accuracy` states."""
    return relative_error


@pytest.fixture
def assert_within_bound() -> Callable[[Tensor, ConvProblem, Pass, list[Tensor], Accuracy], None]:
    """assert_within_bound(got, problem, pass_, operands, accuracy)."""

    def check(got: Tensor, problem: ConvProblem, pass_: Pass, args: list[Tensor], accuracy: Accuracy) -> None:
        ratio = relative_error(got, problem, pass_, args, accuracy)
        assert ratio <= 1, f"{pass_} of {problem}: the error is {ratio:.3g} times the bound of {accuracy}"

    return check


@pytest.fixture
def products() -> Callable[[ConvProblem], Iterator[Product]]:
    """products(problem): (index into x, into w, into y) of every product of the defining sum, padding left out."""
    return defining_products
