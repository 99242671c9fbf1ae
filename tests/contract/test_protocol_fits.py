"""Methods that are no prune-and-grow fit the protocol: each is a small frozen dataclass over the same engine.

Throw-away algorithms, written here and nowhere else: SNFS (counts move between tensors; from the momentum
of the base, or from an average of its own), 2:4 groups, training dense weights behind the mask, and global
magnitude pruning to a rising sparsity. Each is held to the engine's invariants and to a plain reference.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import dst
from dst.algorithms import Algorithm
from dst.masks import draw, grow, prune

Evidence = Mapping[str, dst.Evidence]

# --- The algorithms -----------------------------------------------------------------------------------


def redistributed(
    evidence: Evidence, momentum: Mapping[str, Tensor], drop_fraction: float
) -> dict[str, Tensor]:
    """Drop everywhere, share the freed weights out by mean |momentum| of the active, grow by |momentum|."""
    seen = {name: evidence[name] for name in evidence}
    kept, share, freed = {}, {}, 0
    for name, one in seen.items():
        k = math.floor(drop_fraction * int(one.mask.count_nonzero()))
        kept[name] = prune(one.weight.abs(), one.mask, k)
        share[name] = momentum[name][one.mask].abs().mean().item()
        freed += k
    room = {name: int((~mask).count_nonzero()) for name, mask in kept.items()}
    coming = dict.fromkeys(kept, 0)
    total = sum(share.values())
    # One after another by what is still owed: exact, and what finds no room spills to the next.
    for _ in range(freed):
        open_to = [name for name in kept if coming[name] < room[name]]
        owed = max(open_to, key=lambda name: freed * share[name] / total - coming[name])
        coming[owed] += 1
    return {name: grow(momentum[name].abs(), mask, coming[name]) for name, mask in kept.items()}


@dataclass(frozen=True)
class SparseMomentum:
    """SNFS reading the base's momentum, which must therefore see dense gradients."""

    interval: int
    drop_fraction: float

    needs: ClassVar[frozenset[str]] = frozenset({"state"})
    masks_gradients: ClassVar[bool] = False

    def due(self, step: int) -> bool:
        return step % self.interval == 0

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        momentum = {name: evidence[name].state["momentum_buffer"] for name in counts}
        return redistributed(evidence, momentum, self.drop_fraction), memory


@dataclass(frozen=True)
class OwnMomentum:
    """SNFS with its own average of dense gradients in memory; the base sees masked gradients."""

    interval: int
    drop_fraction: float
    beta: float = 0.9

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def due(self, step: int) -> bool:
        return True

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        memory = {
            name: self.beta * memory.get(name, 0.0) + (1 - self.beta) * evidence[name].grad for name in counts
        }
        if step % self.interval:
            return {}, memory
        return redistributed(evidence, memory, self.drop_fraction), memory


@dataclass(frozen=True)
class TwoToFour:
    """Keep two of every four inputs: the larger active weight, and of the rest the largest gradient."""

    interval: int

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def due(self, step: int) -> bool:
        return step % self.interval == 0

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        masks = {}
        for name in counts:
            one = evidence[name]
            weight = one.weight.abs().masked_fill(~one.mask, -1).reshape(-1, 4)
            best = weight.argmax(1, keepdim=True)
            rest = one.grad.abs().reshape(-1, 4).scatter(1, best, -1)
            mask = torch.zeros_like(rest, dtype=torch.bool).scatter(1, best, True)
            masks[name] = mask.scatter(1, rest.argmax(1, keepdim=True), True).view_as(one.mask)
        return masks, memory


@dataclass(frozen=True)
class DenseBehindMask:
    """Train dense weights through the gradient at the masked ones; the largest are active at each step."""

    dense_weights: ClassVar[bool] = True
    masks_gradients: ClassVar[bool] = False
    newcomers: ClassVar[str] = "keep"

    def due(self, step: int) -> bool:
        return True

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        masks = {name: draw(evidence[name].weight.abs(), k) for name, k in counts.items()}
        switched = memory.get("switched", 0) + sum(
            int((mask ^ evidence[name].mask).count_nonzero()) for name, mask in masks.items()
        )
        return masks, {"switched": switched, "by step": [*memory.get("by step", []), step]}


