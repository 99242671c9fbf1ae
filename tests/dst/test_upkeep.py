"""Inactive entries become the bits of +0.0 and every other bit of memory stays as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dst.upkeep import zero_inactive_

CHUNK = 1 << 18
FLOATS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
SIZES = (0, 1, 2, 7, 63, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 12_345)


def adversarial(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return every kind of float: random bits hold NaN payloads, denormals, infinities and both zeros."""
    integer = FLOATS[dtype]
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max, (size,), dtype=integer, generator=generator)
    named = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).smallest_normal / 2]
    )
    for i, value in enumerate(named.to(dtype).view(integer)):
        bits[i::41] = value
    bits[6::41] = info.min + 1  # the smallest negative denormal
    bits[7::41] = -1  # a negative NaN with a full payload
    return bits.view(dtype)


def some_mask(shape: tuple[int, ...] | torch.Size, sparsity: float = 0.5, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= sparsity


def memory(tensor: Tensor) -> Tensor:
    """Read the whole memory under a tensor as integers, gaps included."""
    return torch.empty(0, dtype=FLOATS[tensor.dtype]).set_(tensor.untyped_storage()).clone()


def expected_memory(tensor: Tensor, mask: Tensor) -> Tensor:
    """Compute what the memory must become, position by position."""
    after = memory(tensor)
    index = torch.arange(len(after)).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    after[index[~mask]] = 0
    return after


def check(tensor: Tensor, mask: Tensor) -> None:
    expected = expected_memory(tensor, mask)
    before = tensor.data_ptr(), tensor.stride(), tensor._version, mask.clone()
    assert zero_inactive_(tensor, mask) is None
    assert torch.equal(memory(tensor), expected)
    assert (tensor.data_ptr(), tensor.stride()) == before[:2]
    assert tensor._version > before[2] or not tensor.numel()  # autograd is told of the write
    assert torch.equal(mask, before[3])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kind_of_float_at_every_size(dtype: torch.dtype, size: int):
    check(adversarial(size, dtype), some_mask((size,)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("active", [True, False])
def test_all_or_nothing(dtype: torch.dtype, active: bool):
    check(adversarial(1000, dtype), torch.full((1000,), active))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "a slice": lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "an offset": lambda x: torch.cat([x, x])[len(x) :],
}
SHAPES = ((6, 4, 5, 5), (6, 1, 5, 5), (1, 6, 1, 1), (8, 3, 1, 1), (1, 1, 1, 1), (2, 0, 3, 3))


@pytest.mark.parametrize("mask_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_of_tensor_and_mask(shape: tuple[int, ...], layout: str, mask_layout: str):
    numel = torch.Size(shape).numel()
    tensor = LAYOUTS[layout](adversarial(numel, torch.float32).view(shape))
    check(tensor, LAYOUTS[mask_layout](some_mask(shape)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_over_several_chunks(layout: str, dtype: torch.dtype):
    shape = (331, 3, 17, 17)
    tensor = LAYOUTS[layout](adversarial(torch.Size(shape).numel(), dtype).view(shape))
    check(tensor, some_mask(shape))


@given(
    st.lists(st.integers(0, 5), max_size=5).flatmap(
        lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))
    ),
    st.sampled_from(list(FLOATS)),
    st.integers(0, 2**20),
)
def test_any_shape_and_any_order_of_axes(case: tuple[list[int], list[int]], dtype: torch.dtype, seed: int):
    shape, order = case
    back = [order.index(axis) for axis in range(len(order))]
    flat = adversarial(torch.Size(shape).numel(), dtype, seed)
    tensor = flat.view([shape[axis] for axis in order]).permute(back)
    check(tensor, some_mask(tensor.shape, seed=seed))


def test_no_dimensions():
    for active in (True, False):
        check(adversarial(1, torch.float32).view(()).fill_(torch.nan), torch.tensor(active))


def test_odd_strides_of_single_entry_axes():
    tensor = adversarial(12, torch.float32).as_strided((3, 1, 4), (4, 777, 1))
    check(tensor, some_mask(tensor.shape))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats(dtype: torch.dtype):
    tensor = torch.tensor([1.0, torch.nan, -0.0, -2.0]).to(dtype)
    zero_inactive_(tensor, torch.tensor([True, False, False, False]))
    assert tensor.view(torch.uint8).tolist() == [
        torch.tensor(1.0).to(dtype).view(torch.uint8).item(),
        0,
        0,
        0,
    ]


def test_an_expanded_tensor_is_refused():
    # Its entries share memory, so that no mask but a repeating one could be kept.
    tensor = torch.ones(1, 3).expand(4, 3)
    with pytest.raises(RuntimeError, match="single memory location"):
        zero_inactive_(tensor, some_mask((4, 3)))


def test_an_expanded_mask_is_taken():
    check(adversarial(12, torch.float32).view(4, 3), torch.tensor([True, False, True]).expand(4, 3))


def test_parameters_and_gradients_without_autograd():
    parameter = nn.Parameter(torch.full((3, 3), torch.nan))
    parameter.grad = torch.full((3, 3), -torch.inf)
    grad, mask = parameter.grad, torch.eye(3, dtype=torch.bool)
    with torch.no_grad():
        zero_inactive_(parameter, mask)
        zero_inactive_(parameter.grad, mask)
    assert parameter.grad is grad
    assert parameter.isnan().equal(mask)
    assert grad.isinf().equal(mask)


def test_autograd_notices_the_write():
    # A value saved for the backward pass must not be changed behind its back.
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    zero_inactive_(weight.detach(), torch.tensor([True, False, True]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_twice_is_once():
    tensor, mask = adversarial(1000, torch.float32), some_mask((1000,))
    zero_inactive_(tensor, mask)
    once = memory(tensor)
    zero_inactive_(tensor, mask)
    assert torch.equal(memory(tensor), once)


def test_no_generator_moves():
    state = torch.get_rng_state()
    zero_inactive_(torch.ones(1000), torch.zeros(1000, dtype=torch.bool))
    assert torch.equal(torch.get_rng_state(), state)
