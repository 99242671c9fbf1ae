"""SLaK's published counts (Liu et al., ICLR 2023); its "FLOPs" are MACs of non-zero weights."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

import dst_models
from dst.counters import Counts, count
from dst.counts import active_counts
from dst.distribution import erk, uniform, warn_if_mostly_dense
from dst.saliency import snip
from dst.selection import select

SIZE = (3, 224, 224)
# name: parameters, selected weights, non-zero at 40 % (M), GMACs dense, uniform 40 %, ERK 40 %
MODELS = {
    "slak_tiny": (50_703_838, 50_576_524, 30.47, 8.705, 5.223, 7.149),
    "slak_small": (91_131_820, 90_878_758, 54.78, 16.604, 9.962, 12.136),
    "slak_base": (157_950_792, 157_613_790, 94.91, 28.509, 17.105, 20.780),
}
WIDTH_ONE = {
    "slak_tiny": (30.82, 5.419),
    "slak_small": (55.57, 10.251),
    "slak_base": (95.72, 17.445),
}
# (model, sparsity): tensors that ERK keeps dense, of how many
CAPS = {
    ("slak_tiny", 0.4): (67, 95),
    ("slak_small", 0.4): (121, 185),
    ("slak_base", 0.4): (121, 185),
    ("slak_tiny", 0.6): (37, 95),
    ("slak_tiny", 0.8): (25, 95),
    ("slak_tiny", 0.9): (19, 95),
}
# sparsity: densities of SLaK-T by shape, at three digits
DENSITIES = {
    0.4: {
        (1996, 499): 0.795,
        (499, 1996): 0.795,
        (3992, 998): 0.397,
        (998, 3992): 0.397,
        (249, 124, 2, 2): 0.968,
        (499, 249, 2, 2): 0.480,
        (998, 499, 2, 2): 0.239,
        (1000, 998): 0.635,
    },
    0.8: {
        (124, 1, 51, 5): 0.526,
        (124, 1, 5, 51): 0.526,
        (496, 124): 0.926,
        (996, 249): 0.461,
        (1996, 499): 0.230,
        (3992, 998): 0.115,
    },
    0.9: {(124, 1, 51, 5): 0.253, (124, 1, 5, 51): 0.253},
}


@functools.cache
def build(name: str, width_factor: float = 1.3) -> nn.Module:
    with torch.device("meta"):
        return dst_models.create_model(name, width_factor=width_factor)


def mask_of(parameter: Tensor, k: int) -> Tensor:
    mask = torch.zeros(parameter.numel(), dtype=torch.bool)
    mask[:k] = True
    return mask.view(parameter.shape)


def counts_at(model: nn.Module, sparsities: dict[str, float], sparsity: float) -> Counts:
    params = select(model)
    sizes = {name: parameter.numel() for name, parameter in params.items()}
    active = active_counts(sizes, sparsities, sparsity=sparsity)
    assert sum(active.values()) == round((1 - sparsity) * sum(sizes.values()))
    return count(model, SIZE, {name: mask_of(params[name], k) for name, k in active.items()})


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_macs(name: str) -> None:
    parameters, selected, nonzero, dense, at_uniform, at_erk = MODELS[name]
    model = build(name)
    params = select(model)
    assert all(parameter.dim() in (2, 4) for parameter in params.values())
    assert sum(parameter.numel() for parameter in params.values()) == selected
    plain = counts_at(model, uniform(params, 0.4), 0.4)
    assert plain.params == parameters
    assert round(plain.macs / 1e9, 3) == dense
    assert plain.nonzero == parameters - selected + round(0.6 * selected)
    assert round(plain.nonzero / 1e6, 2) == nonzero
    assert round(plain.sparse_macs / 1e9, 3) == at_uniform
    erdos = counts_at(model, erk(params, 0.4), 0.4)
    assert erdos.nonzero == plain.nonzero
    assert round(erdos.sparse_macs / 1e9, 3) == at_erk


@pytest.mark.parametrize("name", WIDTH_ONE)
def test_width_one(name: str) -> None:
    counts = count(build(name, 1.0), SIZE)
    assert (round(counts.params / 1e6, 2), round(counts.macs / 1e9, 3)) == WIDTH_ONE[name]


@pytest.mark.parametrize(("name", "sparsity"), CAPS)
def test_erk_caps(name: str, sparsity: float) -> None:
    sparsities = erk(select(build(name)), sparsity)
    dense = sum(value == 0.0 for value in sparsities.values())
    assert (dense, len(sparsities)) == CAPS[name, sparsity]
    if dense * 2 > len(sparsities):
        with pytest.warns(UserWarning, match=f"{dense} of {len(sparsities)} selected tensors dense"):
            warn_if_mostly_dense(sparsities)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_if_mostly_dense(sparsities)


@pytest.mark.parametrize("sparsity", DENSITIES)
def test_erk_densities_of_the_tiny_model(sparsity: float) -> None:
    params = select(build("slak_tiny"))
    golden = DENSITIES[sparsity]
    seen = set()
    for name, value in erk(params, sparsity).items():
        shape = tuple(params[name].shape)
        if shape in golden:
            seen.add(shape)
            assert abs((1 - value) - golden[shape]) <= 5e-4
        elif sparsity == 0.4:
            assert value == 0.0, name
    assert seen == set(golden)


@pytest.mark.slow
def test_snip_ratios_give_the_published_macs() -> None:
    # 4.94 GMACs was one draw of random data and weights, and the paper prints 5.0; draws differ by about 2 %.
    torch.manual_seed(0)
    model = dst_models.create_model("slak_tiny")
    images, labels = torch.randn(4, *SIZE), torch.randint(1000, (4,))
    params = select(model)
    sparsities = snip(params, 0.4, loss=lambda: nn.functional.cross_entropy(model(images), labels))
    counts = counts_at(model, sparsities, 0.4)
    assert round(counts.nonzero / 1e6, 2) == 30.47
    assert counts.sparse_macs / 1e9 == pytest.approx(4.94, rel=0.03)
