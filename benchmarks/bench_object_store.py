"""Shards on an S3 server: this package, plain s3fs on the same objects, and obstore where it is installed.

All sides move the same bytes to and from the same server, in turns, and every read of a shard ends
with the bytes in memory. What this package does besides, and the others do not: the crc32 of every
byte that it reads, and the digests of every shard that it writes. ``storage`` moves bytes through
`Storage` alone, ``shards`` through `read_shard` and `write_shard`.

Two servers: ``fast`` (`object_server.py`, faster than its clients) and ``moto`` (slower than they are).

    python benchmarks/bench_object_store.py                              # 8 shards of 64 MiB
    python benchmarks/bench_object_store.py --shards 2 --shard-mib 16    # a few seconds
    pip install obstore                                                  # adds its side
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from environment import describe, save

from gkd_dist.config import StorageConfig
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

MIB = 1 << 20
BUCKET = "bucket"
HERE = Path(__file__).parent
_MOTO = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://127.0.0.1:%d" % server.get_host_and_port()[1], flush=True)
sys.stdin.read()
os._exit(0)
"""
SERVERS = {"fast": [str(HERE / "object_server.py")], "moto": ["-c", _MOTO]}


@contextmanager
def serving(name: str, *options: str) -> Iterator[str]:
    """Endpoint of a server in a process of its own; the environment points to it."""
    command = [sys.executable, *SERVERS[name], *options]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        yield endpoint
    finally:
        process.stdin.close()
        process.wait(timeout=30)


class OurStorage:
    """Bytes through `Storage`."""

    def __init__(self, endpoint: str, native: bool = False) -> None:
        self.storage = Storage.open(f"s3://{BUCKET}/ours-{native}", StorageConfig(timeout_s=120, native_reads=native))

    def put(self, key: str, data: bytes) -> None:
        self.storage.write(key, data)

    def get(self, key: str, num_bytes: int) -> None:
        buffer = bytearray(num_bytes)
        assert self.storage.read_into(key, buffer) == num_bytes

    def get_range(self, key: str, start: int, stop: int) -> None:
        assert len(self.storage.read_range(key, start, stop)) == stop - start


class PlainS3fs:
    """s3fs as it comes: ``pipe_file`` and ``cat_file``."""

    def __init__(self, endpoint: str) -> None:
        import s3fs

        self.fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{BUCKET}/s3fs/{key}", data)

    def get(self, key: str, num_bytes: int) -> None:
        assert len(self.fs.cat_file(f"{BUCKET}/s3fs/{key}")) == num_bytes

    def get_range(self, key: str, start: int, stop: int) -> None:
        assert len(self.fs.cat_file(f"{BUCKET}/s3fs/{key}", start=start, end=stop)) == stop - start


class Obstore:
    """The Rust client as it comes, with or without a crc32 of what it read."""

    def __init__(self, endpoint: str, crc: bool = False) -> None:
        import obstore
        from obstore.store import S3Store

        self.api, self.crc = obstore, crc
        self.store = S3Store(BUCKET, prefix="obstore", endpoint=endpoint, region="us-east-1", access_key_id="test",
                             secret_access_key="test", client_options={"allow_http": True})  # fmt: skip

    def put(self, key: str, data: bytes) -> None:
        self.api.put(self.store, key, data, chunk_size=16 * MIB, max_concurrency=4)

    def get(self, key: str, num_bytes: int) -> None:
        found = memoryview(self.api.get(self.store, key).bytes())
        assert len(found) == num_bytes
        assert not self.crc or zlib.crc32(found)

    def get_range(self, key: str, start: int, stop: int) -> None:
        assert len(self.api.get_range(self.store, key, start=start, end=stop)) == stop - start


