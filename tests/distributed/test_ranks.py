"""Two real processes: averages, masks and weights agree on both and with one process on the joined batch.

The processes write their results to files, which are judged: a process of gloo sometimes aborts at its exit
after correct work. Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dst
from dst.sync import average_over_ranks, several_ranks

WORLD = 2
TIMEOUT = 240  # seconds, for a busy machine; the processes need about ten
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


def snapshot(model: nn.Module, optimizer: dst.SparseOptimizer) -> dict[str, dict[str, Tensor]]:
    return {
        "masks": {name: mask.clone() for name, mask in optimizer.masks.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
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


def train_in_ranks(rank: int, algorithm: str, *, accumulate: bool = False) -> dict[str, Any]:
    """Train on this rank's part of each batch, counting the messages that are not the model's own."""
    torch.manual_seed(1000 + rank)  # what a rank draws elsewhere must not matter
    model, optimizer = build(algorithm)
    parallel = nn.parallel.DistributedDataParallel(model)
    trace, messages = [snapshot(model, optimizer)], []
    original, sent = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: sent.append(1) or original(*args, **kwargs)
    try:
        for step in range(1, STEPS + 1):
            sent.clear()
            part = batch(step).view(2, WORLD, 2, 10)[:, rank]
            optimizer.zero_grad()
            if accumulate:
                with parallel.no_sync():
                    (loss_of(parallel, part[0]) / 2).backward()
                (loss_of(parallel, part[1]) / 2).backward()
            else:
                loss_of(parallel, part.reshape(4, 10)).backward()
            optimizer.step()
            trace.append(snapshot(model, optimizer))
            messages.append(len(sent))
    finally:
        dist.all_reduce = original
    return {"trace": trace, "messages": messages, "drawn": torch.rand(1)}


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


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    results = {
        "averages": averages(rank),
        "unequal": grow_by_unequal_gradients(rank),
        "trained": {name: train_in_ranks(rank, name) for name in ALGORITHMS},
        "accumulated": {name: train_in_ranks(rank, name, accumulate=True) for name in ("rigl", "slak")},
    }
    torch.save(results, folder / f"part-{rank}.pt")
    (folder / f"part-{rank}.pt").rename(folder / f"rank-{rank}.pt")  # a file that is there is whole
    dist.barrier()


# --- The tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    files = [folder / f"rank-{rank}.pt" for rank in range(WORLD)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    logs = [(folder / f"rank-{rank}.log").open("w+") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            if any(
                p.poll() not in (None, 0) and not f.exists() for p, f in zip(processes, files, strict=True)
            ):
                break
            time.sleep(0.05)
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    said = "\n".join((folder / f"rank-{rank}.log").read_text() for rank in range(WORLD))
    assert all(file.exists() for file in files), f"the processes wrote no result:\n{said}"
    return [torch.load(file, weights_only=True) for file in files]


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_an_average_is_the_mean_on_every_rank(ranks: list[dict[str, Any]]):
    for results in (rank["averages"] for rank in ranks):
        assert results["several"]
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert results[str(dtype)].dtype == dtype
            assert results[str(dtype)].tolist() == [2.0, -1.5, 0.0, 0.25]
            assert results[f"{dtype} in place"]
        assert results["broken"].isnan().tolist() == [False, True, False, True]
        assert results["broken"][2] == float("inf")
        assert results["matrix"].tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize("kind", ["trained", "accumulated"])
def test_ranks_hold_the_same_bits_at_every_step(ranks: list[dict[str, Any]], kind: str):
    first, second = (rank[kind] for rank in ranks)
    for name in first:
        assert len(first[name]["trace"]) == STEPS + 1
        assert same(first[name]["trace"], second[name]["trace"])
        assert not same(first[name]["drawn"], second[name]["drawn"])  # their generators did differ


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
    for rank in ranks:
        # One average a tensor, and one agreement on which tensors have a gradient.
        assert rank["trained"]["rigl"]["messages"] == [len(NAMES) + 1 if now else 0 for now in due]
        for name in ("static", "set", "slak"):
            assert not any(rank["trained"][name]["messages"])


def test_gradients_that_differ_or_are_missing_give_one_mask(ranks: list[dict[str, Any]]):
    first, second = (rank["unequal"] for rank in ranks)
    assert same(first["before"], second["before"])
    assert same(first["after"], second["after"])
    assert torch.equal(first["after"]["none"], first["before"]["none"])
    # By hand: the mean before the absolute value, a missing gradient counting as zero.
    mean = {
        "both": (first["gradients"]["both"] + second["gradients"]["both"]) / 2,
        "one": second["gradients"]["one"] / 2,
    }
    fraction = dst.rigl(total_steps=100, interval=1).drop_fraction(1)
    for name, gradient in mean.items():
        before = first["before"][name]
        k = int(fraction * int(before.count_nonzero()))
        kept = dst.prune(torch.linspace(1, 2, 64), before, k)
        assert torch.equal(first["after"][name], dst.grow(gradient.abs(), kept, k))
        assert not torch.equal(first["after"][name], before)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
