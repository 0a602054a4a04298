"""A small world for inference: a graph, its store cut in any way, and stored models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gkd_dist.config import ModelConfig, PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.quantise import unpack_float
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage

NUM_FEATURES, NUM_CLASSES = 6, 4


def make_graph(num_nodes: int = 60, num_edges: int = 240, seed: int = 0, weighted: bool = False) -> Graph:
    """Random directed graph with self-loops and with nodes that have no in-edge."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.unique(torch.randint(num_nodes * (num_nodes - 5), (num_edges,), generator=random))
    edge_index = torch.stack([keys % num_nodes, keys // num_nodes])
    split = torch.randint(3, (num_nodes,), generator=random)
    return Graph(
        x=torch.randn(num_nodes, NUM_FEATURES, generator=random),
        edge_index=edge_index,
        y=torch.randint(-1, NUM_CLASSES, (num_nodes,), generator=random),
        train_mask=split == 0,
        val_mask=split == 1,
        test_mask=split == 2,
        num_classes=NUM_CLASSES,
        edge_weight=torch.rand(edge_index.size(1), generator=random) if weighted else None,
    )


@dataclass
class World:
    """Stores in one folder; every method writes there and returns what it wrote."""

    root: Path
    graph: Graph

    def storage(self, name: str) -> Storage:
        """The store ``name``."""
        return Storage.open(str(self.root / name))

    def cut(self, num_parts: int = 3, method: str = "metis", halo_hops: int = 1) -> GraphStore:
        """The graph cut into parts."""
        storage = self.storage(f"graph-{method}-{num_parts}-{halo_hops}")
        config = PartitionConfig(method=method, num_parts=num_parts)
        fingerprint = f"{method}-{num_parts}-{halo_hops}".ljust(8, "0")
        build_graph_store(self.graph, storage, config, halo_hops=halo_hops, seed=0, fingerprint=fingerprint)
        return GraphStore.open(storage)

    def model(self, kind: str = "gcn", **options: object) -> tuple[Storage, nn.Module]:
        """A stored model and the module itself, in eval mode."""
        settings = {"hidden": 5, "layers": 3, "norm": "batch", "dropout": 0.5, **options}
        return self.store_model(ModelConfig.model_validate({"kind": kind, **settings}))

    def store_model(self, config: ModelConfig) -> tuple[Storage, nn.Module]:
        """The model of any configuration, stored, and the module itself, in eval mode."""
        kind = config.kind
        torch.manual_seed(1)
        model = build_model(config, NUM_FEATURES, NUM_CLASSES).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
        storage = self.storage(f"model-{kind.replace(':', '-')}")
        spec = ModelSpec(config, NUM_FEATURES, NUM_CLASSES, "multiclass")
        save_model(storage, model, spec, fingerprint=f"model-{kind}")
        return storage, model


class TwoHops(nn.Module):
    """Sums over in-neighbours twice, and knows nothing of layers."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """[n, in_channels] to [n, out_channels]."""
        h = self.lin(x)
        for _ in range(2):
            h = h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])
        return h


PLAIN_KIND = "infer_worlds:TwoHops"


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The bound of exact inference: 1e-4 of the largest value, and equal arg-max above it."""
    bound = 1e-4 * max(1.0, float(expected.abs().max()))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= bound
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > bound
    assert torch.equal(found.argmax(1)[clear], expected.argmax(1)[clear])


def whole(graph: GraphStore, storage: Storage, manifest: Manifest, name: str) -> Tensor:
    """Rows of the knowledge tensor ``name`` of all owned nodes, in the order of global ids."""
    out = torch.empty(0)
    for part, entry in enumerate(manifest.parts):
        values = unpack_float(read_shard(storage, entry, [name])[name], entry.meta["floats"][name])
        num_owned = graph.manifest.parts[part].counts["num_owned"]
        if part == 0:
            out = torch.full((graph.manifest.meta["num_nodes"], values.size(1)), torch.nan)
        out[graph.part(part, ["n_id"])["n_id"][:num_owned]] = values[:num_owned]
    return out
