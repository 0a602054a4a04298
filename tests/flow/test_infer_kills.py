"""Actors of an inference run killed at any moment of a write, on files and on S3: not a byte is different.

Kills are placed by the store (`strikes`), never by a clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from infer_worlds import World, make_graph
from strikes import Strike, StruckStorage, striking_proxy

from gkd_dist import layout
from gkd_dist.config import InferConfig, RayConfig, StorageConfig
from gkd_dist.infer.actor import ActorPool
from gkd_dist.infer.cluster import start_ray
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.verify import orphans, prune, verify_store

pytestmark = pytest.mark.timeout(300)
SETTINGS = InferConfig(num_actors=2, cpus_per_actor=0.5, dtype="fp32", max_restarts=50)
WANTS = Wants(scores={1: {"sqeuclidean"}}, embeddings=frozenset({2}))
FINGERPRINT = "f" * 64
TMP = layout.layer_outputs(FINGERPRINT)


@pytest.fixture(scope="module")
def pool() -> Iterator[ActorPool]:
    """Two actors on a Ray of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        with start_ray(RayConfig(num_cpus=2), needed_cpus=1, needed_gpus=0), ActorPool(SETTINGS) as pool:
            yield pool


@dataclass(frozen=True)
class Case:
    """What runs, and what it gives when nobody disturbs it."""

    world: World
    graph: GraphStore
    model: Storage
    calm: Storage
    manifest: Manifest

    def infer(self, out: Storage, pool: ActorPool | None = None) -> Manifest:
        """The run."""
        return infer_nodes(self.model, self.graph, out, WANTS, SETTINGS, fingerprint=FINGERPRINT, pool=pool)

    def check(self, out: Storage, found: Manifest) -> None:
        """The same manifest, byte for byte, and every object as it says."""
        assert found == self.manifest
        assert out.read(layout.MANIFEST) == self.calm.read(layout.MANIFEST)
        assert verify_store(out, found) == []


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    world = World(tmp_path_factory.mktemp("world"), make_graph())
    graph, (model, _), calm = world.cut(3), world.model("gat", heads=1), world.storage("calm")
    manifest = infer_nodes(model, graph, calm, WANTS, SETTINGS, fingerprint=FINGERPRINT)
    return Case(world, graph, model, calm, manifest)


def replaced(before: list[int], after: list[int]) -> set[int]:
    """Actors that are no more; each has one successor."""
    assert len(before) == len(after) == SETTINGS.num_actors
    return set(before) - set(after)


@pytest.mark.parametrize(
    ("moment", "key"),
    [
        ("before", "layer-1/part-00001"),
        ("half", "layer-2/part-00000"),
        ("half", "k/part-00001"),
        ("after", "k/part-00000"),
    ],
)
def test_an_actor_killed_at_a_write_to_files_changes_nothing(
    case: Case, pool: ActorPool, tmp_path: Path, moment: str, key: str
) -> None:
    strike = Strike(moment, rf"/{key}-[0-9a-f]+\.safetensors$", tmp_path / "marker", journal=tmp_path / "journal")
    out, before = Storage.open(str(tmp_path / "k")), pool.pids()
    found = case.infer(StruckStorage.around(out, strike), pool)
    assert replaced(before, pool.pids()) == {strike.pid}
    case.check(out, found)
    writes = [line for line in (tmp_path / "journal").read_text().splitlines() if f"/{key}-" in line]
    assert len(writes) == 2  # what the dead actor had stored was not trusted: nobody had committed it
    assert len(set(writes)) == 1
    halves = list(tmp_path.glob("k/**/.*.gkd-tmp"))
    assert halves or moment != "half"  # one, or more where the other task of the actor was writing, too
    assert orphans(out, found) == []  # it might belong to a writer that is still at work
    for half in halves:
        os.utime(half, (time.time() - 7200,) * 2)
        assert orphans(out, found) == prune(out, found) == [half.relative_to(tmp_path / "k").as_posix()]
        assert not half.exists()


@pytest.fixture
def on_s3(case: Case, s3_server: str, tmp_path: Path) -> Callable[[str], Storage]:
    pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")

    def make(endpoint: str) -> Storage:
        return Storage.open("s3://bucket/k", StorageConfig(options={"s3": {"endpoint_url": endpoint}}))

    return make


@pytest.mark.parametrize(
    ("moment", "key"),
    [
        ("before", "k/part-00002"),
        ("half", "layer-2/part-00001"),
        ("after", "layer-1/part-00000"),
    ],
)
def test_an_actor_killed_at_a_write_to_s3_changes_nothing(
    case: Case, pool: ActorPool, on_s3: Callable[[str], Storage], s3_server: str, moment: str, key: str
) -> None:
    before = pool.pids()
    with striking_proxy(s3_server, moment, rf"/{key}-[0-9a-f]+\.safetensors$") as proxy:
        found = case.infer(on_s3(proxy.endpoint), pool)
    assert replaced(before, pool.pids()) == {proxy.victim}
    out = on_s3(s3_server)
    case.check(out, found)
    assert len([path for path in proxy.puts if f"/{key}-" in path]) == 2
    assert orphans(out, found) == []