class OurShards:
    """Tensors through `write_shard` and `read_shard`, with crc32 and sha256 where they belong."""

    def __init__(self, endpoint: str, native: bool = False) -> None:
        self.storage = Storage.open(f"s3://{BUCKET}/shards-{native}", StorageConfig(timeout_s=120, native_reads=native))
        self.entries: dict[str, ObjectEntry] = {}

    def put(self, key: str, data: bytes) -> None:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.float16)
        self.entries[key] = write_shard(self.storage, key, {"embeddings": tensor})

    def get(self, key: str, num_bytes: int) -> None:
        assert read_shard(self.storage, self.entries[key])["embeddings"].nbytes == num_bytes

    def get_range(self, key: str, start: int, stop: int) -> None:
        self.storage.read_range(self.entries[key].key, start, stop)


def sides() -> dict[str, Callable[[str], Any]]:
    """What is compared."""
    found: dict[str, Callable[[str], Any]] = {"s3fs": PlainS3fs, "storage": OurStorage, "shards": OurShards}
    try:
        version("obstore")
    except PackageNotFoundError:
        print("obstore is not installed: its side is left out")
        return found
    found["storage, native reads"] = lambda endpoint: OurStorage(endpoint, native=True)
    found["shards, native reads"] = lambda endpoint: OurShards(endpoint, native=True)
    found["obstore"] = Obstore
    found["obstore + crc32"] = lambda endpoint: Obstore(endpoint, crc=True)
    return found


def measure(endpoint: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """MiB/s of writing and reading shards, and range reads per second, by side: the median of the repeats."""
    rng = random.Random(0)
    shard = rng.randbytes(MIB) * args.shard_mib
    keys = [f"part-{number:05d}" for number in range(args.shards)]
    spots = [rng.randrange(len(shard) - args.range_kib * 1024) for _ in range(args.ranges)]
    clients = {name: make(endpoint) for name, make in sides().items()}
    times: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": [], "range": []} for name in clients}
    total = args.shards * args.shard_mib
    for _ in range(args.repeats):
        for name, client in clients.items():
            times[name]["write"].append(total / timed(lambda c=client: [c.put(key, shard) for key in keys]))
        for name, client in clients.items():
            times[name]["read"].append(total / timed(lambda c=client: read_all(c, keys, len(shard), args.threads)))
        for name, client in clients.items():
            times[name]["range"].append(args.ranges / timed(lambda c=client: read_ranges(c, keys[0], spots, args)))
    units = {"write": "write_mib_per_s", "read": "read_mib_per_s", "range": "ranges_per_s"}
    return {name: {units[what]: statistics.median(v) for what, v in row.items()} for name, row in times.items()}


def read_all(client: Any, keys: list[str], num_bytes: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda key: client.get(key, num_bytes), keys))


def read_ranges(client: Any, key: str, spots: list[int], args: argparse.Namespace) -> None:
    with ThreadPoolExecutor(args.threads) as pool:
        list(pool.map(lambda start: client.get_range(key, start, start + args.range_kib * 1024), spots))


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def print_table(server: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"{server:26s}{'write MiB/s':>14s}{'read MiB/s':>14s}{'ranges/s':>12s}{'read vs s3fs':>14s}")
    for side, row in rows.items():
        ratio = row["read_mib_per_s"] / rows["s3fs"]["read_mib_per_s"]
        print(f"  {side:24s}{row['write_mib_per_s']:14.0f}{row['read_mib_per_s']:14.0f}{row['ranges_per_s']:12.0f}"
              f"{ratio:13.2f}x")  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--shard-mib", type=int, default=64)
    parser.add_argument("--ranges", type=int, default=400, help="range reads of one shard")
    parser.add_argument("--range-kib", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="readers at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=["fast", "moto"])
    parser.add_argument("--name", default="object-store", help="of the JSON file under benchmarks/results")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    found = {}
    for server in args.servers:
        slow = argparse.Namespace(**{**vars(args), "shards": max(1, args.shards // 4), "ranges": args.ranges // 4})
        with serving(server) as endpoint:
            if server == "moto":
                import s3fs

                s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
            found[server] = measure(endpoint, slow if server == "moto" else args)
        print_table(server, found[server])
    clients = {name: version(name) for name in ("s3fs", "fsspec", "aiobotocore")}
    save(args.name, {"case": vars(args), "servers": found, "clients": clients, "environment": describe()})


if __name__ == "__main__":
    main(sys.argv[1:])
