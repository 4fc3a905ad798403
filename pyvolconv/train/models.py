"""The two networks of the comparison: a 3-D CNN and an LSTM that read the same volumes.

Both take N x 1 x D x H x W volumes (N x D x H x W is accepted too) and return N x classes logits. The CNN sees a
volume; the LSTM sees a sequence of D frames, each flattened to H * W values. Their sizes are those of the published
comparison that this package repeats: on 29 x 30 x 60 volumes and two classes the CNN has 97,194 parameters, the LSTM
118,562 and its bidirectional variant 239,170.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..problem import Size3

NetworkName = Literal["cnn", "lstm", "bilstm"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)

MISSION_SIZE: Size3 = (29, 30, 60)


class VolumeCNN(nn.Module):
    """Three 3x3x3 convolutions, each followed by ReLU and max-pooling, and two dense layers.

    Every convolution has stride 1 and one zero of padding on each side, so it keeps the size; every pooling halves it,
    rounding up, so volumes of any size from 1 x 1 x 1 fit.

    Args:
        input_size: (D, H, W) of the volumes, in voxels.
        classes: number of logits.
        channels: output channels of the three convolutions.
        hidden: width of the first dense layer.

    Shape:
        input N x 1 x D x H x W or N x D x H x W, output N x classes.

    Raises:
        ValueError: a size or the number of classes is impossible.

    Example:
        >>> VolumeCNN((29, 30, 60))(torch.zeros(2, 1, 29, 30, 60)).shape
        torch.Size([2, 2])
        >>> parameter_count(VolumeCNN((29, 30, 60)))
        97194
    """

    def __init__(
        self,
        input_size: Size3 = MISSION_SIZE,
        classes: int = 2,
        channels: tuple[int, int, int] = (16, 24, 32),
        hidden: int = 16,
    ) -> None:
        super().__init__()
        _check(input_size, classes)
        layers: list[nn.Module] = []
        in_channels, size = 1, input_size
        for out_channels in channels:
            layers += [
                nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool3d(2, ceil_mode=True),
            ]
            in_channels = out_channels
            size = (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * size[0] * size[1] * size[2], hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        volumes = x.unsqueeze(1) if x.dim() == 4 else x
        logits: Tensor = self.classifier(self.features(volumes))
        return logits


class FrameLSTM(nn.Module):
    """Two LSTM layers over the frames of a volume, the first handing on its whole sequence, and a dense layer.

    The dense layer reads the second LSTM's last state; with `bidirectional`, the last states of both directions, which
    for the backward direction is the one after frame 0.

    Args:
        input_size: (D, H, W) of the volumes: D frames of H * W values.
        classes: number of logits.
        hidden: width of each LSTM, per direction.
        bidirectional: read the frames in both directions (239,170 parameters at the default sizes).

    Shape:
        input N x 1 x D x H x W or N x D x H x W, output N x classes.

    Raises:
        ValueError: a size or the number of classes is impossible.

    Example:
        >>> FrameLSTM((29, 30, 60))(torch.zeros(2, 1, 29, 30, 60)).shape
        torch.Size([2, 2])
        >>> parameter_count(FrameLSTM()), parameter_count(FrameLSTM(bidirectional=True))
        (118562, 239170)
    """

    def __init__(
        self,
        input_size: Size3 = MISSION_SIZE,
        classes: int = 2,
        hidden: int = 16,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        _check(input_size, classes)
        directions = 2 if bidirectional else 1
        values = input_size[1] * input_size[2]
        self.lstm1 = nn.LSTM(values, hidden, batch_first=True, bidirectional=bidirectional)
        self.lstm2 = nn.LSTM(directions * hidden, hidden, batch_first=True, bidirectional=bidirectional)
        self.classifier = nn.Linear(directions * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        volumes = x.squeeze(1) if x.dim() == 5 else x
        sequence, _ = self.lstm1(volumes.flatten(2))
        _, (last, _) = self.lstm2(sequence)
        logits: Tensor = self.classifier(last.transpose(0, 1).flatten(1))
        return logits


def build(
    name: NetworkName, input_size: Size3 = MISSION_SIZE, classes: int = 2, seed: int = 0
) -> VolumeCNN | FrameLSTM:
    """A new network whose initial weights depend on the arguments only; torch's random state is left as it was.

    Args:
        name: "cnn", "lstm" or "bilstm".
        input_size: (D, H, W) of the volumes.
        classes: number of logits.
        seed: of the initial weights.

    Raises:
        ValueError: there is no such network, or a size is impossible.

    Example:
        >>> first, second = build("cnn", (4, 5, 6), seed=3), build("cnn", (4, 5, 6), seed=3)
        >>> all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
        True
    """
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; expected one of {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "cnn":
            return VolumeCNN(input_size, classes)
        return FrameLSTM(input_size, classes, bidirectional=name == "bilstm")


def parameter_count(model: nn.Module) -> int:
    """The number of trainable values in a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check(input_size: Size3, classes: int) -> None:
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size={tuple(input_size)} must be three sizes (D, H, W) of at least 1")
    if classes < 2:
        raise ValueError(f"classes={classes}: a classifier needs at least 2")
