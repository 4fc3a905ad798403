"""Whether a call is an ordinary one, for which the way through torch's dispatcher would change nothing.

An operator call lets autograd, autocast, the transforms of torch.func, modes (FLOP counters, fake tensors), tracers and
so on step in, each through Python: about 30 us in all, where a tiny convolution takes one. Who would step in follows
from two sets of dispatch keys, those of the tensors and those of the thread. A call is ordinary when both are what they
are for dense tensors of the CPU or of CUDA in a fresh thread; then nobody but autograd steps in, and the caller can do
its part.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad

_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_profiling = torch._C._autograd._profiler_enabled

_of_tensors: set[int] = set()
_of_threads: set[tuple[int, int]] = set()


def is_ordinary(*tensors: Tensor | None, under_profiler: bool = False) -> bool:
    """Whether nothing but autograd would step into an operator call with these operands, here and now.

    Forward-mode derivatives count as something else, and so does the profiler, which wants to see operators.

    Args:
        tensors: the operands; None stands for one that is left out.
        under_profiler: whether a call is ordinary while the profiler records, too.

    Example:
        >>> is_ordinary(torch.zeros(2)), is_ordinary(torch.zeros(2), None), is_ordinary(torch.zeros(2, device="meta"))
        (True, True, False)
        >>> with torch.autocast("cpu"):
        ...     is_ordinary(torch.zeros(2))
        False
    """
    if torch.compiler.is_compiling() or (_profiling() and not under_profiler) or forward_ad._current_level >= 0:
        return False
    if (_included().raw_repr(), _excluded().raw_repr()) not in _of_threads:
        return False
    for tensor in tensors:
        if tensor is not None and _keys_of(tensor).raw_repr() not in _of_tensors and not _is_first_on_cuda(tensor):
            return False
    return True


def _is_first_on_cuda(tensor: Tensor) -> bool:
    """Whether the keys are those of dense CUDA tensors, which are not looked at before there is one."""
    global _knows_cuda
    # A tensor that is only said to be on CUDA is no reason to start it.
    if _knows_cuda or not tensor.is_cuda or not torch.cuda.is_initialized():
        return False
    _in_fresh_thread("cuda")
    _knows_cuda = True
    return _keys_of(tensor).raw_repr() in _of_tensors


def _observe(device: str) -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            _of_tensors.add(_keys_of(torch.empty(0, device=device)).raw_repr())
            _of_threads.add((_included().raw_repr(), _excluded().raw_repr()))


def _in_fresh_thread(device: str) -> None:
    # Whoever asks may be inside of a mode.
    observer = threading.Thread(target=_observe, args=(device,))
    observer.start()
    observer.join()


_knows_cuda = False
_in_fresh_thread("cpu")
