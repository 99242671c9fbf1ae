from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dst.algorithms import set_, static
from dst.export import apply_masks, masks_from_weights
from dst.optimizer import SparseOptimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8))


def wrapped(model: nn.Module, sparsity: float = 0.6, seed: int = 0) -> SparseOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=0.1)
    return SparseOptimizer(base, model, sparsity=sparsity, algorithm=static(), seed=seed)


def is_plus_zero(tensor: Tensor) -> bool:
    return not tensor.any() and not tensor.signbit().any()


# --- masks_from_weights ------------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -2.0, 1e-45, float("nan"), float("inf")]), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_weight_is_active_iff_it_is_not_zero(rows: list[list[float]]) -> None:
    expected = [[x != 0 for x in row] for row in rows]
    weights = {"w": torch.tensor(rows), "dense": torch.ones(2, 2), "sparse": torch.zeros(1, 1)}
    masks = masks_from_weights(weights)
    assert masks["w"].tolist() == expected
    assert masks["dense"].all()
    assert masks["w"].dtype == torch.bool


def test_masks_of_a_sparse_model_are_taken_over_bit_for_bit() -> None:
    model = network()
    masks = wrapped(model).masks
    for found in (masks_from_weights(model), masks_from_weights(model.state_dict())):
        assert found.keys() == masks.keys() == {"0.weight", "3.weight"}
        assert all(torch.equal(found[name], masks[name]) for name in masks)
    other = copy.deepcopy(model)
    optimizer = SparseOptimizer(
        torch.optim.SGD(other.parameters()),
        other,
        masks=masks_from_weights(model),
        algorithm=set_(total_steps=10, interval=1),
    )
    assert optimizer.sparsifier.counts == {name: int(mask.sum()) for name, mask in masks.items()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_masks_share_nothing_with_the_weights() -> None:
    model = network()
    wrapped(model)
    before = copy.deepcopy(model.state_dict())
    for mask in masks_from_weights(model).values():
        mask.logical_not_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_mapping_is_filtered_by_dtype_dimensions_and_globs() -> None:
    tied = torch.zeros(2, 2)
    state = {
        "module.a.weight": torch.eye(2),
        "a.bias": torch.zeros(2),
        "index": torch.zeros(2, 2, dtype=torch.long),
        "half": torch.zeros(2, 2, dtype=torch.bfloat16),
        "tied": tied,
        "tied_too": tied,
        "empty": torch.zeros(0, 2),
        "_extra_state": {"version": 1},
    }
    assert list(masks_from_weights(state)) == ["a.weight", "half", "tied"]
    assert list(masks_from_weights(state, exclude="tied")) == ["a.weight", "half"]
    assert list(masks_from_weights(state, include="a.*")) == ["a.weight"]
    assert list(masks_from_weights(state, include=["a.bias", "half"])) == ["a.bias", "half"]


def test_of_a_model_include_and_exclude_are_those_of_select() -> None:
    model = network()
    wrapped(model)
    assert list(masks_from_weights(model, include="3.*")) == ["3.weight"]
    assert list(masks_from_weights(model, exclude="3.*")) == ["0.weight"]


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_dense_model_has_no_mask_to_take(as_mapping: bool) -> None:
    model = network()
    with pytest.raises(ValueError, match="none of the 200 weights in 2 tensors is zero"):
        masks_from_weights(model.state_dict() if as_mapping else model)


def test_patterns_and_mappings_that_select_nothing_raise() -> None:
    state = {"a.weight": torch.eye(2), "bias": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"'b\.\*' matches no floating-point tensor; near names: .*a\.weight"
    ):
        masks_from_weights(state, include="b.*")
    with pytest.raises(ValueError, match="'c' matches no"):
        masks_from_weights(state, exclude="c")
    with pytest.raises(ValueError, match="the entry that holds the weights"):
        masks_from_weights({"model": state, "epoch": 3})
    with pytest.raises(ValueError, match="nothing is selected"):
        masks_from_weights(state, exclude="*")


# --- apply_masks -------------------------------------------------------------------------------------


def test_an_average_that_knows_no_masks_becomes_as_sparse_as_the_model() -> None:
    model = network()
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        sparsity=0.6,
        algorithm=set_(total_steps=100, interval=2, drop_fraction=0.5),
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    before = copy.deepcopy(average.module.state_dict())
    zeros = sum(int((before[name] == 0).sum()) for name in optimizer.masks)
    sparsity = apply_masks(average, optimizer)  # its names start with "module."
    assert sparsity == zeros / 200 < 0.6
    for name, tensor in average.module.state_dict().items():
        mask = optimizer.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor[mask], before[name][mask])
        assert is_plus_zero(tensor[~mask])
    assert apply_masks(average.module, optimizer) >= 0.6  # a weight that has just grown may be zero too


def test_broken_entries_become_plus_zero_and_tensors_stay_in_place() -> None:
    model = network()
    optimizer = wrapped(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight.fill_(float("nan"))
        other[0].weight.fill_(-0.0)
    pointers = [parameter.data_ptr() for parameter in other.parameters()]
    assert apply_masks(other, optimizer) == 72 / 200  # -0.0 is a zero, NaN is none
    assert pointers == [parameter.data_ptr() for parameter in other.parameters()]
    assert is_plus_zero(other[0].weight[~optimizer.masks["0.weight"]])
    assert is_plus_zero(other[3].weight[~optimizer.masks["3.weight"]])
    assert other[3].weight[optimizer.masks["3.weight"]].isnan().all()


def test_a_mask_without_its_parameter_raises_and_writes_nothing() -> None:
    optimizer = wrapped(network())
    smaller = nn.Sequential(nn.Conv2d(2, 4, 3))
    before = smaller[0].weight.clone()
    with pytest.raises(ValueError, match=r"'3\.weight' .* is missing; near names: '0\.weight'"):
        apply_masks(smaller, optimizer)
    assert torch.equal(smaller[0].weight, before)
    other = network()
    other[3] = nn.Linear(16, 9)
    with pytest.raises(ValueError, match=r"'3\.weight' has shape \(8, 16\).* of shape \(9, 16\)"):
        apply_masks(other, optimizer)


def test_the_model_in_training_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="is being trained by this optimizer"):
        apply_masks(model, wrapped(model))
