"""Inference on a Ray cluster whose second host is struck: ``python host_driver.py FOLDER MOMENT HOW KEY``.

FOLDER holds the graph store, the model and, afterwards, the knowledge. Prints the manifest's fingerprint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hosts import ADDRESSES, PORT
from strikes import Strike, StruckStorage

from gkd_dist.config import InferConfig, RayConfig
from gkd_dist.infer.actor import ActorPool
from gkd_dist.infer.cluster import start_ray
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from gkd_dist.telemetry import setup_logging

SETTINGS = InferConfig(num_actors=2, cpus_per_actor=1, dtype="fp32")
WANTS = Wants(scores={1: {"sqeuclidean"}}, embeddings=frozenset({2}))
FINGERPRINT = "f" * 64


def main(folder: Path, graph: str, model: str, moment: str, how: str, pattern: str) -> None:
    """The run; the actor on the second host meets the strike."""
    strike = Strike(moment, pattern, folder / "marker", how, ADDRESSES[1])
    out = StruckStorage.around(Storage.open(str(folder / "k")), strike)
    store = GraphStore.open(Storage.open(str(folder / graph)))
    with start_ray(RayConfig(address=f"{ADDRESSES[0]}:{PORT}"), 2, 0), ActorPool(SETTINGS) as pool:
        assert len(pool.pids()) == 2  # one on each host: they have room for no more
        infer_nodes(Storage.open(str(folder / model)), store, out, WANTS, SETTINGS, fingerprint=FINGERPRINT, pool=pool)


if __name__ == "__main__":
    setup_logging(verbose=False)
    main(Path(sys.argv[1]), *sys.argv[2:])
