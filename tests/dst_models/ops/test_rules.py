from __future__ import annotations

import logging

import pytest
import torch

from dst_models.ops import rules
from dst_models.ops.rules import Case, Forward, WeightGradient, forward_for, log_stock, weight_gradient_for


def case(
    dtype=torch.float32, channels_last=False, batch=8, channels=16, size=(14, 14), kernel=(5, 5)
) -> Case:
    return Case(dtype, channels_last, batch, channels, *size, *kernel)


@pytest.fixture(autouse=True)
def _avx512(monkeypatch: pytest.MonkeyPatch):
    """Decide as on an AVX-512 machine, whatever this one is."""
    monkeypatch.setattr(rules, "WIDEST_DIRECT_KERNEL", 13)
    forward_for.cache_clear()
    weight_gradient_for.cache_clear()
    yield
    forward_for.cache_clear()
    weight_gradient_for.cache_clear()


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (case(kernel=(1, 1)), Forward.PRODUCT),
        (case(kernel=(27, 5)), Forward.AS_GIVEN),
        (case(kernel=(5, 13)), Forward.AS_GIVEN),
        (case(kernel=(5, 15)), Forward.CHANNELS_LAST),
        (case(kernel=(5, 27), channels_last=True), Forward.AS_GIVEN),
        (case(dtype=torch.bfloat16), Forward.CHANNELS_LAST),
        (case(dtype=torch.float64, kernel=(5, 27)), Forward.AS_GIVEN),
    ],
)
def test_forward_table(given: Case, method: Forward) -> None:
    assert forward_for(given) is method


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (case(batch=64, size=(4, 4), kernel=(7, 7)), WeightGradient.POSITION_PAIRS),
        (case(batch=32, size=(4, 4), kernel=(7, 7)), WeightGradient.PLANES),
        (case(batch=512, size=(7, 7), kernel=(13, 13)), WeightGradient.PLANES),
        (case(kernel=(5, 27)), WeightGradient.PLANES),
        (case(kernel=(27, 27)), WeightGradient.PADDED_PLANES),
        (case(kernel=(27, 27), dtype=torch.bfloat16), WeightGradient.PADDED_PLANES),
        (case(dtype=torch.float64), WeightGradient.STOCK),
    ],
)
def test_weight_gradient_table(given: Case, method: WeightGradient) -> None:
    assert weight_gradient_for(given) is method


def test_a_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dst_models.ops.rules"):
        for _ in range(3):
            forward_for(case(kernel=(5, 27)))
    assert len(caplog.records) == 1
    assert "no fast NCHW path" in caplog.records[0].getMessage()


def test_the_stock_operator_is_logged_once_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    log_stock.cache_clear()
    with caplog.at_level(logging.INFO, logger="dst_models.ops.rules"):
        log_stock("no fast path on cuda")
        log_stock("no fast path on cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "depthwise_conv2d: stock operator (no fast path on cuda)"
    ]
