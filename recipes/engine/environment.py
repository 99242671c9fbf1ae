"""Which code, which library and which machine a run is made by; the head of every log."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def git_commit() -> str | None:
    """Return the commit of the source tree, `-dirty` where files differ; None where git cannot tell."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def describe(device: torch.device) -> dict[str, str]:
    """Return what the log's head says about code and machine."""
    on = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "commit": git_commit() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({on}, {torch.get_num_threads()} threads of {os.cpu_count()} cores)",
    }
