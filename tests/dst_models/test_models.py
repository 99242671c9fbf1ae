"""Every family through the same probes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.small_models import SMALL, relative_error, small_model
from torch import nn

FAMILIES = ("slak", "convnext", "replknet")


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("side", [(64, 64), (65, 97), (32, 160), (224, 32)], ids=str)
@torch.no_grad()
def test_feature_maps_have_the_stated_channels_and_strides(case: str, side: tuple[int, int]) -> None:
    model = small_model(case)
    maps = model.forward_features(torch.randn(2, 3, *side))
    assert isinstance(maps, tuple)
    round_up = case.startswith("replknet")
    for feature, channels, stride in zip(maps, model.dims, model.strides, strict=True):
        expected = tuple(-(-length // stride) if round_up else length // stride for length in side)
        assert feature.shape == (2, channels, *expected)
    assert model(torch.randn(2, 3, *side)).shape == (2, 7)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@torch.no_grad()
def test_the_merged_copy_equals_the_model(case: str, dtype: torch.dtype, tolerance: float) -> None:
    model = small_model(case).to(dtype)
    before = copy.deepcopy(model.state_dict())
    model.train()
    merged = model.merge()
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    model.eval()
    assert (model(x)[0] - model(x)[1]).abs().max() > 1e-3 * model(x).abs().max()
    assert relative_error(merged(x), model(x)) < tolerance
    for ours, theirs in zip(merged.forward_features(x), model.forward_features(x), strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("case", SMALL)
def test_a_merged_copy_is_frozen_and_stays_merged(case: str) -> None:
    merged = small_model(case).merge()
    assert not merged.training
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    x = torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(merged)).merge()
    assert relative_error(again(x), merged(x)) < 1e-6


@pytest.mark.parametrize("family", ["slak", "replknet"])
def test_synchronised_norms_merge_alike(family: str) -> None:
    model = small_model(family)
    expected = model.merge().state_dict()
    actual = nn.SyncBatchNorm.convert_sync_batchnorm(model).merge().state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", SMALL)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    model = small_model(case, drop_path_rate=0.0).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_are_equal_and_independent(family: str) -> None:
    model = small_model(family)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    rebuilt = small_model(family)
    nn.init.zeros_(rebuilt.head.weight)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rebuilt):
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.head.weight)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_channels_last_input_gives_the_same(family: str) -> None:
    model = small_model(family)
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(model(x.to(memory_format=torch.channels_last)), model(x)) < 1e-5


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("merged", [False, True], ids=["as trained", "merged"])
@torch.no_grad()
def test_export_gives_the_same(case: str, merged: bool) -> None:
    model = small_model(case, depths=(1, 1, 1, 1))
    model = model.merge() if merged else model
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x), model(x)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_one_graph(family: str) -> None:
    """Trace and differentiate as torch.compile does, without generating code."""
    model = small_model(family, drop_path_rate=0.3).train()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    actual = compiled(x)
    assert relative_error(actual, expected) < 1e-5
    actual.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # from inside torch
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_compiled_model_gives_the_same(family: str) -> None:
    model = small_model(family, depths=(1, 1, 1, 1))
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5
