"""The other side of `bench_litdata.py`; runs in a virtual environment of its own, with torch and litdata alone.

    python litdata_side.py write FOLDER OUT       # the tensors of FOLDER/*.pt, one item per file
    python litdata_side.py read OUT MODE warm     # a line in, the seconds of a pass out
    python litdata_side.py read OUT MODE cold     # the same once, over files that were dropped from the page cache

Modes: ``loader`` reads ahead in two workers (`StreamingDataLoader`), ``mapped`` iterates over the data set in this
process, whose tensors are then views of mapped files, and ``owned`` copies those. Settings: chunks of one item
(an item is a whole part, as large as a chunk should be), no compression, no encryption, a local folder that is read
in place.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def load(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def write(folder: str, out: str) -> None:
    import litdata

    files = sorted(str(path) for path in Path(folder).glob("*.pt"))
    litdata.optimize(fn=load, inputs=files, output_dir=out, chunk_size=1, num_workers=1, reorder_files=False)


def forget(out: str) -> None:
    for file in Path(out).iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(out: str) -> None:
    for file in Path(out).iterdir():
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass


def touch(item: dict[str, torch.Tensor]) -> int:
    """Looks at every page, as whoever uses the tensors would: mapped ones are not in memory before."""
    return sum(int(tensor.reshape(-1).view(torch.uint8)[::4096].sum()) for tensor in item.values())


def first(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return items[0]


def one_pass(items: Iterable[dict[str, torch.Tensor]], mode: str) -> float:
    begin = time.perf_counter()
    total = 0
    for item in items:
        total += touch({name: tensor.clone() for name, tensor in item.items()} if mode == "owned" else item)
    assert total
    return time.perf_counter() - begin


def passes(out: str, mode: str, cache: str) -> None:
    import litdata

    torch.set_num_threads(1)
    items: Iterable[dict[str, torch.Tensor]] = litdata.StreamingDataset(out, shuffle=False)
    if mode == "loader":
        items = litdata.StreamingDataLoader(
            items, batch_size=1, num_workers=2, collate_fn=first, persistent_workers=True
        )
    if cache == "warm":
        one_pass(items, mode)  # starts workers and threads
    print("ready", flush=True)
    for _ in sys.stdin:
        # mapped pages cannot be dropped, so that only the first pass of a process can be cold
        (forget if cache == "cold" else warm)(out)
        print(one_pass(items, mode), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        passes(*sys.argv[2:])
