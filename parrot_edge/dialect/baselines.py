"""The networks that dynamic multi-scale convolution is compared with, under the same trainer.

Both take features (B, 80, F) and give an embedding (B, E). Written from the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parrot_edge.dialect.features import BANDS
from parrot_edge.dialect.layers import ConvUnit, SplitConv, statistics

_LEAST_VARIANCE = 1e-5


class XVector(nn.Module):
    """Five frame layers, statistics, two segment layers (Snyder et al., ICASSP 2018)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            ConvUnit(BANDS, channels, 5),
            ConvUnit(channels, channels, 3, dilation=2),
            ConvUnit(channels, channels, 3, dilation=3),
            ConvUnit(channels, channels, 1),
            ConvUnit(channels, 3 * channels, 1),
        )
        self.segment = nn.Sequential(
            nn.Linear(6 * channels, channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, embedding),
            nn.BatchNorm1d(embedding),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.segment(statistics(self.frames(x)))  # (B, 3C, F) pooled to (B, 6C)


class ECAPA(nn.Module):
    """ECAPA-TDNN (arXiv 2005.07143): Res2Net blocks with squeeze-excitation, all pooled by attention."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.stem = ConvUnit(BANDS, channels, 5)
        self.blocks = nn.ModuleList(ExcitedBlock(channels, dilation) for dilation in (2, 3, 4))
        self.aggregate = nn.Sequential(nn.Conv1d(3 * channels, 1536, 1), nn.ReLU(inplace=True))
        self.pool = AttentivePool(1536)
        self.embed = nn.Sequential(
            nn.BatchNorm1d(2 * 1536), nn.Linear(2 * 1536, embedding), nn.BatchNorm1d(embedding)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (B, C, F)
        levels = []
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        return self.embed(self.pool(self.aggregate(torch.cat(levels, dim=1))))  # (B, 3C, F) to (B, E)


class ExcitedBlock(nn.Module):
    """1x1, Res2Net convolution of scale 8, 1x1, squeeze-excitation, and the input added: (B, C, F) both."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            ConvUnit(channels, channels, 1),
            SplitConv(channels, 8, dilation=dilation),
            ConvUnit(channels, channels, 1),
        )
        self.excite = nn.Sequential(
            nn.Linear(channels, 128), nn.ReLU(inplace=True), nn.Linear(128, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        heard = self.convolve(x)
        return x + heard * self.excite(heard.mean(dim=2)).unsqueeze(2)


class AttentivePool(nn.Module):
    """Weighted mean and deviation, each channel with weights of its own over time: (B, C, F) to (B, 2C)."""

    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.attend = nn.Sequential(
            ConvUnit(3 * channels, hidden, 1), nn.Tanh(), nn.Conv1d(hidden, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        context = statistics(x).unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, 2C, F)
        weights = self.attend(torch.cat((x, context), dim=1)).softmax(dim=2)  # (B, C, F)
        mean = (weights * x).sum(dim=2)
        variance = (weights * x * x).sum(dim=2) - mean * mean
        return torch.cat((mean, variance.clamp(min=_LEAST_VARIANCE).sqrt()), dim=1)
