"""Dynamic multi-scale convolution for dialects, after arXiv 2108.07787 (Interspeech 2021).

Known of it, from its abstract and public descriptions: three parts, *dynamic kernel convolution*
(branches of different temporal context, chosen for each channel by a softmax attention), *local
multi-scale learning* (channels split and convolved part by part) and *global multi-scale pooling*
(statistics of several bottleneck layers), on a densely connected TDNN.

Reconstructed here, as neither its full text nor its code was at hand: the backbone's layout (stem of
kernel 5, dense blocks of layers with a 1x1 bottleneck, transitions that halve the channels, as D-TDNN
has it, Interspeech 2020); that the branches stand in each dense layer and differ in dilation; that the
attention reads mean and deviation over time; that the split is Res2Net's and lies inside each branch;
that stem and transitions are what is pooled, by mean and deviation. Its published figures are not
reproduced: the data of AP20-OLR is given out on request only.

Each part has its switch in `DialectNetwork` of the recipe, so an ablation is a set of recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parrot_edge.dialect.baselines import ECAPA, XVector
from parrot_edge.dialect.features import BANDS
from parrot_edge.dialect.layers import ConvUnit, CosineHead, SplitConv, statistics
from parrot_edge.recipe import DialectNetwork


def build_network(options: DialectNetwork, labels: int) -> DialectModel:
    """The network of a recipe for so many labels, with random weights."""
    if options.architecture == "xvector":
        body: nn.Module = XVector(options.channels, options.embedding)
    elif options.architecture == "ecapa":
        body = ECAPA(options.channels, options.embedding)
    else:
        body = DynamicMultiScale(options)
    return DialectModel(body, options.embedding, labels)


def count_parameters(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class DialectModel(nn.Module):
    """Features in, embedding and cosines out; any body that makes embeddings will do."""

    def __init__(self, body: nn.Module, embedding: int, labels: int) -> None:
        super().__init__()
        self.body = body
        self.head = CosineHead(embedding, labels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features (B, F, 80) to embedding (B, E) and cosines (B, L)."""
        embedding = self.body(features.transpose(1, 2))  # (B, 80, F) in
        return embedding, self.head(embedding)


class DynamicMultiScale(nn.Module):
    """The densely connected TDNN with the three parts: (B, 80, F) to an embedding (B, E)."""

    def __init__(self, options: DialectNetwork) -> None:
        super().__init__()
        channels = options.channels
        self.stem = ConvUnit(BANDS, channels, 5, stride=options.stride)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        pooled = [channels]
        for layers, dilation in zip(options.blocks, options.dilations, strict=True):
            block = nn.Sequential()
            for _ in range(layers):
                block.append(DenseLayer(channels, options, dilation))
                channels += options.growth
            self.blocks.append(block)
            self.transitions.append(Transition(channels, channels // 2))
            channels //= 2
            pooled.append(channels)
        self.global_pooling = options.global_pooling
        size = 2 * (sum(pooled) if options.global_pooling else pooled[-1])
        self.embed = nn.Sequential(
            nn.BatchNorm1d(size), nn.Linear(size, options.embedding), nn.BatchNorm1d(options.embedding)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (B, C, F / stride)
        levels = [x]
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))  # (B, (C + layers * growth) / 2, F / stride)
            levels.append(x)
        pooled = [statistics(level) for level in (levels if self.global_pooling else levels[-1:])]
        return self.embed(torch.cat(pooled, dim=1))  # (B, E)


class DenseLayer(nn.Module):
    """A bottleneck and a convolution, put beside their input: (B, C, F) to (B, C + growth, F)."""

    def __init__(self, channels: int, options: DialectNetwork, dilation: int) -> None:
        super().__init__()
        width = options.bottleneck
        self.narrow = nn.Sequential(
            nn.BatchNorm1d(channels), nn.ReLU(), nn.Conv1d(channels, width, 1, bias=False)
        )
        self.activate = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        factors = options.branches if options.dynamic_kernel else options.branches[:1]
        branches = [
            make_branch(width, options.growth, options.local_scales, dilation * factor) for factor in factors
        ]
        self.convolve = DynamicKernel(branches, options.growth) if len(branches) > 1 else branches[0]

    def forward(self, x: Tensor) -> Tensor:
        new = self.convolve(self.activate(self.narrow(x)))  # (B, growth, F)
        return torch.cat((x, new), dim=1)


def make_branch(width: int, growth: int, scales: int, dilation: int) -> nn.Module:
    """(B, width, F) to (B, growth, F): one convolution, or the local multi-scale one and a 1x1."""
    if scales == 1:
        return nn.Conv1d(width, growth, 3, dilation=dilation, padding=dilation, bias=False)
    return nn.Sequential(SplitConv(width, scales, dilation=dilation), nn.Conv1d(width, growth, 1, bias=False))


class DynamicKernel(nn.Module):
    """Branches of different context, mixed for each channel by what is heard (as SKNet, arXiv 1903.06586)."""

    def __init__(self, branches: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.channels = channels
        hidden = max(8, channels // 2)
        self.squeeze = nn.Sequential(nn.Linear(2 * channels, hidden), nn.ReLU(inplace=True))
        self.choose = nn.Linear(hidden, len(branches) * channels)

    def forward(self, x: Tensor) -> Tensor:
        heard = torch.stack([branch(x) for branch in self.branches], dim=1)  # (B, K, C, F)
        logits = self.choose(self.squeeze(statistics(heard.sum(dim=1))))  # (B, K * C)
        shares = logits.reshape(-1, len(self.branches), self.channels).softmax(
            dim=1
        )  # (B, K, C), sum 1 over K
        return (heard * shares.unsqueeze(3)).sum(dim=1)  # (B, C, F)


class Transition(nn.Sequential):
    """Normalise and mix down: (B, C, F) to (B, C', F)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.BatchNorm1d(inputs), nn.ReLU(inplace=True), nn.Conv1d(inputs, outputs, 1, bias=False)
        )