@dataclass(frozen=True)
class GlobalMagnitude:
    """Prune the smallest weights of all tensors together, to a sparsity that rises."""

    interval: int
    sparsity: Callable[[int], float]

    def due(self, step: int) -> bool:
        return step % self.interval == 0

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        weights = torch.cat([evidence[name].weight.reshape(-1) for name in counts])
        active = torch.cat([evidence[name].mask.reshape(-1) for name in counts])
        kept = prune(weights.abs(), active, int(active.count_nonzero()) - sum(counts.values()))
        sizes = [evidence[name].mask.numel() for name in counts]
        parts = zip(counts, kept.split(sizes), strict=True)
        return {name: part.view_as(evidence[name].mask) for name, part in parts}, memory


class BareMinimum:
    """Only what must be there: `due` and `update`; all the rest is left out."""

    def due(self, step: int) -> bool:
        return step == 3

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, dst.Evidence], memory: dict
    ):
        return {"0.weight": ~evidence["0.weight"].mask}, {"seen": sorted(counts)}

    def __repr__(self) -> str:
        return "BareMinimum()"


# --- Training -----------------------------------------------------------------------------------------

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
SNFS = (SparseMomentum(5, 0.4), OwnMomentum(5, 0.4))
ALL: dict[str, tuple[Algorithm, str]] = {
    "SNFS by the base's momentum": (SNFS[0], "SGD"),
    "SNFS by its own momentum": (SNFS[1], "AdamW"),
    "2:4": (TwoToFour(4), "AdamW"),
    "dense behind the mask, SGD": (DenseBehindMask(), "SGD"),
    "dense behind the mask, AdamW": (DenseBehindMask(), "AdamW"),
    "global magnitude": (GlobalMagnitude(4, dst.Cubic(0.0, 30, 1.0)), "SGD"),
    "the bare minimum": (BareMinimum(), "AdamW"),
}


