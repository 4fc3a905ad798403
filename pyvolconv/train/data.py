"""Volumes with labels for the training loop: a dataset that normalises on the way, and its three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from ..problem import Size3


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line: what was found, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class VolumeDataset(Dataset[tuple[Tensor, Tensor]]):
    """Some of the volumes of an array, which may be a memory map, normalised when they are asked for.

    Only the volumes asked for are read, so the array may be larger than memory. An integer index gives one sample, a
    list of integers a batch: with a `BatchSampler` as the `sampler` of a `DataLoader` a batch is one gather and no
    collation, and with `batch_size=...` the dataset works as any other.

    Args:
        volumes: all volumes, N x D x H x W, any real numeric dtype.
        labels: class of each volume, N integers from 0.
        indices: which of them this dataset holds.
        mean, std: subtracted from and then divided out of every voxel.

    Items:
        (volume, label): 1 x D x H x W float32 and an int64 scalar; for a list of B indices B x 1 x D x H x W and B.

    Example:
        >>> data = VolumeDataset(np.ones((4, 2, 3, 5), np.uint8), np.array([0, 1, 0, 1]), np.array([1, 3]), 0.0, 2.0)
        >>> x, y = data[[0, 1]]
        >>> x.shape, y.tolist(), x.max().item()
        (torch.Size([2, 1, 2, 3, 5]), [1, 1], 0.5)
    """

    def __init__(
        self,
        volumes: NDArray[np.generic],
        labels: NDArray[np.integer],
        indices: NDArray[np.integer],
        mean: float,
        std: float,
    ) -> None:
        self.volumes = np.asarray(volumes)
        self.indices = np.asarray(indices, dtype=np.int64)
        self.labels = torch.from_numpy(np.asarray(labels)[self.indices].astype(np.int64))
        self.mean = mean
        self.std = std
        # float32 holds 8- and 16-bit integers exactly; wider ones are centred in float64 before they are rounded.
        self._dtype = torch.float32 if np.can_cast(self.volumes.dtype, np.float32) else torch.float64

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        gathered = self.volumes[self.indices[index]]
        # A copy in native byte order, also where the index gave a view into the array.
        values = torch.from_numpy(np.array(gathered, dtype=gathered.dtype.newbyteorder("="), order="C"))
        normalised = values.to(self._dtype).sub_(self.mean).div_(self.std).to(torch.float32)
        return normalised.unsqueeze(-4), self.labels[index]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data of one problem.

    Attributes:
        train, validation, test: disjoint datasets over the same array.
        input_size: (D, H, W) of every volume, in voxels.
        classes: number of classes; labels are 0 to classes - 1.
        name: what the data are, one line for a report.
    """

    train: VolumeDataset
    validation: VolumeDataset
    test: VolumeDataset
    input_size: Size3
    classes: int
    name: str

    def fingerprint(self) -> dict[str, object]:
        """What a checkpoint must agree with to belong to these data."""
        return {
            "samples": [len(self.train), len(self.validation), len(self.test)],
            "input_size": list(self.input_size),
            "classes": self.classes,
            "mean": self.train.mean,
            "std": self.train.std,
        }


class Moments:
    """Mean and standard deviation of values that arrive in pieces, kept in float64.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979), which does not cancel where the mean is large
    beside the deviation, as a sum of squares would.

    Example:
        >>> moments = Moments()
        >>> moments.add(np.array([1.0, 2.0]))
        >>> moments.add(np.array([6.0]))
        >>> moments.mean, round(moments.std, 4)
        (3.0, 2.1602)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, values: NDArray[np.generic]) -> None:
        """Take in an array of any shape that is not empty."""
        piece = values.astype(np.float64)
        mean = float(piece.mean())
        piece -= mean
        squares = float(np.square(piece, out=piece).sum())
        total = self.count + piece.size
        difference = mean - self.mean
        self._squares += squares + difference**2 * self.count * piece.size / total
        self.mean += difference * piece.size / total
        self.count = total

    @property
    def std(self) -> float:
        """Square root of the mean squared deviation from the mean."""
        return float(np.sqrt(self._squares / self.count))


def make_splits(
    volumes: NDArray[np.generic], labels: NDArray[np.integer], parts: Sequence[NDArray[np.integer]], name: str
) -> Splits:
    """Splits of an array in memory, normalised by the voxels of the training part.

    Args:
        volumes: N x D x H x W.
        labels: N classes from 0.
        parts: indices of the training, validation and test volumes.
        name: of the data.
    """
    moments = Moments()
    for index in parts[0]:
        moments.add(volumes[index])
    return splits_of(volumes, labels, parts, moments, name)


def splits_of(
    volumes: NDArray[np.generic],
    labels: NDArray[np.integer],
    parts: Sequence[NDArray[np.integer]],
    moments: Moments,
    name: str,
) -> Splits:
    """As `make_splits`, the mean and deviation of the training part being known."""
    train, validation, test = (VolumeDataset(volumes, labels, part, moments.mean, moments.std) for part in parts)
    depth, height, width = volumes.shape[1:]
    return Splits(train, validation, test, (depth, height, width), int(labels.max()) + 1, name)


def batches(
    dataset: VolumeDataset, batch_size: int, shuffle: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A DataLoader of (B x 1 x D x H x W, B) batches, the last one perhaps smaller.

    Args:
        dataset: what to load.
        batch_size: B.
        shuffle: draws a new order for each pass over the loader; None keeps the order of the dataset.

    Example:
        >>> data = VolumeDataset(np.zeros((5, 1, 1, 1)), np.arange(5), np.arange(5), 0.0, 1.0)
        >>> [y.tolist() for x, y in batches(data, 2)]
        [[0, 1], [2, 3], [4]]
    """
    order = SequentialSampler(dataset) if shuffle is None else RandomSampler(dataset, generator=shuffle)
    # The loader draws a worker seed for every pass: from a generator of its own, so that torch's stays as it is.
    own = torch.Generator().manual_seed(0) if shuffle is None else shuffle
    return DataLoader(
        dataset,
        sampler=BatchSampler(order, batch_size, drop_last=False),
        batch_size=None,
        generator=own,
    )


def frame_average_accuracy(data: Splits) -> float:
    """Test accuracy, 0 to 1, of a linear classifier (logistic regression) that sees each volume's average over frames.

    Near 1 / classes, it says that the order of the frames is needed to tell the classes apart.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x, y = _frame_averages(data.train)
    test_x, test_y = _frame_averages(data.test)
    # The products are too small to share: on a busy machine BLAS threads waiting for each other take minutes.
    with threadpool_limits(1):
        return float(LogisticRegression(max_iter=1000).fit(x, y).score(test_x, test_y))


def _frame_averages(dataset: VolumeDataset) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    averages = [x.mean(dim=2).flatten(1) for x, _ in batches(dataset, 32)]
    return torch.cat(averages).numpy(), dataset.labels.numpy()
