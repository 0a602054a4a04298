"""C6 in small: four times the graph in parts of the same size takes the same memory.

The working sets are tens of MiB, far from the GiB of a real measurement, but a list that grows with
the parts, or a whole graph held somewhere, shows.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gkd_dist.config import ModelConfig, PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.build import build_graph_store
from gkd_dist.storage import Storage

pytestmark = pytest.mark.timeout(300)

PART_NODES, FEATURES, SLACK = 6_000, 128, 6 << 20


def make_store(root: Path, num_parts: int) -> None:
    """One ring of communities per part: each part is a component of ``PART_NODES`` nodes, degree 6."""
    nodes = torch.arange(num_parts * PART_NODES)
    first = nodes // PART_NODES * PART_NODES
    edges = [torch.stack([first + (nodes - first + k) % PART_NODES, nodes]) for k in (1, 2, 3, -1, -2, -3)]
    mask = torch.zeros(nodes.numel(), dtype=torch.bool)
    graph = Graph(torch.rand(nodes.numel(), FEATURES), torch.cat(edges, 1), nodes % 3, ~mask, mask, mask, 3)
    graph = replace(graph, name="rings")
    storage = Storage.open(str(root))
    config = PartitionConfig(method="components", num_parts=num_parts)
    build_graph_store(graph, storage.child("graph"), config, halo_hops=1, seed=0, fingerprint="g")
    spec = ModelSpec(ModelConfig(kind="sage", hidden=256), FEATURES, 3, "multiclass")
    save_model(storage.child("teacher"), build_model(spec.config, FEATURES, 3), spec, "t")


def peak(what: str, root: Path) -> int:
    script = Path(__file__).with_name("memory_probe.py")
    done = subprocess.run([sys.executable, str(script), what, str(root)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A graph of 6 parts, and one of 24."""
    roots = {num_parts: tmp_path_factory.mktemp(f"parts-{num_parts}") for num_parts in (6, 24)}
    for num_parts, root in roots.items():
        make_store(root, num_parts)
    return roots


def test_the_measurement_sees_memory_that_follows_the_graph(stores):
    peaks = {num_parts: peak("hoard", root) for num_parts, root in stores.items()}
    assert peaks[24] - peaks[6] > 16 * PART_NODES * FEATURES * 4


@pytest.mark.parametrize("what", ["infer", "stream", "train"])
def test_memory_follows_the_part(stores, what):
    peaks = {num_parts: peak(what, root) for num_parts, root in stores.items()}
    assert peaks[6] > PART_NODES * FEATURES * 4, "the probe must hold at least one part"
    assert peaks[24] <= 1.1 * peaks[6] + SLACK, peaks