def build(algorithm: Algorithm, base: str, *, sparsity: float = 0.5) -> tuple[nn.Module, dst.SparseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = dst.SparseOptimizer(
        BASES[base](model.parameters()),
        model,
        sparsity=sparsity,
        distribution=dst.uniform,
        algorithm=algorithm,
        seed=5,
    )
    return model, optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator) * torch.linspace(0.1, 3, 16)
    return x, x[:, :4].sin() + x[:, 12:].cos()


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def train(
    model: nn.Module, optimizer: dst.SparseOptimizer, steps: range, *, closure: bool = False
) -> Iterator[int]:
    for step in steps:

        def evaluate(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss.item()

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        yield step


def active(optimizer: dst.SparseOptimizer) -> dict[str, int]:
    return {name: int(mask.count_nonzero()) for name, mask in optimizer.masks.items()}


def everything(model: nn.Module, optimizer: dst.SparseOptimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# --- What holds for each of them --------------------------------------------------------------------


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("name", ALL)
def test_the_invariants_of_the_engine_hold(name: str, closure: bool):
    model, optimizer = build(*ALL[name])
    engine = optimizer.sparsifier
    pointers = [p.data_ptr() for p in model.parameters()]
    forwards = 0

    def sees_masked_weights(layer: nn.Module, _: object) -> None:
        nonlocal forwards
        forwards += 1
        key = next(key for key, p in engine.params.items() if p is layer.weight)
        assert not layer.weight.detach()[~engine.masks[key]].any()

    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(sees_masked_weights)
    explored = engine.explored
    for _ in train(model, optimizer, range(1, 41), closure=closure):
        assert active(optimizer) == engine.counts
        for key, parameter in engine.params.items():
            off = parameter.detach().view(torch.int32)[~engine.masks[key]]
            assert not off.any()  # the bits of +0.0
            assert active(optimizer)[key] <= engine.explored[key] <= parameter.numel()
            assert explored[key] <= engine.explored[key]
        explored = engine.explored
    assert forwards == 3 * 40
    assert engine.step == 40
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("when", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("name", ALL)
def test_a_resume_is_the_uninterrupted_run(name: str, when: int):
    model, optimizer = build(*ALL[name])
    for _ in train(model, optimizer, range(1, when + 1)):
        pass
    file = io.BytesIO()
    torch.save(everything(model, optimizer), file)
    for _ in train(model, optimizer, range(when + 1, 26)):
        pass
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = build(*ALL[name])
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    again = everything(other, resumed)
    assert same(again, saved)  # saving, loading and saving changes no bit
    for _ in train(other, resumed, range(when + 1, 26)):
        pass
    assert same(everything(other, resumed), everything(model, optimizer))


@pytest.mark.parametrize("name", ALL)
def test_copies_go_on_alike(name: str):
    model, optimizer = build(*ALL[name])
    for _ in train(model, optimizer, range(1, 8)):
        pass
    twin_model, twin = copy.deepcopy((model, optimizer))
    for one in ((model, optimizer), (twin_model, twin)):
        for _ in train(*one, range(8, 20)):
            pass
    assert same(everything(model, optimizer), everything(twin_model, twin))


@pytest.mark.parametrize("name", ALL)
def test_another_algorithm_does_not_load(name: str):
    _, optimizer = build(*ALL[name])
    _, other = build(dst.static(), ALL[name][1])
    with pytest.raises(ValueError, match="algorithm"):
        other.load_state_dict(optimizer.state_dict())


# --- SNFS: weights move between tensors ----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", SNFS, ids=lambda a: type(a).__name__)
def test_redistribution_keeps_the_total_and_moves_the_parts(algorithm: Algorithm):
    model, optimizer = build(algorithm, "SGD", sparsity=0.8)
    total = sum(active(optimizer).values())
    counts = [active(optimizer)]
    for step in train(model, optimizer, range(1, 61)):
        assert sum(active(optimizer).values()) == total
        if step % 5 == 0:
            counts.append(active(optimizer))
        assert active(optimizer) == counts[-1]
    moved = [before != after for before, after in itertools.pairwise(counts)]
    assert sum(moved) >= 10
    assert optimizer.sparsifier.last_grown != dict.fromkeys(optimizer.masks, 0)


def test_the_bases_momentum_is_that_of_dense_gradients():
    model, optimizer = build(SparseMomentum(5, 0.4), "SGD", sparsity=0.8)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(4):  # up to the first update, which resets what left and came
        optimizer.zero_grad()
        loss_of(model, 1).backward()
        for name, parameter in model.named_parameters():
            velocity[name].mul_(0.9).add_(parameter.grad + 1e-3 * parameter.detach())
        optimizer.step()
    for name, parameter in optimizer.sparsifier.params.items():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert torch.allclose(buffer, velocity[name], rtol=1e-5, atol=1e-7)
        assert buffer[~optimizer.masks[name]].any()


def test_its_own_momentum_is_that_of_dense_gradients():
    model, optimizer = build(OwnMomentum(5, 0.4), "AdamW", sparsity=0.8)
    velocity = {name: torch.zeros_like(p) for name, p in optimizer.sparsifier.params.items()}
    for step in range(1, 21):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for name, parameter in optimizer.sparsifier.params.items():
            velocity[name] = 0.9 * velocity[name] + (1 - 0.9) * parameter.grad
        optimizer.step()
        assert same(optimizer.sparsifier.state_dict()["memory"], velocity)
        for name, parameter in optimizer.sparsifier.params.items():
            moments = optimizer.state[parameter]["exp_avg"]
            assert not moments[~optimizer.masks[name]].any()


# --- 2:4: every group keeps two ---------------------------------------------------------------------


def two_of_four(mask: Tensor) -> bool:
    return bool((mask.reshape(-1, 4).sum(1) == 2).all())


def test_two_of_every_four_inputs_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    masks = {}
    for name in ("0.weight", "2.weight"):
        groups = model.get_parameter(name).detach().abs().view(-1, 4)
        top = groups.argsort(1, descending=True)[:, :2]
        masks[name] = torch.zeros_like(groups, dtype=torch.bool).scatter(1, top, True)
        masks[name] = masks[name].view_as(model.get_parameter(name))
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = dst.SparseOptimizer(base, model, masks=masks, algorithm=TwoToFour(2))
    seen = {name: mask.clone() for name, mask in masks.items()}
    for _ in train(model, optimizer, range(1, 41)):
        assert all(two_of_four(mask) for mask in optimizer.masks.values())
        assert active(optimizer) == {"0.weight": 64, "2.weight": 16}
        seen = {name: seen[name] | mask for name, mask in optimizer.masks.items()}
    assert {name: int(mask.count_nonzero()) for name, mask in seen.items()} == optimizer.sparsifier.explored
    assert optimizer.sparsifier.explored["0.weight"] > 80


def test_a_random_first_mask_is_in_groups_from_the_first_update_on():
    model, optimizer = build(TwoToFour(3), "AdamW")
    for step in train(model, optimizer, range(1, 10)):
        assert all(two_of_four(mask) == (step >= 3) for mask in optimizer.masks.values())


# --- Dense weights behind the mask ------------------------------------------------------------------------


def straight_through(base_name: str, steps: int, masks: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Train dense weights by hand: gradients at the masked weights, a plain optimizer, the largest |w|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    dense = dict(model.named_parameters())
    base = BASES[base_name](list(dense.values()))
    masks = {name: mask.clone() for name, mask in masks.items()}
    for step in range(1, steps + 1):
        masked = {
            name: torch.where(masks[name], p.detach(), 0.0).requires_grad_() if name in masks else p
            for name, p in dense.items()
        }
        base.zero_grad()
        loss_of(lambda x, weights=masked: functional_call(model, weights, x), step).backward()
        for name in masks:
            dense[name].grad = masked[name].grad
        base.step()
        for name, mask in masks.items():
            order = np.lexsort((np.arange(mask.numel()), -dense[name].detach().abs().view(-1).numpy()))
            largest = torch.zeros(mask.numel(), dtype=torch.bool)
            largest[torch.from_numpy(order[: int(mask.count_nonzero())].copy())] = True
            masks[name] = largest.view_as(mask)
        yield {name: p.detach().clone() for name, p in dense.items()}


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("base", BASES)
def test_dense_weights_train_straight_through(base: str, closure: bool):
    model, optimizer = build(DenseBehindMask(), base)
    engine = optimizer.sparsifier
    first = {name: mask.clone() for name, mask in optimizer.masks.items()}
    reference = straight_through(base, 40, first)
    for _ in train(model, optimizer, range(1, 41), closure=closure):
        dense = next(reference)
        for name, parameter in model.named_parameters():
            if name in engine.params:
                assert torch.equal(engine.weights(name), dense[name])
                assert torch.equal(parameter.detach(), dense[name] * engine.masks[name])
            else:
                assert torch.equal(parameter.detach(), dense[name])
    assert engine.state_dict()["memory"]["switched"] > 100
    assert engine.state_dict()["memory"]["by step"] == [*range(1, 41)]


def test_saved_dense_weights_are_bit_exact():
    model, optimizer = build(DenseBehindMask(), "AdamW")
    for _ in train(model, optimizer, range(1, 10)):
        pass
    saved = optimizer.state_dict()["sparse"]["dense_weights"]
    for name in optimizer.masks:
        assert torch.equal(saved[name], optimizer.sparsifier.weights(name))
        off = ~optimizer.masks[name]
        assert (saved[name][off] != 0).all()
    kept = copy.deepcopy(saved)
    for _ in train(model, optimizer, range(10, 15)):
        pass
    assert same(saved, kept)  # a snapshot, not a view


def test_without_a_mask_update_dense_weights_still_train():
    @dataclass(frozen=True)
    class Fixed(DenseBehindMask):
        def due(self, step: int) -> bool:
            return False

    model, optimizer = build(Fixed(), "SGD")
    before = {name: optimizer.sparsifier.weights(name).clone() for name in optimizer.masks}
    for _ in train(model, optimizer, range(1, 4)):
        pass
    for name, mask in optimizer.masks.items():
        dense = optimizer.sparsifier.weights(name)
        assert (dense != before[name])[~mask].any()
        assert torch.equal(optimizer.sparsifier.params[name].detach(), dense * mask)


class HalfSteps(torch.optim.SGD):
    """Evaluate and step twice within one step, as line searches and sharpness-aware optimizers do."""

    def step(self, closure: Callable[[], Any]) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            super().step()
        return loss


def test_a_closure_may_be_evaluated_twice():
    layer = nn.Linear(16, 8, bias=False)
    dense = layer.weight.detach().clone()
    base = HalfSteps(layer.parameters(), lr=0.1)
    optimizer = dst.SparseOptimizer(base, layer, sparsity=0.5, algorithm=DenseBehindMask())
    mask = optimizer.masks["weight"].clone()
    x = batch(1)[0]

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    for _ in range(2):
        masked = (dense * mask).requires_grad_()
        (x @ masked.t() - 1).square().mean().backward()
        dense -= 0.1 * masked.grad
    torch.testing.assert_close(optimizer.sparsifier.weights("weight"), dense)


# --- Global magnitude: one threshold for all ----------------------------------------------------------


def test_global_pruning_is_one_sort_over_all_tensors():
    share = dst.Cubic(0.0, 30, 1.0)
    model, optimizer = build(GlobalMagnitude(4, share), "SGD", sparsity=0.85)
    engine = optimizer.sparsifier
    names = list(engine.params)
    sizes = np.array([engine.params[name].numel() for name in names])
    final = sum(engine.targets.values())
    assert final == round(0.15 * sizes.sum())
    masks = np.ones(sizes.sum(), dtype=bool)
    for step in train(model, optimizer, range(1, 41)):
        now = np.concatenate([optimizer.masks[name].reshape(-1).numpy() for name in names])
        if step % 4 == 0:
            # What was pruned is zero now, so that the survivors tell the threshold.
            wanted = round(sizes.sum() - share(step) * (sizes.sum() - final))
            assert abs(int(now.sum()) - wanted) <= 1
            assert not (now & ~masks).any()
            masks = now
        assert np.array_equal(now, masks)
    assert int(masks.sum()) == final
    parts = np.array([part.mean() for part in np.split(masks, np.cumsum(sizes)[:-1])])
    assert parts.max() - parts.min() > 0.02  # the layers end at different sparsities


def test_global_pruning_prunes_the_smallest_of_all():
    model, optimizer = build(GlobalMagnitude(4, dst.Cubic(0.0, 30, 1.0)), "SGD", sparsity=0.85)
    base_step, stepped = optimizer.base.step, {}

    def step_and_look() -> None:  # the weights between the base's step and the mask update
        base_step()
        stepped.update({name: p.detach().abs() for name, p in optimizer.sparsifier.params.items()})

    optimizer.base.step = step_and_look
    for before, step in _masks_before(model, optimizer, range(1, 29)):
        if step % 4 == 0:
            values = torch.cat([stepped[name][mask] for name, mask in before.items()])
            stayed = torch.cat([optimizer.masks[name][mask] for name, mask in before.items()])
            assert values[~stayed].max() <= values[stayed].min()


def _masks_before(
    model: nn.Module, optimizer: dst.SparseOptimizer, steps: range
) -> Iterator[tuple[dict[str, Tensor], int]]:
    for step in steps:
        before = {name: mask.clone() for name, mask in optimizer.masks.items()}
        for _ in train(model, optimizer, range(step, step + 1)):
            yield before, step


# --- The bare minimum and mistakes -----------------------------------------------------------------------


def test_everything_but_due_and_update_may_be_left_out():
    model, optimizer = build(BareMinimum(), "AdamW")
    first = {name: mask.clone() for name, mask in optimizer.masks.items()}
    for step in train(model, optimizer, range(1, 6)):
        assert optimizer.masks["0.weight"].equal(~first["0.weight"]) == (step >= 3)
        assert optimizer.masks["2.weight"].equal(first["2.weight"])
        for name, parameter in optimizer.sparsifier.params.items():
            assert not optimizer.state[parameter]["exp_avg"][~optimizer.masks[name]].any()
    assert optimizer.sparsifier.updates == 1
    assert optimizer.sparsifier.state_dict()["memory"] == {"seen": ["0.weight", "2.weight", "4.weight"]}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"1.weight": torch.ones(32, 16, dtype=torch.bool)}, "not a sparse tensor"),
        ({"0.weight": torch.ones(16, 32, dtype=torch.bool)}, r"expected bool of shape \(32, 16\)"),
        ({"0.weight": torch.ones(32, 16)}, "returned a torch.float32 mask"),
    ],
)
def test_a_wrong_mask_raises(masks: dict[str, Tensor], message: str):
    class Wrong(BareMinimum):
        def update(self, step, counts, evidence, memory):
            return masks, memory

    model, optimizer = build(Wrong(), "SGD")
    with pytest.raises(ValueError, match=message):
        for _ in train(model, optimizer, range(1, 4)):
            pass
