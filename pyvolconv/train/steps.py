"""One training step of one network on one path: made, timed next to others, taken apart.

A path is a network whose convolutions are all forced to one backend, or torch's own, in one memory layout. All paths of
one measurement take turns in one process with the C allocator in one state, so that they meet the same machine. A path
so slow that its turns would use up the time is given fewer samples, and its time is scaled up and marked.

On a GPU a turn is several steps in a row, after which the host waits for the GPU once.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..accelerate import accelerate
from ..cost.breakdown import Pages, PathProfile, in_state
from ..cost.machine import Machine, measure_machine
from ..cost.pages import keep_pages, measure_memory, page_faults, pages_kept, return_pages
from ..cost.profiler import STEPS_AT_ONCE, StepProfile, StepSplit, profile_step
from ..cost.results import PathTiming
from ..cost.timing import alternate, now
from ..dispatch import use_backend
from ..fused_derivatives import use_dense_backward
from ..precision import use_tf32
from ..problem import Layout
from .graphed import GraphedStep
from .loop import make_optimizer, training_step
from .models import MISSION_SIZE, NetworkName, build

MEMORY_FORMAT = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}
LSTM_PATH = "LSTM"
ROUNDS_AT_ONCE, MOST_ROUNDS = 2, 10
MOST_ROUNDS_ON_GPU = 40
TORCH_PATHS: dict[str, Layout] = {"torch contiguous": "ncdhw", "torch channels_last_3d": "ndhwc"}


@dataclass(frozen=True)
class PathSpec:
    """Which network runs how.

    `backend` None is torch itself, `layout` None a network without volumes; with `fused`, chains of convolution,
    activation and pool run as one pass, and `dense_backward` says that their gradients visit every voxel all the same.
    `tf32` says whether convolutions of float32 may round to TF32, None that the path leaves torch's switch alone;
    `graph` that the whole step is captured as one CUDA graph.
    """

    path: str
    network: str
    backend: str | None
    layout: Layout | None
    fused: bool = False
    dense_backward: bool = False
    tf32: bool | None = None
    graph: bool = False

    @property
    def ours(self) -> bool:
        """Whether hand-written kernels of this package run."""
        return self.backend is not None


@dataclass(frozen=True)
class Candidate:
    """A path ready to be timed: `samples` of a batch's `batch_size` samples are in its step.

    `untried` are layouts that might have been better, for which there was no time.
    """

    spec: PathSpec
    model: nn.Module
    step: Callable[[], None]
    samples: int
    batch_size: int
    untried: tuple[Layout, ...] = ()

    @property
    def scaled(self) -> bool:
        """Whether the step is too slow for the whole batch."""
        return self.samples < self.batch_size


def prepare(spec: PathSpec, model: nn.Module) -> nn.Module:
    """Put a fresh model into the path's layout and, for a path of ours, swap its convolutions; in place."""
    if spec.layout is not None:
        model.to(memory_format=MEMORY_FORMAT[spec.layout])  # type: ignore[call-overload]
    return accelerate(model, fuse=spec.fused) if spec.ours else model


@contextlib.contextmanager
def on_path(spec: PathSpec) -> Iterator[None]:
    """Force the path's backend and way back inside the block; torch's own paths need no forcing."""
    with contextlib.ExitStack() as forced:
        if spec.backend is not None:
            forced.enter_context(use_backend(spec.backend))
        if spec.dense_backward:
            forced.enter_context(use_dense_backward())
        if spec.tf32 is not None:
            forced.enter_context(use_tf32(spec.tf32))
        yield


def candidate(spec: PathSpec, make_model: Callable[[], nn.Module], x: Tensor, y: Tensor, samples: int) -> Candidate:
    """The path's training step on the first `samples` samples of a batch: zero_grad, forward, loss, backward, Adam."""
    model = prepare(spec, make_model().to(x.device)).train()
    if spec.layout is not None:
        part = x[:samples].contiguous(memory_format=MEMORY_FORMAT[spec.layout])
    else:
        part = x[:samples].contiguous()
    labels = y[:samples]
    optimizer = make_optimizer(model, capturable=spec.graph)

    def step() -> None:
        with on_path(spec):
            training_step(model, optimizer, part, labels)

    return Candidate(spec, model, GraphedStep(model, optimizer, step) if spec.graph else step, samples, x.shape[0])


