"""Two and four real processes: averages, masks, weights and optimizer state agree on all of them and with
one process on the joined batch, and nothing is sent for the masks but where an update reads gradients.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.ranks import Traffic, launch, rank_main, same
from torch import Tensor, nn

import dst
from dst.sync import average_over_ranks, several_ranks

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
STEPS = 24
ALGORITHMS: dict[str, Callable[[], dst.PruneAndGrow]] = {
    "static": dst.static,
    "set": lambda: dst.set_(total_steps=32, interval=3),
    "rigl": lambda: dst.rigl(total_steps=32, interval=3),
    "slak": lambda: dst.slak(total_steps=32, interval=3),
}
NAMES = ["0.weight", "2.weight"]


# --- What is trained, alone or together ----------------------------------------------------------------


def build(algorithm: str) -> tuple[nn.Module, dst.SparseOptimizer]:
    """Build in float64, so that the order of a sum does not decide between two weights."""
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, dst.SparseOptimizer(base, model, sparsity=0.7, algorithm=ALGORITHMS[algorithm](), seed=3)


def batch(step: int) -> Tensor:
    return torch.randn(8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def snapshot(model: nn.Module, optimizer: dst.SparseOptimizer) -> dict[str, dict[str, Any]]:
    return {
        "masks": {name: mask.clone() for name, mask in optimizer.masks.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "state": copy.deepcopy(optimizer.base.state_dict()["state"]),
    }


def alone(algorithm: str) -> Iterator[dict[str, dict[str, Tensor]]]:
    model, optimizer = build(algorithm)
    yield snapshot(model, optimizer)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        yield snapshot(model, optimizer)


# --- One of the processes --------------------------------------------------------------------------------


def train_in_ranks(rank: int, world: int, algorithm: str, *, accumulate: bool = False) -> dict[str, Any]:
    """Train on this rank's part of each batch, counting what the optimizer's step sends."""
    torch.manual_seed(1000 + rank)  # what a rank draws elsewhere must not matter
    model, optimizer = build(algorithm)
    parallel = nn.parallel.DistributedDataParallel(model)
    trace, sent = [snapshot(model, optimizer)], []
    for step in range(1, STEPS + 1):
        part = batch(step).view(2, world, 4 // world, 10)[:, rank]
        optimizer.zero_grad()
        if accumulate:
            with parallel.no_sync():
                (loss_of(parallel, part[0]) / 2).backward()
            (loss_of(parallel, part[1]) / 2).backward()
        else:
            loss_of(parallel, part.reshape(-1, 10)).backward()
        with Traffic() as traffic:
            optimizer.step()
        trace.append(snapshot(model, optimizer))
        sent.append([traffic.messages, traffic.bytes])
    return {"trace": trace, "sent": sent, "drawn": torch.rand(1)}


def grow_by_unequal_gradients(rank: int) -> dict[str, Any]:
    """Update by gradients that no one has averaged, one of them missing on one rank, one on both."""
    params = {name: nn.Parameter(torch.linspace(1, 2, 64)) for name in ("both", "one", "none")}
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD(list(params.values()), lr=0.1),
        params,
        sparsity=0.5,
        distribution=dst.uniform,
        algorithm=dst.rigl(total_steps=100, interval=1),
    )
    before = {name: mask.clone() for name, mask in optimizer.masks.items()}
    generator = torch.Generator().manual_seed(rank)
    params["both"].grad = torch.randn(64, generator=generator)
    if rank == 1:
        params["one"].grad = torch.randn(64, generator=generator)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}
    optimizer.step()
    return {"before": before, "gradients": gradients, "after": dict(optimizer.masks)}


def averages(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {"several": several_ranks()}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.tensor([1.0 + 2 * rank, -3.0 * rank, 0.0, 0.25], dtype=dtype)
        results[str(dtype)] = average_over_ranks(tensor)
        results[f"{dtype} in place"] = results[str(dtype)] is tensor
    broken = torch.tensor([1.0, float("nan") if rank else 2.0, float("inf"), -float("inf") * (1 - 2 * rank)])
    results["broken"] = average_over_ranks(broken)
    results["matrix"] = average_over_ranks(torch.full((3, 2), float(rank)).t())
    return results


def disagreements(rank: int, world: int) -> dict[str, str]:
    """Return what the check says of ranks that agree, and of some in which one thing was changed."""

    def verdict(change: Callable[[dst.SparseOptimizer], object], guilty: bool) -> str:
        _, optimizer = build("set")
        if guilty:
            with torch.no_grad():
                change(optimizer)
        try:
            dst.assert_same_on_all_ranks(optimizer)
        except RuntimeError as error:
            return str(error)
        return "the same"

    last = rank == world - 1
    first_weight = NAMES[0]
    return {
        "nothing": verdict(lambda _: None, True),
        "step": verdict(lambda optimizer: setattr(optimizer.sparsifier, "step", 7), last),
        "mask": verdict(lambda optimizer: optimizer.masks[NAMES[1]][0].logical_not_(), last),
        "weight": verdict(
            lambda optimizer: optimizer.sparsifier.params[first_weight][0, 0].add_(1), rank > 0
        ),
        "names": verdict(lambda optimizer: optimizer.sparsifier.params.pop(first_weight), last),
    }


def work(rank: int, world: int) -> dict[str, Any]:
    return {
        "averages": averages(rank),
        "unequal": grow_by_unequal_gradients(rank),
        "trained": {name: train_in_ranks(rank, world, name) for name in ALGORITHMS},
        "accumulated": {
            name: train_in_ranks(rank, world, name, accumulate=True) for name in ("rigl", "slak")
        },
        "disagreements": disagreements(rank, world),
    }


# --- The tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(__file__, request.param, tmp_path_factory.mktemp("ranks"))


def test_an_average_is_the_mean_on_every_rank(ranks: list[dict[str, Any]]):
    for results in (rank["averages"] for rank in ranks):
        assert results["several"]
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert results[str(dtype)].dtype == dtype
            mean = (len(ranks) - 1) / 2
            assert results[str(dtype)].tolist() == [1 + 2 * mean, -3 * mean, 0.0, 0.25]
            assert results[f"{dtype} in place"]
        assert results["broken"].isnan().tolist() == [False, True, False, True]
        assert results["broken"][2] == float("inf")
        assert results["matrix"].tolist() == [[(len(ranks) - 1) / 2] * 3] * 2


@pytest.mark.parametrize("kind", ["trained", "accumulated"])
def test_ranks_hold_the_same_bits_at_every_step(ranks: list[dict[str, Any]], kind: str):
    first, *others = (rank[kind] for rank in ranks)
    for name in first:
        assert len(first[name]["trace"]) == STEPS + 1
        assert len(first[name]["trace"][-1]["state"]) == 4  # of two weights and two biases
        for other in others:
            assert same(first[name]["trace"], other[name]["trace"])
            assert not same(first[name]["drawn"], other[name]["drawn"])  # their generators did differ


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ranks_are_one_process_with_the_joined_batch(ranks: list[dict[str, Any]], algorithm: str):
    for kind in ("trained", "accumulated"):
        if algorithm not in ranks[0][kind]:
            continue
        together = ranks[0][kind][algorithm]["trace"]
        for here, there in zip(alone(algorithm), together, strict=True):
            assert same(here["masks"], there["masks"])
            for name, weight in here["weights"].items():
                torch.testing.assert_close(there["weights"][name], weight, rtol=1e-9, atol=1e-12)


def test_masks_moved(ranks: list[dict[str, Any]]):
    for name, results in ranks[0]["trained"].items():
        first, last = results["trace"][0]["masks"], results["trace"][-1]["masks"]
        assert all(torch.equal(first[key], last[key]) == (name == "static") for key in NAMES)


def test_only_updates_that_read_gradients_send_messages(ranks: list[dict[str, Any]]):
    due = [dst.rigl(total_steps=32, interval=3).due(step) for step in range(1, STEPS + 1)]
    assert sum(due) == 7
    size = sum(10 * 16 * 8 if name == "0.weight" else 16 * 3 * 8 for name in NAMES)
    for rank in ranks:
        # One average a tensor, and one agreement on which tensors have a gradient: an int32 each.
        update = [len(NAMES) + 1, size + 4 * len(NAMES)]
        for kind in ("trained", "accumulated"):
            assert rank[kind]["rigl"]["sent"] == [update if now else [0, 0] for now in due]
        for name in ("static", "set", "slak"):
            assert rank["trained"][name]["sent"] == [[0, 0]] * STEPS
        assert rank["accumulated"]["slak"]["sent"] == [[0, 0]] * STEPS


def test_the_first_difference_is_named_on_every_rank(ranks: list[dict[str, Any]]):
    world = len(ranks)
    last = f"rank {world - 1}"
    others = "rank 1" if world == 2 else "ranks 1, 2, 3"
    for said in (rank["disagreements"] for rank in ranks):
        assert said["nothing"] == "the same"
        assert said["step"].startswith(f"the step on {last} differs from that on rank 0")
        assert said["mask"].startswith(f"the mask of '2.weight' on {last} differs")
        assert said["weight"].startswith(f"the weight '0.weight' on {others} differs")
        assert said["names"].startswith(f"the list of masked tensors on {last} differs")


def test_gradients_that_differ_or_are_missing_give_one_mask(ranks: list[dict[str, Any]]):
    unequal = [rank["unequal"] for rank in ranks]
    first, second = unequal[:2]
    for other in unequal:
        assert same(first["before"], other["before"])
        assert same(first["after"], other["after"])
    assert torch.equal(first["after"]["none"], first["before"]["none"])
    # By hand: the mean before the absolute value, a missing gradient counting as zero.
    mean = {
        "both": sum(rank["gradients"]["both"].double() for rank in unequal) / len(ranks),
        "one": second["gradients"]["one"] / len(ranks),
    }
    fraction = dst.rigl(total_steps=100, interval=1).drop_fraction(1)
    for name, gradient in mean.items():
        before = first["before"][name]
        k = int(fraction * int(before.count_nonzero()))
        kept = dst.prune(torch.linspace(1, 2, 64), before, k)
        assert torch.equal(first["after"][name], dst.grow(gradient.abs(), kept, k))
        assert not torch.equal(first["after"][name], before)


if __name__ == "__main__":
    rank_main(work)
