"""Reading verified shards from files against ``cat`` of the same bytes, cold and warm.

Ours: `read_shard` of every shard by two threads that use their memory again, as training does, crc32 checked,
tensors in memory; ``fresh`` does the same in memory that was not used before. The other side:
``cat`` of the same files into a pipe that a second process drains. ``cold`` drops the files from the
page cache first (``posix_fadvise``), ``warm`` leaves them there. The sides take turns; reported is the
median. A virtual disk may answer from the memory of its host even when cold: the table then shows how
fast.

    python benchmarks/bench_shard_read.py                                # 32 shards of 64 MiB
    python benchmarks/bench_shard_read.py --shards 4 --shard-mib 16      # a second
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from environment import describe, save

from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

MIB = 1 << 20
TARGETS = {"cold": 0.8, "warm": 0.4}


def make_shards(storage: Storage, args: argparse.Namespace) -> list[ObjectEntry]:
    """Shards of different bytes: embeddings in fp16 and the ids of their nodes."""
    entries = []
    for number in range(args.shards):
        random = torch.Generator().manual_seed(number)
        rows = args.shard_mib * MIB // (256 * 2 + 8)
        tensors = {
            "embeddings.2": torch.randint(1 << 14, (rows, 256), generator=random, dtype=torch.int16).view(
                torch.float16
            ),
            "n_id": torch.arange(rows),
        }
        entries.append(write_shard(storage, f"part-{number:05d}", tensors))
    return entries


def forget(files: list[Path]) -> None:
    """Drops the files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(storage: Storage, entries: list[ObjectEntry], buffers: BufferPool | None, threads: int) -> None:
    def read(entry: ObjectEntry) -> int:
        return len(read_shard(storage, entry, pool=buffers)["n_id"])  # the tensors are dropped: a consumer keeps a few

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(read, entries))


def cat(files: list[Path]) -> None:
    reader = subprocess.Popen(["cat", *map(str, files)], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    subprocess.run(["dd", "of=/dev/null", "bs=1M", "status=none"], stdin=reader.stdout, check=True)
    assert reader.wait() == 0


def measure(storage: Storage, entries: list[ObjectEntry], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """MiB/s of both sides, cold and warm."""
    files = [Path(storage.local_path(entry.key) or "") for entry in entries]
    total = sum(entry.num_bytes for entry in entries) / MIB
    buffers = BufferPool(args.threads)
    sides: dict[str, Callable[[], None]] = {
        "read_shard": lambda: ours(storage, entries, buffers, args.threads),
        "read_shard_fresh": lambda: ours(storage, entries, None, args.threads),
        "cat": lambda: cat(files),
    }
    found: dict[str, dict[str, Any]] = {}
    for cache in ("cold", "warm"):
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side, read in sides.items():
                if cache == "cold":
                    forget(files)
                else:
                    cat(files)
                begin = time.perf_counter()
                read()
                rates[side].append(total / (time.perf_counter() - begin))
        found[cache] = {f"{side}_mib_per_s": statistics.median(values) for side, values in rates.items()}
        found[cache]["all_mib_per_s"] = rates
        found[cache]["ratio"] = found[cache]["read_shard_mib_per_s"] / found[cache]["cat_mib_per_s"]
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--shard-mib", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--name", default="shard-read", help="of the JSON file under benchmarks/results")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gkd-shards-") as folder:
        storage = Storage.open(folder)
        found = measure(storage, make_shards(storage, args), args)
    print(f"{'':8s}{'read_shard MiB/s':>18s}{'fresh':>10s}{'cat MiB/s':>14s}{'ratio':>10s}{'target':>10s}")
    for cache, row in found.items():
        print(f"{cache:8s}{row['read_shard_mib_per_s']:18.0f}{row['read_shard_fresh_mib_per_s']:10.0f}{row['cat_mib_per_s']:14.0f}{row['ratio']:10.2f}"
              f"{TARGETS[cache]:10.2f}")  # fmt: skip
    case = {name: value for name, value in vars(args).items() if name not in ("folder", "name")}
    save(args.name, {"case": case, "rates": found, "targets": TARGETS, "environment": describe()})


if __name__ == "__main__":
    main(sys.argv[1:])
