"""Sharded training (FSDP2, tensor parallel) chooses what one process chooses; its checkpoints fit any world.

Rows are 7 and 3, so that shards are uneven and on four ranks one of them is empty. Run as a script, this
file is one of the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Traffic, launch, rank_main, same
from torch import Tensor, nn

import dst

pytestmark = pytest.mark.slow
STEPS, SAVED_AT = 16, 8


@dataclass(frozen=True)
class Everything:
    """Use all that an algorithm may: dense weights, gradients, keys, optimizer state and memory."""

    dense_weights = True
    needs = frozenset({"grad", "keys", "state"})

    def due(self, step: int) -> bool:
        return step % 3 == 0

    def update(
        self,
        step: int,
        counts: Mapping[str, int],
        evidence: Mapping[str, dst.Evidence],
        memory: dict[str, Any],
    ) -> dst.Update:
        masks, memory = (
            {},
            {"steps": [*memory.get("steps", []), step], "before": dict(memory.get("before", {}))},
        )
        for name, wanted in counts.items():
            seen = evidence[name]
            assert seen.grad is not None
            assert seen.keys is not None
            before = memory["before"].get(name, torch.zeros_like(seen.weight))
            moment = seen.state["exp_avg"]
            assert isinstance(moment, Tensor)
            scores = (seen.weight + before).abs() + moment.abs() + seen.grad.abs() + (seen.keys % 7) / 100
            masks[name] = dst.draw(scores, wanted)
            memory["before"][name] = seen.weight.clone()
        return dst.Update(masks, memory)


ALGORITHMS: dict[str, Callable[[], dst.Algorithm]] = {
    "static": dst.static,
    "set": lambda: dst.set_(total_steps=20, interval=3),
    "set, mean": lambda: dst.set_(total_steps=20, interval=3, newcomers="mean"),
    "rigl": lambda: dst.rigl(total_steps=20, interval=3),
    "slak": lambda: dst.slak(total_steps=20, interval=3),
    "everything": Everything,
}
NAMES = ["0.weight", "2.weight"]


# --- What is trained, alone or together ----------------------------------------------------------------


def network(hidden: int = 7) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def wrap(model: nn.Module, algorithm: dst.Algorithm) -> dst.SparseOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return dst.SparseOptimizer(base, model, sparsity=0.6, algorithm=algorithm, seed=3)


def batch(step: int) -> Tensor:
    return torch.randn(8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return value


def snapshot(optimizer: dst.SparseOptimizer) -> dict[str, Any]:
    engine = optimizer.sparsifier
    return {
        "masks": whole(dict(engine.masks)),
        "weights": whole(dict(engine.params)),
        "state": whole({name: dict(optimizer.state.get(p, {})) for name, p in engine.params.items()}),
        "counters": [engine.step, engine.updates, engine.counts, engine.explored, engine.last_grown],
        "dense": {name: whole(engine.weights(name)) for name in engine.params},
    }


def train(
    model: nn.Module, optimizer: dst.SparseOptimizer, steps: range, rank: int = 0, world: int = 1
) -> Iterator[Traffic]:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step).view(world, -1, 10)[rank]).backward()
        with Traffic() as traffic:
            optimizer.step()
        yield traffic


def alone(algorithm: str, hidden: int = 7) -> list[dict[str, Any]]:
    model = network(hidden)
    optimizer = wrap(model, ALGORITHMS[algorithm]())
    return [snapshot(optimizer), *(snapshot(optimizer) for _ in train(model, optimizer, range(1, STEPS + 1)))]


class Exact(nn.Module):
    """Two layers whose gradients are small integers for integer data: no sum of them is ever rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 7, bias=False)
        self.two = nn.Linear(10, 5, bias=False)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randint(-64, 65, parameter.shape, generator=generator) / 64)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (self.one(x) * first).sum() + (self.two(x) * second).sum()


def train_exactly(
    shard: Callable[[nn.Module], object], rank: int = 0, world: int = 1, *, accumulate: bool = False
) -> list[dict[str, Any]]:
    model = Exact()
    shard(model)
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=1 / 64, momentum=0.5),
        model,
        sparsity=0.6,
        distribution=dst.uniform,
        algorithm=ALGORITHMS["rigl"](),
    )
    trace = [snapshot(optimizer)]
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        data = [torch.randint(-4, 5, (8, size), generator=generator).float() for size in (10, 7, 5)]
        # Ranks average, so each takes its part times the number of ranks: the joined sum.
        mine = [part.view(2, world, -1, part.shape[1])[:, rank] for part in data]
        optimizer.zero_grad()
        for half in (0, 1) if accumulate else (slice(None),):
            if accumulate:
                model.set_requires_gradient_sync(half == 1)
            x, first, second = (part[half].reshape(-1, part.shape[-1]) for part in mine)
            model(x, first * world, second * world).backward()
        optimizer.step()
        trace.append(snapshot(optimizer))
    return trace


