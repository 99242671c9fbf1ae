"""Our models, loaded through the converter, reproduce the outputs of the published code."""

from __future__ import annotations

import pytest
import torch
from helpers.official import load_official, our_model
from helpers.small_models import relative_error

from dst_models import from_official

FAMILIES = ("slak", "convnext", "replknet")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merged", [False, True], ids=["as trained", "merged"])
@torch.no_grad()
def test_logits_equal_the_published_ones(family: str, merged: bool) -> None:
    official = load_official(family)
    model = our_model(family, official.config).eval()
    model.load_state_dict(from_official(official.state), strict=True)
    model = model.merge() if merged else model
    assert relative_error(model(official.input), official.logits) < 1e-5


@torch.no_grad()
def test_slak_fixture_keeps_its_zeros() -> None:
    official = load_official("slak")
    model = our_model("slak", official.config)
    model.load_state_dict(from_official(official.state), strict=True)
    zeros = sum(int((value == 0).sum()) for value in official.state.values() if value.ndim > 1)
    assert sum(int((value == 0).sum()) for value in model.parameters() if value.ndim > 1) == zeros > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_tensor_of_the_fixture_matters(family: str) -> None:
    """A converter that swaps or loses a tensor must not pass for right."""
    official = load_official(family)
    converted = from_official(official.state)
    assert len(converted) == len(official.state)
    assert {id(value) for value in converted.values()} >= {
        id(value) for value in official.state.values() if value.ndim == 1
    }
