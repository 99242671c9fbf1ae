"""Scores read one field of the evidence, say which, write to none and print their public name."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from dst.scores import Evidence, Gradient, Magnitude, Random

WEIGHT = torch.tensor([[-2.0, 0.0], [torch.nan, -0.0]])
GRAD = torch.tensor([[1.0, -3.0], [-0.0, -torch.inf]])
KEYS = torch.tensor([[5, -7], [2**31 - 1, -(2**31)]], dtype=torch.int32)
MASK = torch.tensor([[True, False], [True, True]])
EVIDENCE = Evidence(WEIGHT, MASK, GRAD, {}, KEYS)
SCORES = {Magnitude(): frozenset(), Gradient(): frozenset({"grad"}), Random(): frozenset({"keys"})}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.int32), right.view(torch.int32))


def test_magnitude_is_the_absolute_weight():
    assert same_bits(Magnitude()(EVIDENCE), WEIGHT.abs())
    assert not Magnitude()(EVIDENCE)[1, 1].signbit()


def test_gradient_is_the_absolute_gradient():
    assert same_bits(Gradient()(EVIDENCE), GRAD.abs())


def test_random_is_the_keys():
    assert torch.equal(Random()(EVIDENCE), KEYS)


@pytest.mark.parametrize("score", SCORES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shape_and_layout_are_the_tensors(score, dtype: torch.dtype):
    weight = torch.randn(4, 3, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    keys = torch.arange(300, dtype=torch.int32).view(4, 3, 5, 5)
    evidence = Evidence(weight, weight > 0, -weight, {}, keys)
    assert score(evidence).shape == weight.shape


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_nothing_is_written(score):
    before = [tensor.clone() for tensor in (WEIGHT, GRAD, KEYS)]
    score(EVIDENCE)
    assert all(same_bits(a, b) for a, b in zip(before, (WEIGHT, GRAD, KEYS), strict=True))


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_needs_are_what_is_read(score):
    assert score.needs == SCORES[score]
    bare = Evidence(
        WEIGHT,
        MASK,
        GRAD if "grad" in score.needs else None,
        {},
        KEYS if "keys" in score.needs else None,
    )
    assert score(bare).shape == WEIGHT.shape
    nothing = Evidence(WEIGHT, MASK, None, {}, None)
    for need in score.needs:
        with pytest.raises(ValueError, match=f"must need '{need}'"):
            score(nothing)


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_a_score_is_a_value(score):
    assert repr(score) == f"{type(score).__name__}()"
    assert pickle.loads(pickle.dumps(score)) == score == type(score)()
    assert hash(score) == hash(type(score)())
    assert len({*SCORES, score}) == len(SCORES)


def test_evidence_cannot_be_exchanged():
    with pytest.raises(FrozenInstanceError):
        EVIDENCE.mask = ~MASK  # type: ignore[misc]
