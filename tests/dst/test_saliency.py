from __future__ import annotations

import functools
import math
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dst.counts import active_counts
from dst.saliency import snip, snip_masks
from dst.selection import select


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 4, 4, generator=generator)
    return images, torch.randint(5, (size,), generator=generator)


def loss_of(model: nn.Module, seed: int) -> Callable[[], Tensor]:
    images, labels = batch(seed)
    return lambda: functional.cross_entropy(model(images), labels)


def linear_loss(weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], Tensor]:
    """A loss whose gradient at `weights` is `gradients`."""
    return lambda: sum((w * g).sum() for w, g in zip(weights, gradients, strict=True))


# Few distinct values, so that ties abound; binary fractions, so that products are exact.
value = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0])
tensors = st.lists(st.lists(st.tuples(value, value), min_size=1, max_size=7), min_size=1, max_size=4)


@given(tensors, st.floats(0.0, 1.0))
def test_the_mask_is_the_global_top_by_saliency_then_index(
    layers: list[list[tuple[float, float]]], sparsity: float
) -> None:
    weights = [nn.Parameter(torch.tensor([w for w, _ in layer])) for layer in layers]
    gradients = [torch.tensor([g for _, g in layer]) for layer in layers]
    params = {f"t{i}": weight for i, weight in enumerate(weights)}
    active = round((1 - sparsity) * sum(map(len, layers)))
    call = functools.partial(snip_masks, params, sparsity, loss=linear_loss(weights, gradients))
    if 0 < active < len(layers) or (active == 0 and sparsity != 1.0):
        with pytest.raises(ValueError, match="fewer than the"):
            call()
        return
    if not any(w * g for layer in layers for w, g in layer):
        with pytest.raises(ValueError, match="every saliency"):
            call()
        return
    ranking = sorted((-abs(w * g), i, j) for i, layer in enumerate(layers) for j, (w, g) in enumerate(layer))
    best = [min(entry for entry in ranking if entry[1] == i) for i in range(len(layers))]
    rest = [entry for entry in ranking if entry not in best]
    expected = [] if active == 0 else best + rest[: active - len(best)]
    masks = call()
    chosen = {(int(name[1:]), j) for name, mask in masks.items() for j in mask.nonzero().flatten().tolist()}
    assert chosen == {(i, j) for _, i, j in expected}
    if all(any(entry[1] == i for entry in ranking[:active]) for i in range(len(layers))):
        assert chosen == {(i, j) for _, i, j in ranking[:active]}


def test_the_masks_equal_a_plain_reference() -> None:
    model = small_model().eval()
    params = select(model)
    masks = snip_masks(params, 0.7, loss=loss_of(model, 1))
    images, labels = batch(1)
    functional.cross_entropy(model(images), labels).backward()
    saliency = torch.cat([(p * p.grad).abs().flatten() for p in params.values()])
    threshold = saliency.sort(descending=True).values[round(0.3 * len(saliency)) - 1]
    for name, parameter in params.items():
        assert torch.equal(masks[name], (parameter * parameter.grad).abs() >= threshold)
        assert masks[name].dtype == torch.bool


@given(st.floats(0.0, 0.95))
def test_ratios_give_the_masks_counts_back(sparsity: float) -> None:
    model = small_model().eval()
    params = select(model)
    loss = loss_of(model, 1)
    masks = snip_masks(params, sparsity, loss=loss)
    sparsities = functools.partial(snip, loss=loss)(params, sparsity)
    sizes = {name: parameter.numel() for name, parameter in params.items()}
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    assert sum(counts.values()) == round((1 - sparsity) * sum(sizes.values()))
    assert active_counts(sizes, sparsities) == counts
    assert active_counts(sizes, sparsities, sparsity=sparsity) == counts


def test_several_batches_are_averaged_before_the_absolute_value() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    one = linear_loss([weight], [torch.tensor([4.0, 1.0, 0.0])])
    two = linear_loss([weight], [torch.tensor([-4.0, 1.0, 0.5])])
    assert snip_masks({"w": weight}, 1 / 3, loss=[one, two])["w"].tolist() == [False, True, True]
    assert snip_masks({"w": weight}, 1 / 3, loss=one)["w"].tolist() == [True, True, False]


def test_two_half_batches_equal_the_whole() -> None:
    model = small_model().double().eval()
    params = select(model)
    images, labels = batch(1)
    images = images.double()
    halves = [
        functools.partial(lambda x, y: functional.cross_entropy(model(x), y), x, y)
        for x, y in zip(images.split(4), labels.split(4), strict=True)
    ]
    whole = snip_masks(params, 0.5, loss=lambda: functional.cross_entropy(model(images), labels))
    assert all(torch.equal(mask, whole[n]) for n, mask in snip_masks(params, 0.5, loss=halves).items())


