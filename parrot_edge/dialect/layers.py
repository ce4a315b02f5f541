"""What the networks are made of. Shapes: B recordings, C channels, F frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST_VARIANCE = 1e-5


def statistics(x: Tensor) -> Tensor:
    """Mean and standard deviation over time: (B, C, F) to (B, 2C)."""
    deviation = (x.var(dim=2, unbiased=False) + _LEAST_VARIANCE).sqrt()  # exports to plain ONNX
    return torch.cat((x.mean(dim=2), deviation), dim=1)


class ConvUnit(nn.Sequential):
    """Convolution over time, batch normalisation, ReLU: (B, C, F) to (B, C', F / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dilation: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv1d(
                inputs,
                outputs,
                kernel,
                stride=stride,
                dilation=dilation,
                padding=dilation * (kernel // 2),
                bias=False,
            ),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
        )


class SplitConv(nn.Module):
    """Convolution on parts of the channels, each part also hearing the result of the one before.

    So the last part has a receptive field `scales` times as wide as the first (Res2Net, arXiv 1904.01169).
    """

    def __init__(self, channels: int, scales: int, *, dilation: int) -> None:
        super().__init__()
        self.scales = scales
        self.convolutions = nn.ModuleList(
            ConvUnit(channels // scales, channels // scales, 3, dilation=dilation) for _ in range(scales)
        )

    def forward(self, x: Tensor) -> Tensor:
        heard, last = [], None
        for part, convolve in zip(x.chunk(self.scales, dim=1), self.convolutions, strict=True):
            last = convolve(part if last is None else part + last)  # (B, C / scales, F)
            heard.append(last)
        return torch.cat(heard, dim=1)  # (B, C, F)


class CosineHead(nn.Module):
    """Cosines between an embedding and a direction for each label: (B, E) to (B, L), -1..1."""

    def __init__(self, embedding: int, labels: int) -> None:
        super().__init__()
        self.directions = nn.Linear(embedding, labels, bias=False)
        nn.init.xavier_normal_(self.directions.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.normalize(x), functional.normalize(self.directions.weight))


def am_softmax(
    cosines: Tensor, targets: Tensor, *, margin: float, scale: float, weights: Tensor | None = None
) -> Tensor:
    """Additive-margin softmax loss (arXiv 1801.05599) of cosines (B, L):
    the true one must lead by `margin`."""
    lead = margin * functional.one_hot(targets, cosines.shape[1])
    return functional.cross_entropy(scale * (cosines - lead), targets, weight=weights)
