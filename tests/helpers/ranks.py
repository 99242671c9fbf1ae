"""Start several real processes, judge them by their result files, and count what they send.

A process of gloo sometimes aborts at its exit after correct work, so the file that it wrote counts, not its
exit code; and a process that waits for another for ever is killed at a deadline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240  # seconds, for a busy machine; two processes need about ten


def launch(script: str, world: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a script as each of `world` ranks and return what they handed to `rank_main`, by rank."""
    files = [folder / f"rank-{rank}.pt" for rank in range(world)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    logs = [(folder / f"rank-{rank}.log").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder), *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            pairs = zip(processes, files, strict=True)
            if any(process.poll() not in (None, 0) and not file.exists() for process, file in pairs):
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
    said = "\n".join((folder / f"rank-{rank}.log").read_text() for rank in range(world))
    assert all(file.exists() for file in files), f"the processes wrote no result:\n{said}"
    return [torch.load(file, weights_only=True) for file in files]


def rank_main(work: Callable[..., dict[str, Any]]) -> None:
    """Be one of the processes: join the others, work, write the result in one piece."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    results = work(rank, world, *sys.argv[4:])
    torch.save(results, folder / f"part-{rank}.pt")
    (folder / f"part-{rank}.pt").rename(folder / f"rank-{rank}.pt")  # a file that is there is whole
    dist.barrier()


class Traffic(TorchDispatchMode):
    """Count the collectives run inside, and the bytes of the tensors given to them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = 0
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # seen again as what it does to the local tensors
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            self.messages += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(args))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def same(left: object, right: object) -> bool:
    """Compare nested dicts and lists of tensors and primitives."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