def peak_memory(one: Candidate) -> int | None:
    """Bytes that one step adds to the resident process at its peak, after what lay free was returned to the system.

    On a GPU, bytes that it adds to what torch has allocated there. None where that cannot be read: pages are kept, so
    that a process never shrinks; the step has fewer samples than a batch; it is a CUDA graph, which has its memory
    already; the system has no /proc, or another C library than glibc.
    """
    if one.scaled or one.spec.graph:
        return None
    if on_gpu(one):
        return _peak_on_gpu(one.step)
    if pages_kept():
        return None
    if not return_pages():
        return None
    try:
        return measure_memory(one.step).added_rss_bytes
    except OSError:
        return None


def on_gpu(one: Candidate) -> bool:
    """Whether the network is on a GPU."""
    return any(weight.is_cuda for weight in one.model.parameters())


def _peak_on_gpu(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_paths(
    candidates: Sequence[Candidate],
    pages: Pages,
    machine: Machine,
    *,
    seconds: float,
    repeats: int,
    say: Callable[[str], None],
) -> tuple[list[PathTiming], list[PathProfile]]:
    """Time every candidate in turn, then measure each one's memory and take it apart.

    A path that is too slow for whole batches has no turns: the runs between its profiled ones are its timing. A CUDA
    graph is not taken apart: its passes take what they take outside of it.

    Args:
        candidates: the paths, at most one per name.
        pages: the state that the C allocator is in.
        machine: ceilings for the profiles' roofline.
        seconds: how long turns are taken, but everyone has `ROUNDS_AT_ONCE` at the least and `MOST_ROUNDS` at the most.
        repeats: profiled runs of each candidate.
        say: told what is going on, for a person who waits.

    Returns:
        Times and profiles in the order of `candidates`, milliseconds scaled to whole batches; no profiles of graphs.
    """
    gpu = any(map(on_gpu, candidates))
    faults: dict[str, list[int]] = {one.spec.path: [] for one in candidates}
    steps = {one.spec.path: _counted(one, faults[one.spec.path]) for one in candidates}
    turns = _take_turns({one.spec.path: steps[one.spec.path] for one in candidates if not one.scaled}, seconds, gpu)
    times: list[PathTiming] = []
    found: dict[str, PathProfile] = {}
    for one in candidates:
        memory = peak_memory(one)
        scale = one.batch_size / one.samples
        if not one.spec.graph:
            say(f"Taking {one.spec.path} apart{in_state(pages)}")
            ceilings = machine.without_tf32() if one.spec.tf32 is False else machine
            profile = profile_step(steps[one.spec.path], one.model, repeats=repeats, warmup=0, machine=ceilings)
            found[one.spec.path] = PathProfile(one.spec.path, one.spec.ours, pages, one.samples, profile)
        ungraphed = found.get(one.spec.path.removesuffix(", graph"))
        timed = turns.get(one.spec.path) or found[one.spec.path].profile.step.seconds
        total = statistics.median(timed) * 1e3 * scale
        split = None
        if ungraphed is not None and one.spec.network == "cnn":
            split = _split(ungraphed.profile, total, scale, gpu)
        times.append(
            PathTiming(
                path=one.spec.path,
                network=one.spec.network,
                backend=one.spec.backend or "torch",
                layout=one.spec.layout,
                ours=one.spec.ours,
                fused=one.spec.fused,
                dense_backward=one.spec.dense_backward,
                pages=pages,
                milliseconds=total,
                forward=split.forward if split else None,
                grad_input=split.grad_input if split else None,
                grad_weight=split.grad_weight if split else None,
                other=split.other if split else None,
                steps=len(timed),
                samples=one.samples,
                batch_size=one.batch_size,
                page_faults=None if gpu else statistics.median(faults[one.spec.path]) * scale,
                memory_bytes=memory,
                tf32=one.spec.tf32,
                graph=one.spec.graph,
            )
        )
    return times, list(found.values())


def _split(profile: StepProfile, milliseconds: float, scale: float, gpu: bool) -> StepSplit:
    """A step of that many milliseconds, of a whole batch, by its convolutions' passes and the rest.

    A GPU's passes take what they were measured to take, whatever else a step waits for. On the CPU they are shares of
    one profiled run, without the instrument: parts of two different runs could leave less than nothing.
    """
    split = profile.profiled_split()
    if gpu:
        # They were measured one by one, and may come to a little more than a step that has nothing else in it.
        passes = (split.total - split.other) * scale
        share = scale * min(1.0, milliseconds / passes) if passes else scale
    else:
        share = milliseconds / (split.total - profile.instrument_seconds * 1e3)
    forward, grad_input, grad_weight = split.forward * share, split.grad_input * share, split.grad_weight * share
    return StepSplit(forward, grad_input, grad_weight, milliseconds - forward - grad_input - grad_weight)


def profile_built_in(
    network: str, backend: str | None, layout: Layout, batch_size: int, keep: bool, device: str, seed: int
) -> PathProfile:
    """One training step of a built-in network on noise, taken apart.

    Args:
        network: "cnn" or "lstm".
        backend: family or name to force; None for torch itself.
        layout: memory order of the CNN's activations and weights.
        batch_size: samples in the step.
        keep: whether the C allocator keeps freed pages.
        device: "cpu" or "cuda".
        seed: of weights and noise.

    Raises:
        ValueError: the backend does not exist, or is given for the LSTM, which has no convolution.
        UnsupportedProblemError: the backend cannot run the CNN's convolutions.
    """
    if network == "lstm" and backend is not None:
        raise ValueError(f"--backend {backend}: the LSTM has no convolution; leave --backend out")
    spec = PathSpec(backend or "torch", network, backend, layout if network == "cnn" else None, backend is not None)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, 1, *MISSION_SIZE, generator=generator).to(device)
    y = (torch.arange(batch_size) % 2).to(device)
    name: NetworkName = "cnn" if network == "cnn" else "lstm"
    one = candidate(spec, lambda: build(name, seed=seed), x, y, batch_size)
    one.step()
    with keep_pages() if keep else contextlib.nullcontext():
        profile = profile_step(one.step, one.model, machine=measure_machine("cuda" if device == "cuda" else "cpu"))
        pages: Pages = "cached" if device == "cuda" else "kept" if pages_kept() else "returned"
        return PathProfile(spec.path, spec.ours, pages, batch_size, profile)


def _take_turns(steps: dict[str, Callable[[], None]], seconds: float, gpu: bool) -> dict[str, tuple[float, ...]]:
    """Seconds of every step, which take turns until `seconds` are over."""
    in_a_row, most_rounds = (STEPS_AT_ONCE, MOST_ROUNDS_ON_GPU) if gpu else (1, MOST_ROUNDS)
    several = {path: _repeated(step, in_a_row) for path, step in steps.items()}
    runs: dict[str, tuple[float, ...]] = dict.fromkeys(steps, ())
    began, warmup = now(), 1
    for _ in range(0, most_rounds, ROUNDS_AT_ONCE):
        for path, timing in alternate(several, rounds=ROUNDS_AT_ONCE, warmup=warmup).items():
            runs[path] += tuple(spent / in_a_row for spent in timing.seconds)
        warmup = 0
        if now() - began > seconds:
            break
    return runs


def _repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            step()

    return several


def _counted(one: Candidate, faults: list[int]) -> Callable[[], None]:
    def step() -> None:
        before = page_faults()
        one.step()
        faults.append(page_faults() - before)

    return step
