"""Reading the shards of a graph store against litdata on the same tensors, cold and warm.

Ours: `read_shard` of every part by two threads that use their memory again, as training does, crc32 of every byte
checked.
litdata: the same tensors, one item per part, without checks, in three ways (`litdata_side.py`):

- ``loader``: read ahead by two workers, as in training
- ``owned``: one after the other in the process that uses them, copied to memory of their own
- ``mapped``: the same without the copy: views of files that the kernel has in memory

All sides end with torch tensors of which every page was looked at, and drop them. They take turns; reported are
medians. ``cold`` drops the files from the page cache first (``posix_fadvise``; a new process of litdata each time,
because mapped pages stay), ``warm`` reads them once before. The target is against ``loader``.

litdata lives in an environment of its own:

    python3 -m venv /tmp/litdata && /tmp/litdata/bin/pip install torch==2.13.0 litdata
    python benchmarks/bench_litdata.py --litdata-python /tmp/litdata/bin/python                    # 16 parts of 64 MB
    python benchmarks/bench_litdata.py --litdata-python /tmp/litdata/bin/python --parts 4 --part-nodes 10000 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_infer_memory import make_graph
from bench_shard_read import forget
from environment import describe, save

import gkd_dist.partition.build as build
from gkd_dist.config import PartitionConfig
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage

TARGET = 1.5
MODES = ("loader", "owned", "mapped")
SIDE = Path(__file__).with_name("litdata_side.py")


def make_parts(folder: Path, args: argparse.Namespace) -> GraphStore:
    """A graph store, and the tensors of its parts as files for the other side."""
    graph = make_graph(args.parts * args.part_nodes, args.width, args.degree)
    build.assign_parts = lambda *ignored: torch.arange(graph.num_nodes) // args.part_nodes
    storage = Storage.open(str(folder / "graph"))
    config = PartitionConfig(method="metis", num_parts=args.parts)
    build.build_graph_store(graph, storage, config, halo_hops=1, seed=0, fingerprint="g" * 64)
    store = GraphStore.open(storage)
    (folder / "tensors").mkdir()
    for index in range(store.num_parts):
        torch.save(store.part(index), folder / "tensors" / f"{index:05d}.pt")
    return store


class Litdata:
    """A process of the other side that makes a pass when it is told to."""

    def __init__(self, python: str, folder: Path, mode: str, cache: str) -> None:
        command = [python, str(SIDE), "read", str(folder / "litdata"), mode, cache]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._line("ready")

    def turn(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line(""))

    def _line(self, expected: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(expected) if expected else line[:1].isdigit():
                return line
        raise SystemExit("litdata ended early; run litdata_side.py by hand to see why")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def ours(store: GraphStore, threads: int, buffers: BufferPool, cache: str) -> float:
    files = [Path(store.storage.local_path(entry.key) or "") for entry in store.manifest.parts]
    forget(files) if cache == "cold" else [file.read_bytes() for file in files]
    begin = time.perf_counter()

    def read(entry: ObjectEntry) -> int:
        tensors = read_shard(store.storage, entry, pool=buffers)
        return sum(int(tensor.reshape(-1).view(torch.uint8)[::4096].sum()) for tensor in tensors.values())

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(read, store.manifest.parts))
    return time.perf_counter() - begin


def theirs(folder: Path, args: argparse.Namespace, mode: str, cache: str) -> float:
    """One cold pass, in a process of its own."""
    side = Litdata(args.litdata_python, folder, mode, cache)
    seconds = side.turn()
    side.close()
    return seconds


def measure(folder: Path, store: GraphStore, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a pass over all parts, per side and state of the page cache."""
    write = [args.litdata_python, str(SIDE), "write", str(folder / "tensors"), str(folder / "litdata")]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    buffers = BufferPool(args.threads)
    warm = {mode: Litdata(args.litdata_python, folder, mode, "warm") for mode in MODES}
    found: dict[str, Any] = {}
    for cache in ("warm", "cold"):
        seconds: dict[str, list[float]] = {name: [] for name in ("read_shard", *MODES)}
        for _ in range(args.repeats):
            seconds["read_shard"].append(ours(store, args.threads, buffers, cache))
            for mode in MODES:
                seconds[mode].append(warm[mode].turn() if warm else theirs(folder, args, mode, cache))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = {mode: medians[mode] / medians["read_shard"] for mode in MODES}
        found[cache] = {"seconds": medians, "all": seconds, "ratios": ratios}
        for side in warm.values():
            side.close()
        warm = {}
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litdata-python", default=os.environ.get("LITDATA_PYTHON"), help="of its environment")
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--part-nodes", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--name", default="litdata", help="of the JSON file under benchmarks/results")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if not args.litdata_python:
        print("skipped: needs --litdata-python; see the first lines of this file")
        return
    program = "import litdata; print(litdata.__version__)"
    version = subprocess.run([args.litdata_python, "-c", program], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gkd-litdata-") as name:
        store = make_parts(Path(name), args)
        total = sum(entry.num_bytes for entry in store.manifest.parts)
        found = measure(Path(name), store, args)
    print(f"{total / 2**20:.0f} MiB in {args.parts} parts, litdata {version.split()[-1]}")
    for cache, row in found.items():
        print(f"{cache}: read_shard {total / 2**20 / row['seconds']['read_shard']:.0f} MiB/s")
        for mode in MODES:
            rate, ratio = total / 2**20 / row["seconds"][mode], row["ratios"][mode]
            target = f" (target {TARGET})" if mode == "loader" else ""
            print(f"      litdata {mode:7s} {rate:.0f} MiB/s: ours is {ratio:.2f} times as fast{target}")
    case = {key: value for key, value in vars(args).items() if key not in ("folder", "name", "litdata_python")}
    result = {"case": case, "bytes": total, "passes": found, "target": TARGET, "litdata": version.split()[-1]}
    save(args.name, result | {"environment": describe()})


if __name__ == "__main__":
    main(sys.argv[1:])