class Reassigning(nn.Module):
    """Writes its buffers in the two ways modules do, draws from three generators, and adds a buffer."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.absent = torch.ones(1)
        self.register_buffer("fresh", torch.ones(1))
        self.trunk[1].running_mean.zero_()  # a child written before it runs
        self.trunk[1].eval()
        return self.trunk(x + np.random.rand() + random.random() + torch.rand(()))  # noqa: NPY002


def state_of(model: nn.Module) -> list[object]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [t.detach().numpy().tobytes() for t in tensors],
        [id(t) for t in tensors],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        [(name, module.training, list(module._buffers)) for name, module in model.named_modules()],
        torch.get_rng_state().tolist(),
        repr(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
        len(torch.nn.modules.module._global_forward_pre_hooks),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_disturbed(fails: bool) -> None:
    model = Reassigning(small_model())
    model.trunk[3].eval()
    model.trunk[0].weight.grad = torch.ones_like(model.trunk[0].weight)
    buffer = model.calls
    images, labels = batch(1)

    def loss() -> Tensor:
        result = functional.cross_entropy(model(images), labels)
        if fails:
            raise KeyError("the loss")
        return result

    before = state_of(model)
    if fails:
        with pytest.raises(KeyError, match="the loss"):
            snip(select(model), 0.5, loss=loss)
    else:
        snip(select(model), 0.5, loss=[loss, loss])
    assert state_of(model) == before
    assert model.calls is buffer
    assert model.absent is None
    loss_again = model(images)
    assert model.trunk[1].num_batches_tracked == 0  # the model works on as before
    assert loss_again.shape == (8, 5)


def test_train_mode_is_used_and_kept() -> None:
    model = small_model()
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    snip(select(model), 0.5, loss=loss_of(model, 1))
    assert seen == [True]
    assert model[1].training
    assert model[1].num_batches_tracked == 0


def test_a_compiled_model_is_left_as_it_was() -> None:
    model = small_model()
    expected = snip(select(model), 0.5, loss=loss_of(model, 1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = state_of(model)
    assert snip(select(compiled), 0.5, loss=loss_of(compiled, 1)) == expected
    assert state_of(model) == before


def test_under_no_grad_the_gradient_is_still_taken() -> None:
    model = small_model()
    with torch.no_grad():
        ratios = snip(select(model), 0.5, loss=loss_of(model, 1))
    assert ratios == snip(select(model), 0.5, loss=loss_of(model, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_multiplied_in_float32_at_least(dtype: torch.dtype) -> None:
    # In half precision both products would be 2**-26 -> 0 or round to the same number.
    weight = nn.Parameter(torch.tensor([2.0**-12, 2.0**-12], dtype=dtype))
    gradient = torch.tensor([2.0**-14, 1.0625 * 2.0**-14], dtype=dtype)
    masks = snip_masks({"w": weight}, 0.5, loss=linear_loss([weight], [gradient]))
    assert masks["w"].tolist() == [False, True]


def test_an_unused_parameter_keeps_one_weight() -> None:
    used, unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    ratios = snip({"used": used, "unused": unused}, 0.5, loss=lambda: used.sum())
    assert ratios == {"used": 1 / 8, "unused": 7 / 8}


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda w: w * 1, ValueError, r"got shape \(4,\) with requires_grad=True"),
        (lambda w: w.detach().sum(), ValueError, "requires_grad=False"),
        (lambda w: 1.0, TypeError, "must return a scalar tensor, got float"),
        (lambda w: (w * math.inf).sum(), ValueError, "saliency of 'w' is not finite"),
        (lambda w: (w * math.nan).sum(), ValueError, "saliency of 'w' is not finite"),
        (lambda w: (w * 0).sum(), ValueError, "every saliency .* is zero"),
    ],
)
def test_a_bad_loss_raises(loss, error: type[Exception], message: str) -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(error, match=message):
        snip({"w": weight}, 0.5, loss=lambda: loss(weight))


def test_bad_arguments_raise() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="needs a parameter and a loss, got 0 and 1"):
        snip({}, 0.5, loss=lambda: weight.sum())
    with pytest.raises(ValueError, match="needs a parameter and a loss, got 1 and 0"):
        snip({"w": weight}, 0.5, loss=[])
    with pytest.raises(ValueError, match="'w' is frozen"):
        snip({"w": torch.ones(4)}, 0.5, loss=lambda: weight.sum())
    with pytest.raises(ValueError, match="must lie in"):
        snip({"w": weight}, 1.5, loss=lambda: weight.sum())


RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from dst.saliency import snip_masks
from dst.selection import select

rank, store, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double().eval()
images = torch.randn(8, 6, dtype=torch.float64)
targets = torch.randn(8, 4, dtype=torch.float64)
parallel = nn.parallel.DistributedDataParallel(model)
model[1].running_mean.fill_(0.1 * rank)  # differs by rank: the wrapper broadcasts rank 0's when it runs
mine = slice(4 * rank, 4 * rank + 4)


def loss(module, part):
    return ((module(images[part]) - targets[part]) ** 2).mean()


masks = snip_masks(select(parallel), 0.4, loss=lambda: loss(parallel, mine))
kept = bool((model[1].running_mean == 0.1 * rank).all())
model[1].running_mean.zero_()
loss(parallel, mine).backward()  # the wrapper still works
images_all = slice(0, 8)
dist.destroy_process_group()
whole = snip_masks(select(model), 0.4, loss=lambda: loss(model, images_all))
torch.save({"masks": masks, "whole": whole, "kept": kept}, result)
"""


def test_ranks_agree_and_equal_one_process_with_the_joined_batch(tmp_path: Path) -> None:
    results = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    commands = [
        [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(path)]
        for rank, path in enumerate(results)
    ]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
        for command in commands
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert all(path.exists() for path in results), errors  # gloo may abort at exit after a correct result
    one, two = (torch.load(path, weights_only=True) for path in results)
    assert one["kept"]
    assert two["kept"]
    for name, mask in one["masks"].items():
        assert torch.equal(mask, two["masks"][name])
        assert torch.equal(mask, one["whole"][name])


def test_the_number_of_active_weights_is_exact_beyond_float32() -> None:
    size = 2**24 + 3
    weight = nn.Parameter(torch.arange(size, dtype=torch.float64).float())
    masks = snip_masks({"w": weight}, 0.3, loss=lambda: weight.sum())
    assert int(masks["w"].count_nonzero()) == round((1 - 0.3) * size)
    assert abs(Fraction(int(masks["w"].count_nonzero())) - Fraction(7, 10) * size) <= Fraction(1, 2)
