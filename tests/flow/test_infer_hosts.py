"""A host of a Ray cluster is lost while its actor holds a task: the other host finishes the run, to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import two_hosts
from infer_worlds import World, make_graph

from gkd_dist.config import InferConfig
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.shards.manifest import Manifest
from gkd_dist.verify import verify_store

pytestmark = pytest.mark.timeout(300)
DRIVER = str(Path(__file__).with_name("host_driver.py"))
SETTINGS = InferConfig(num_actors=0, dtype="fp32")
WANTS = Wants(scores={1: {"sqeuclidean"}}, embeddings=frozenset({2}))


def test_a_raylet_that_is_killed_with_its_actor_at_work_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    graph, (model, _) = world.cut(4), world.model("sage")
    expected = infer_nodes(model, graph, world.storage("alone"), WANTS, SETTINGS, fingerprint="f" * 64)
    with two_hosts(tmp_path) as hosts:
        for host in (0, 1):
            hosts.start_ray(host, num_cpus=1)
        command = (
            DRIVER,
            str(tmp_path),
            "graph-metis-4-1",
            "model-sage",
            "before",
            "host",
            r"/layer-1/part-.*safetensors",
        )
        done = subprocess.run(
            hosts.command(0, sys.executable, *command),
            env=hosts.env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists(), "nobody was struck"
    assert "was lost" in done.stderr
    found = Manifest.load(world.storage("k"), "knowledge")
    assert found == expected
    assert verify_store(world.storage("k"), found) == []
