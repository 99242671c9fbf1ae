from __future__ import annotations

import pytest
import torch
from helpers.small_models import SMALL, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dst_models import create_model
from dst_models.layers import DropPath, LayerNorm2d, drop_path_rates


def test_drop_path_is_the_identity_in_eval_mode_and_at_zero() -> None:
    x = torch.randn(4, 3, 2, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.8])
def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean(drop_prob: float) -> None:
    torch.manual_seed(0)
    samples = 20_000
    y = DropPath(drop_prob)(torch.ones(samples, 2, 3)).flatten(1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop_prob)])
    # five standard deviations of a binomial share
    tolerance = 5 * (drop_prob * (1 - drop_prob) / samples) ** 0.5
    assert (y[:, 0] == 0).float().mean().item() == pytest.approx(drop_prob, abs=tolerance)


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0, 2.0])
def test_drop_path_refuses_what_is_no_probability(drop_prob: float) -> None:
    with pytest.raises(ValueError, match=r"give a probability in \[0, 1\)"):
        DropPath(drop_prob)


@given(st.floats(0, 0.9), st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_drop_path_rates_rise_linearly_from_zero(rate: float, depths: list[int]) -> None:
    rates = list(drop_path_rates(rate, depths))
    expected = torch.linspace(0, rate, sum(depths), dtype=torch.float64).tolist()
    assert rates == pytest.approx(expected, abs=1e-12)


def test_drop_path_rates_of_a_single_block_is_zero() -> None:
    assert list(drop_path_rates(0.5, (1,))) == [0.0]


@pytest.mark.parametrize("case", ["slak", "convnext", "replknet"])
def test_the_last_block_has_the_full_drop_path_rate(case: str) -> None:
    name, settings = SMALL[case]
    model = create_model(name, **settings, drop_path_rate=0.4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.4)
    assert rates == sorted(rates)


def test_layer_norm_equals_mean_and_variance_over_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    norm = LayerNorm2d(7).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    y = norm(x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", ["slak_tiny", "convnext_tiny"])
def test_initial_weights_are_as_published(family: str) -> None:
    torch.manual_seed(0)
    model = create_model(family, depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), head_init_scale=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif name.endswith("gamma"):
            assert torch.equal(parameter, torch.full_like(parameter, 1e-6))
        elif parameter.ndim > 1:
            expected = 0.01 if name == "head.weight" else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("case", SMALL)
def test_init_weights_makes_a_model_from_the_meta_device_whole(case: str) -> None:
    name, settings = SMALL[case]
    with torch.device("meta"):
        model = create_model(name, **settings)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    fresh = small_model(case)
    fresh.init_weights()
    torch.manual_seed(0)
    fresh.init_weights()
    assert {key for key, value in fresh.state_dict().items() if value.eq(7).all()} == set()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, fresh.state_dict()[key], msg=key)
