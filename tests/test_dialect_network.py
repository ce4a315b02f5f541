"""The networks: every switch does what it says, and any length is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from parrot_edge.dialect.layers import SplitConv, am_softmax, statistics
from parrot_edge.dialect.network import DynamicKernel, build_network, count_parameters
from parrot_edge.recipe import DialectNetwork, DialectRecipe, list_recipes, load_recipe

SHIPPED = [recipe.name for recipe in list_recipes() if isinstance(load_recipe(recipe.name), DialectRecipe)]

TINY = DialectNetwork(
    channels=16, blocks=(2, 2), dilations=(1, 3), growth=8, bottleneck=16, local_scales=4, embedding=12
)


@pytest.mark.parametrize("architecture", ["dms", "xvector", "ecapa"])
@pytest.mark.parametrize("frames", [8, 33, 250])
def test_any_length_becomes_an_embedding_and_cosines(architecture: str, frames: int) -> None:
    torch.manual_seed(0)
    model = build_network(replace(TINY, architecture=architecture), 3).eval()  # type: ignore[arg-type]
    embedding, cosines = model(torch.randn(2, frames, 80))
    assert embedding.shape == (2, 12)
    assert cosines.shape == (2, 3)
    assert (cosines.abs() <= 1).all()


@pytest.mark.parametrize("name", SHIPPED)
def test_network_of_every_shipped_recipe_learns_from_a_step(name: str) -> None:
    torch.manual_seed(0)
    model = build_network(load_recipe(name).network, 3).train()
    features, labels = torch.randn(4, 60, 80), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(10 * model(features)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_there_are_dialect_recipes() -> None:
    assert len(SHIPPED) >= 7


def kinds(options: DialectNetwork) -> set[str]:
    return {type(module).__name__ for module in build_network(options, 3).modules()}


def test_each_part_has_its_switch() -> None:
    assert {"DynamicKernel", "SplitConv"} <= kinds(TINY)
    assert "DynamicKernel" not in kinds(replace(TINY, dynamic_kernel=False))
    assert "SplitConv" not in kinds(replace(TINY, local_scales=1))
    pooled = [build_network(replace(TINY, global_pooling=on), 3).body.embed[0] for on in (True, False)]
    # stem 16, then (16 + 2 * 8) / 2 = 16 after each block; mean and deviation of each
    assert [each.num_features for each in pooled] == [2 * 48, 2 * 16]


def test_stride_of_the_stem_shortens_what_follows() -> None:
    stem = build_network(replace(TINY, stride=2), 3).body.stem
    assert stem(torch.randn(1, 80, 100)).shape == (1, 16, 50)


def test_kernel_is_chosen_by_the_input_and_shares_sum_to_one() -> None:
    torch.manual_seed(0)
    ones = [nn.Conv1d(4, 4, 1, bias=False) for _ in range(2)]
    for convolution in ones:
        nn.init.dirac_(convolution.weight)
    mixed = DynamicKernel(ones, 4)  # type: ignore[arg-type]
    x = torch.randn(3, 4, 20)
    assert torch.allclose(mixed(x), x, atol=1e-6)  # of equal branches any mixture is the same
    nn.init.zeros_(ones[1].weight)
    shares = (mixed(x) / x).mean(dim=2)  # of the first branch, by recording and channel
    assert ((shares > 0) & (shares < 1)).all()
    assert not torch.allclose(shares[0], shares[1])


def test_each_part_of_a_split_hears_further_than_the_one_before() -> None:
    split = SplitConv(8, 4, dilation=2).eval()
    for parameter in split.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(1, 8, 41, requires_grad=True)
    reach = []
    for part in range(4):
        [gradient] = torch.autograd.grad(split(x)[0, 2 * part, 20], x)
        heard = gradient.abs().sum(dim=(0, 1)).nonzero()
        reach.append(int(heard.max() - heard.min()) + 1)
    assert reach == [5, 9, 13, 17]


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = build_network(TINY, 3)
    _, cosines = model(torch.randn(4, 50, 80))
    am_softmax(cosines, torch.tensor([0, 1, 2, 0]), margin=0.2, scale=30.0).backward()
    silent = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert not silent
    assert count_parameters(model) == sum(each.numel() for each in model.parameters())


def test_am_softmax_asks_for_a_lead_of_the_margin() -> None:
    cosines = torch.tensor([[0.5, 0.3]])
    expected = torch.log1p(torch.exp(torch.tensor(10 * (0.3 - (0.5 - 0.2)))))
    assert am_softmax(cosines, torch.tensor([0]), margin=0.2, scale=10.0) == pytest.approx(expected.item())


def test_statistics_are_mean_and_deviation() -> None:
    x = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    assert statistics(x)[0].tolist() == pytest.approx([4.0, 5**0.5], rel=1e-5)