# --- One of the processes --------------------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def to_save(optimizer: dst.SparseOptimizer) -> dst.Sparsifier | tuple[dict[str, Any]]:
    """Return the engine, which saves itself, or its state in one piece if the algorithm has a memory."""
    engine = optimizer.sparsifier
    return (engine.state_dict(),) if isinstance(engine.algorithm, Everything) else engine


def train_in_shards(rank: int, world: int, algorithm: str, folder: str) -> dict[str, Any]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    torch.manual_seed(1000 + rank)
    model = sharded(network())
    optimizer = wrap(model, ALGORITHMS[algorithm]())
    trace, sent = [snapshot(optimizer)], []
    for step, traffic in enumerate(train(model, optimizer, range(1, STEPS + 1), rank, world), start=1):
        trace.append(snapshot(optimizer))
        sent.append(traffic.messages)
        if step == SAVED_AT:
            state = {
                "model": get_model_state_dict(model),
                "optim": get_optimizer_state_dict(model, optimizer.base),
                "sparse": to_save(optimizer),
            }
            checkpoint.save(state, checkpoint_id=f"{folder}/{algorithm}")
    saved = optimizer.sparsifier.state_dict()
    rows = [optimizer.masks[name].to_local().shape[0] for name in NAMES]
    dst.assert_same_on_all_ranks(optimizer)
    return {"trace": trace, "sent": sent, "saved": saved, "rows": rows}


def resume_in_shards(rank: int, world: int, algorithm: str, folder: str) -> list[dict[str, Any]]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint import state_dict as states

    model = sharded(network())
    optimizer = wrap(model, ALGORITHMS[algorithm]())
    state = {
        "model": states.get_model_state_dict(model),
        "optim": states.get_optimizer_state_dict(model, optimizer.base),
        "sparse": to_save(optimizer),
    }
    checkpoint.load(state, checkpoint_id=f"{folder}/{algorithm}")
    if isinstance(state["sparse"], tuple):
        optimizer.sparsifier.load_state_dict(state["sparse"][0])
    states.set_model_state_dict(model, state["model"])
    states.set_optimizer_state_dict(model, optimizer.base, state["optim"])
    trace = [snapshot(optimizer)]
    for _ in train(model, optimizer, range(SAVED_AT + 1, STEPS + 1), rank, world):
        trace.append(snapshot(optimizer))
    return trace


