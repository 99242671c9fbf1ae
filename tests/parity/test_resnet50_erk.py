"""ResNet-50's sparse counts by the formulas of RigL (Evci et al., ICML 2020, appendix H) at four digits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.resnet50 import ResNet50
from torch import Tensor, nn

from dst.algorithms import PruneAndGrow, rigl, set_, static
from dst.counters import Counts, count, training_macs
from dst.counts import active_counts
from dst.distribution import Distribution, erk, uniform
from dst.schedules import Every
from dst.scores import Gradient
from dst.selection import select

WEIGHTS = 25_502_912
CAPS = {
    0.8: [
        "layer1.0.conv1.weight",
        "layer1.0.conv3.weight",
        "layer1.0.downsample.0.weight",
        "layer1.1.conv1.weight",
        "layer1.1.conv3.weight",
        "layer1.2.conv1.weight",
        "layer1.2.conv3.weight",
        "layer2.0.conv1.weight",
    ],
    0.9: ["layer1.0.conv1.weight"],
}
# sparsity: inference and training by RigL and by SNFS with ERK, inference with a uniform sparsity that leaves
# the first layer dense; all as shares of the dense MACs
SHARES = {
    0.8: (0.4138, 0.4157, 0.6092, 0.2231),
    0.9: (0.2418, 0.2443, 0.4946, 0.1260),
    0.95: (0.1217, 0.1246, 0.4145, 0.0774),
    0.965: (0.0852, 0.0882, 0.3901, 0.0628),
    0.99: (0.0243, 0.0276, 0.3495, 0.0386),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return ResNet50()


def first_active(shape: tuple[int, ...], k: int) -> Tensor:
    size = torch.Size(shape)
    return (torch.arange(size.numel()) < k).view(size)


def counts_at(model: nn.Module, distribution: Distribution, sparsity: float) -> Counts:
    params = select(model)
    sizes = {name: parameter.numel() for name, parameter in params.items()}
    active = active_counts(sizes, distribution(params, sparsity), sparsity=sparsity)
    masks = {name: first_active(tuple(params[name].shape), k) for name, k in active.items()}
    return count(model, (3, 224, 224), masks)


def test_dense_counts(model: nn.Module) -> None:
    params = select(model)
    assert len(params) == 54
    assert sum(parameter.numel() for parameter in params.values()) == WEIGHTS
    counts = count(model, (3, 224, 224))
    assert counts.params == counts.nonzero == 25_557_032
    assert round(counts.macs / 1e9, 4) == 4.0892
    assert counts.macs == 4_089_184_256


@pytest.mark.parametrize("sparsity", CAPS)
def test_erk_keeps_these_layers_dense(model: nn.Module, sparsity: float) -> None:
    sparsities = erk(select(model), sparsity)
    assert [name for name, value in sparsities.items() if value == 0.0] == CAPS[sparsity]


@pytest.mark.parametrize("sparsity", SHARES)
def test_erk_holds_exactly_the_weights_asked_for(model: nn.Module, sparsity: float) -> None:
    counts = counts_at(model, erk, sparsity)
    dense_elsewhere = counts.params - WEIGHTS
    assert counts.nonzero - dense_elsewhere == round((1 - sparsity) * WEIGHTS)


@pytest.mark.parametrize("sparsity", SHARES)
def test_shares_of_the_dense_macs(model: nn.Module, sparsity: float) -> None:
    inference, rigl_training, snfs_training, uniform_inference = SHARES[sparsity]
    counts = counts_at(model, erk, sparsity)
    dense_training = 3 * counts.macs
    assert round(counts.sparse_macs / counts.macs, 4) == inference
    assert round(training_macs(counts, rigl(total_steps=32_000)) / dense_training, 4) == rigl_training
    for algorithm in (static(), set_(total_steps=32_000)):
        assert training_macs(counts, algorithm) == 3 * counts.sparse_macs
    snfs = PruneAndGrow(due=Every(100), grow=Gradient(), masks_gradients=False)
    # The table's column follows from shares that were already rounded, so its last digit is one off.
    assert abs(training_macs(counts, snfs) / dense_training - snfs_training) < 1e-4
    plain = counts_at(model, partial(uniform, dense_first=True), sparsity)
    assert round(plain.sparse_macs / plain.macs, 4) == uniform_inference


def test_uniform_scales_every_layer(model: nn.Module) -> None:
    counts = counts_at(model, uniform, 0.75)
    assert counts.sparse_macs * 4 == counts.macs
