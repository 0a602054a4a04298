"""Inference in a store of any kind, compared with an undisturbed run in local folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_worlds import World, make_graph

from gkd_dist.config import InferConfig
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.verify import orphans, verify_store

SETTINGS = InferConfig(num_actors=0, dtype="fp16")
WANTS = Wants(scores={1: {"sqeuclidean"}}, embeddings=frozenset({1}))
FINGERPRINT = "f" * 64


@dataclass(frozen=True)
class Undisturbed:
    """A run in local folders, to which the others are compared."""

    graph: Storage
    model: Storage
    manifest: Manifest

    @classmethod
    def make(cls, folder: Path) -> Undisturbed:
        """The run."""
        world = World(folder, make_graph())
        graph, (model, _) = world.cut(3), world.model("gcn")
        manifest = infer_nodes(model, graph, world.storage("out"), WANTS, SETTINGS, fingerprint=FINGERPRINT)
        return cls(graph.storage, model, manifest)


@dataclass(frozen=True)
class Run:
    """Copies of the graph and the model in a store, and where the knowledge goes."""

    root: Storage

    @classmethod
    def copy(cls, undisturbed: Undisturbed, root: Storage) -> Run:
        """The stores of ``undisturbed`` below ``root``."""
        for name, storage in (("graph", undisturbed.graph), ("teacher", undisturbed.model)):
            for key in storage.list():
                root.write(f"{name}/{key}", storage.read(key))
        return cls(root)

    @property
    def out(self) -> Storage:
        """The knowledge store."""
        return self.root.child("knowledge")

    def infer(self, settings: InferConfig = SETTINGS, **options: Any) -> Manifest:
        """The inference."""
        graph = GraphStore.open(self.root.child("graph"))
        return infer_nodes(
            self.root.child("teacher"), graph, self.out, WANTS, settings, fingerprint=FINGERPRINT, **options
        )

    def check(self, undisturbed: Undisturbed, found: Manifest) -> None:
        """Equal to the undisturbed run to the last byte, and nothing else is there."""
        assert found == undisturbed.manifest
        assert Manifest.load(self.out, found.kind) == found
        assert verify_store(self.out, found) == []
        assert orphans(self.out, found) == []
        assert self.out.list() == sorted(["manifest.json", *(entry.key for entry in found.parts)])
