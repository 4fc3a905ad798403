"""Where the time of a training step goes: work counted, machine measured, every operator timed.

Example:
    >>> import torch
    >>> [cost.op for cost in count_model(torch.nn.Conv3d(1, 4, 3), torch.zeros(2, 1, 8, 8, 8))]
    ['aten.convolution, aten.convolution_backward']
"""

from .counting import LayerCost, PassCost, count_model, count_optimizer
from .machine import Machine, measure_machine
from .pages import KeepPages, StepMemory, keep_pages, measure_memory, page_faults, pages_kept
from .profiler import StepEntry, StepProfile, StepSplit, profile_step
from .timing import Timing, alternate, time_step

__all__ = [
    "KeepPages",
    "LayerCost",
    "Machine",
    "PassCost",
    "StepEntry",
    "StepMemory",
    "StepProfile",
    "StepSplit",
    "Timing",
    "alternate",
    "count_model",
    "count_optimizer",
    "keep_pages",
    "measure_machine",
    "measure_memory",
    "page_faults",
    "pages_kept",
    "profile_step",
    "time_step",
]
