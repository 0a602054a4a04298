"""Inference with two tasks in flight where memory is scarce: ``python scarce_memory.py ROOT NAME [BYTES]``.

Without BYTES: one run with one task in flight, one with two, and one task at a time of the model whose layers are as
wide as its input; prints how far the address space has grown by the end of each.
With BYTES: one run with two tasks in flight, where it may grow by no more than that.
Prints one line of JSON, with the digests of the knowledge; warnings and errors go to stderr, as those of `gkd` do.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from gkd_dist.config import InferConfig
from gkd_dist.errors import GkdError
from gkd_dist.infer import worker
from gkd_dist.infer.plan import Task, Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage

_MEET_S = 30.0  # a busy machine is slow; a task that meets the limit ends the wait of the other


class Threads:
    """Tasks in flight in threads of one worker, as an actor has them."""

    def __init__(self, window: int) -> None:
        self.num_slots = window
        self._worker, self._threads = worker.Worker(), ThreadPoolExecutor(window)
        self._flights: dict[Future[worker.Result], Task] = {}

    def submit(self, request: worker.Request) -> None:
        self._flights[self._threads.submit(self._worker.run, request)] = request.task

    def wait(self) -> list[tuple[Task, worker.Result]]:
        done, _ = wait(self._flights, return_when=FIRST_COMPLETED)
        return [(self._flights.pop(flight), flight.result()) for flight in done]

    def discard(self) -> None:
        wait(self._flights)
        self._flights.clear()


def meet_after_reading() -> None:
    """The first two tasks both hold what they have read before either computes, if both get so far."""
    barrier, plain, shrink = threading.Barrier(2), worker.layerwise.one_hop_graph, worker.Room.shrink

    def one_hop_graph(*args: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(_MEET_S)
        barrier.abort()
        return plain(*args)

    def end_the_wait(room: worker.Room) -> None:
        barrier.abort()
        shrink(room)

    worker.layerwise.one_hop_graph = one_hop_graph
    worker.Room.shrink = end_the_wait


def infer(root: Storage, graph: str, out: str, pool: Threads, model: str = "narrow") -> list[str]:
    """Digests of the knowledge."""
    store, knowledge = GraphStore.open(root.child(graph)), root.child(out)
    manifest = infer_nodes(
        root.child(model), store, knowledge, Wants(), InferConfig(num_actors=0), fingerprint="k" * 64, pool=pool
    )
    return [entry.sha256 for entry in manifest.parts]


def memory(name: str) -> int:
    """``VmSize`` or ``VmPeak`` of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def main(root: Storage, name: str, limit: int | None) -> None:
    single, double = Threads(1), Threads(2)
    for number, pool in enumerate((single, double)):
        infer(root, "small", f"{name}-small-{number}", pool)  # brings in what stays
    idle = memory("VmSize")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (idle + limit, idle + limit))
        meet_after_reading()
        print(json.dumps({"digests": infer(root, "graph", name, double)}))
        return
    digests = infer(root, "graph", name, single)
    grown = [memory("VmPeak") - idle]
    meet_after_reading()
    assert infer(root, "graph", f"{name}-double", double) == digests
    grown.append(memory("VmPeak") - idle)
    infer(root, "graph", f"{name}-wide", single, "wide")
    print(json.dumps({"digests": digests, "grown": [*grown, memory("VmPeak") - idle]}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    threading.stack_size(1 << 20)
    try:
        main(Storage.open(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
    except GkdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
