"""What every benchmark writes beside its numbers: hardware, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torch-geometric", "ray", "deepspeed")


def describe() -> dict[str, Any]:
    """Processor, cores, Python, packages, and the commit with whether the tree was changed."""
    import torch

    root = Path(__file__).parents[1]
    git = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()  # noqa: E731
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain")),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def copy_bytes_per_s(device: Any, num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Speed of a plain copy in memory, reads and writes counted, best of some: what a kernel can hope for."""
    import torch

    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        if source.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best


def save(name: str, result: dict[str, Any]) -> None:
    """Writes ``results/<name>.json`` and says so."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(f"written: {path}")
