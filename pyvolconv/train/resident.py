"""Volumes that stay on a GPU: a small data set is copied and normalised there once, and batches are gathered there.

A GPU trains a small network faster than a processor prepares its batches. Every pass over the data draws the same order
as it does over volumes on the host, and the values are the same, so runs do not differ in what they learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .data import Splits, VolumeDataset

SHARE_OF_FREE_MEMORY = 0.25
"""How much of a GPU's free memory volumes may take."""
_VOLUMES_AT_ONCE = 64


class ResidentDataset(VolumeDataset):
    """The volumes and labels of another dataset on a device, as float32 and normalised.

    Args:
        source: what to copy.
        device: where to.

    Items:
        as those of `source`, on the device.

    Example:
        >>> import numpy as np
        >>> source = VolumeDataset(np.ones((4, 2, 3, 5), np.uint8), np.array([0, 1, 0, 1]), np.array([1, 3]), 0.0, 2.0)
        >>> x, y = ResidentDataset(source, torch.device("cpu"))[[1, 0]]
        >>> x.shape, y.tolist()
        (torch.Size([2, 1, 2, 3, 5]), [1, 1])
    """

    def __init__(self, source: VolumeDataset, device: torch.device) -> None:
        self.indices = source.indices
        self.mean = source.mean
        self.std = source.std
        self.labels = source.labels.to(device)
        self._values = torch.empty((len(source), 1, *source.volumes.shape[1:]), device=device)
        for start in range(0, len(source), _VOLUMES_AT_ONCE):
            part = range(start, min(start + _VOLUMES_AT_ONCE, len(source)))
            self._values[part.start : part.stop] = source[list(part)][0].to(device)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            return self._values[index], self.labels[index]
        # The host goes on: a copy that it waited for would wait for all that the GPU has to do before.
        chosen = torch.tensor(index).to(self._values.device, non_blocking=True)
        return self._values.index_select(0, chosen), self.labels.index_select(0, chosen)


def resident(data: Splits, device: str) -> Splits:
    """The same splits with their volumes on the device; `data` itself on the CPU, and where they take too much memory.

    Args:
        data: splits on the host.
        device: "cpu" or "cuda", the current one.
    """
    if device == "cpu" or bytes_of(data) > SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0]:
        return data
    train, validation, test = (
        ResidentDataset(part, torch.device(device)) for part in (data.train, data.validation, data.test)
    )
    return replace(data, train=train, validation=validation, test=test)


def bytes_of(data: Splits) -> int:
    """What all volumes take as float32."""
    depth, height, width = data.input_size
    return 4 * depth * height * width * (len(data.train) + len(data.validation) + len(data.test))