def train_tensor_parallel(world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {}
    for algorithm in ("set", "rigl"):
        # torch's own tensor parallelism wants even shards.
        model = parallelize_module(network(8), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = wrap(model, ALGORITHMS[algorithm]())
        result[algorithm] = [snapshot(optimizer)]
        for _ in train(model, optimizer, range(1, STEPS + 1)):
            result[algorithm].append(snapshot(optimizer))
    return result


def train_in_two_dimensions() -> dict[str, Any]:
    """Train with the rows of the first layer sharded twice: by tensor parallelism and by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    result: dict[str, Any] = {}
    for algorithm in ("set, mean", "rigl"):
        model = network(8)
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh["data"])
        optimizer = wrap(model, ALGORITHMS[algorithm]())
        result[algorithm] = [snapshot(optimizer)]
        for _ in train(model, optimizer, range(1, STEPS + 1), mesh.get_local_rank("data"), 2):
            result[algorithm].append(snapshot(optimizer))
    return result


def train_in_replicated_shards() -> list[dict[str, Any]]:
    """Train with two replicas of two shards each (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    model = network()
    fully_shard(model, mesh=mesh)
    optimizer = wrap(model, ALGORITHMS["rigl"]())
    steps = train(model, optimizer, range(1, STEPS + 1), dist.get_rank(), 4)
    trace = [snapshot(optimizer), *(snapshot(optimizer) for _ in steps)]
    dst.assert_same_on_all_ranks(optimizer)
    return trace


def refusal(world: int) -> str:
    """Return what is said of a parameter of which every rank holds a summand only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    model = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (world,))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    try:
        wrap(model, dst.static())
    except ValueError as error:
        return str(error)
    return "accepted"


def work(rank: int, world: int, folder: str, resume: str) -> dict[str, Any]:
    results: dict[str, Any] = {
        "trained": {name: train_in_shards(rank, world, name, folder) for name in ALGORITHMS},
        "exact": train_exactly(sharded, rank, world),
        "accumulated": train_exactly(sharded, rank, world, accumulate=True),
        "tensor parallel": train_tensor_parallel(world),
    }
    if resume:
        results["resumed"] = {name: resume_in_shards(rank, world, name, resume) for name in ALGORITHMS}
        results["refusal"] = refusal(world)
        results["two dimensions"] = train_in_two_dimensions()
        results["replicated shards"] = train_in_replicated_shards()
    return results


# --- The tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(__file__, 2, folder, str(folder / "saved"), "")


@pytest.fixture(scope="module")
def four(
    two: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    return launch(__file__, 4, folder, str(folder / "saved"), str(two[0] / "saved"))


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue("two")[1] if request.param == 2 else request.getfixturevalue("four")


def assert_close(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Masks and counters are equal, weights and optimizer state up to the order of a sum."""
    assert same(here["masks"], there["masks"])
    assert same(here["counters"], there["counters"])
    for kind in ("weights", "state", "dense"):
        torch.testing.assert_close(there[kind], here[kind], rtol=1e-9, atol=1e-12)
    for name, mask in there["masks"].items():
        inactive = there["weights"][name][~mask]
        assert not inactive.any()
        assert not inactive.signbit().any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shards_choose_what_one_process_chooses(ranks: list[dict[str, Any]], algorithm: str):
    expected = alone(algorithm)
    assert (expected[-1]["counters"][1] > 0) == (algorithm != "static")
    for rank in ranks:
        trace = rank["trained"][algorithm]["trace"]
        assert len(trace) == len(expected) == STEPS + 1
        for here, there in zip(expected, trace, strict=True):
            assert_close(here, there)
        assert same(trace, ranks[0]["trained"][algorithm]["trace"])


def test_the_shards_are_uneven_and_one_may_be_empty(ranks: list[dict[str, Any]]):
    rows = [rank["trained"]["set"]["rows"] for rank in ranks]
    assert rows == ([[4, 2], [3, 1]] if len(ranks) == 2 else [[2, 1], [2, 1], [2, 1], [1, 0]])


@pytest.mark.parametrize("kind", ["exact", "accumulated"])
def test_gradients_without_rounding_give_the_same_bits(ranks: list[dict[str, Any]], kind: str):
    expected = train_exactly(lambda model: model)
    assert expected[-1]["counters"][1] == 4
    for rank in ranks:
        assert same(rank[kind], expected)


def test_nothing_is_sent_between_updates(ranks: list[dict[str, Any]]):
    for name, make in ALGORITHMS.items():
        due = [make().due(step) for step in range(1, STEPS + 1)]
        for rank in ranks:
            sent = rank["trained"][name]["sent"]
            assert [messages > 0 for messages in sent] == due


def test_the_saved_state_is_whole_on_every_rank(ranks: list[dict[str, Any]]):
    for name in ALGORITHMS:
        states = [rank["trained"][name]["saved"] for rank in ranks]
        assert all(same(state, states[0]) for state in states)
        model = network()
        optimizer = wrap(model, ALGORITHMS[name]())
        optimizer.sparsifier.load_state_dict(states[0])  # one process, another world size
        assert same(dict(optimizer.masks), ranks[0]["trained"][name]["trace"][-1]["masks"])
        assert same(optimizer.sparsifier.state_dict(), states[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    two: tuple[Path, list[dict[str, Any]]], four: list[dict[str, Any]], algorithm: str
):
    uninterrupted = two[1][0]["trained"][algorithm]["trace"][SAVED_AT:]
    for rank in four:
        trace = rank["resumed"][algorithm]
        assert same(trace[0], uninterrupted[0])
        assert len(trace) == len(uninterrupted)
        for here, there in zip(uninterrupted, trace, strict=True):
            assert_close(here, there)


def test_a_memory_that_a_checkpoint_has_lost_is_noticed():
    model = network()
    optimizer = wrap(model, Everything())
    list(train(model, optimizer, range(1, 4)))
    state = optimizer.sparsifier.state_dict()
    wrap(network(), Everything()).sparsifier.load_state_dict(state)
    with pytest.raises(ValueError, match="memory 'steps' was not loaded"):
        wrap(network(), Everything()).sparsifier.load_state_dict({**state, "memory": {}})


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
def test_tensor_parallel_layers_choose_what_one_process_chooses(ranks: list[dict[str, Any]], algorithm: str):
    for rank in ranks:
        for here, there in zip(alone(algorithm, 8), rank["tensor parallel"][algorithm], strict=True):
            assert_close(here, there)


@pytest.mark.parametrize("algorithm", ["set, mean", "rigl"])
def test_a_dimension_may_be_sharded_twice(four: list[dict[str, Any]], algorithm: str):
    for rank in four:
        for here, there in zip(alone(algorithm, 8), rank["two dimensions"][algorithm], strict=True):
            assert_close(here, there)


def test_replicas_of_shards_choose_what_one_process_chooses(four: list[dict[str, Any]]):
    for rank in four:
        for here, there in zip(alone("rigl"), rank["replicated shards"], strict=True):
            assert_close(here, there)


def test_a_parameter_in_summands_is_refused(four: list[dict[str, Any]]):
    for rank in four:
        assert rank["refusal"].startswith("'weight' is a DTensor placed as (Partial")


if __name__ == "__main__":
    rank_main(work)
