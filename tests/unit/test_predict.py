"""Predictions as files: every node once, equal to a forward over the whole graph."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from infer_worlds import World, assert_close, make_graph
from torch import Tensor

from gkd_dist import layout
from gkd_dist.errors import ConfigError, ManifestError
from gkd_dist.predict import KIND, Format, predict
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage


def read(out: Storage, manifest: Manifest) -> dict[str, Tensor]:
    """Columns of all parts, rows by ``n_id``."""
    parts = []
    for entry in manifest.parts:
        if entry.key.endswith(".safetensors"):
            parts.append(read_shard(out, entry))
            continue
        table = pq.read_table(io.BytesIO(out.read(entry.key)))
        assert pa.types.is_fixed_size_list(table.schema.field("logits").type)
        parts.append({name: torch.tensor(table[name].to_pylist()) for name in table.column_names})
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.argsort(columns["n_id"])
    return {name: column[order] for name, column in columns.items()}


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_every_node_gets_what_the_model_says(tmp_path: Path, format: Format) -> None:
    world = World(tmp_path, make_graph())
    (storage, model), graph, out = world.model("gcn"), world.cut(3), world.storage("out")
    manifest = predict(storage.url, graph, out, format, embeddings=True)
    columns = read(out, manifest)
    with torch.no_grad():
        logits, layers = model(world.graph.x, world.graph.edge_index, layers=(2,))
    assert columns["n_id"].tolist() == list(range(world.graph.num_nodes))
    assert_close(columns["logits"], logits)
    assert torch.equal(columns["predicted"], columns["logits"].argmax(1))
    assert_close(columns["embeddings"], layers[2])
    assert out.list() == sorted([layout.MANIFEST, *(entry.key for entry in manifest.parts)])
    assert Manifest.load(out, KIND) == manifest
    assert sum(entry.counts["num_owned"] for entry in manifest.parts) == world.graph.num_nodes


def test_the_same_again_returns_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    (storage, _), graph, out = world.model("gcn"), world.cut(2), world.storage("out")
    first = predict(storage.url, graph, out)
    calls: list[tuple[int, int]] = []
    assert predict(storage.url, graph, out, progress=lambda done, total: calls.append((done, total))) == first
    assert calls == []


def test_nothing_is_published_before_everything_is_there(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    (storage, _), graph, out = world.model("gcn"), world.cut(2), world.storage("out")

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(storage.url, graph, out, progress=stop)
    with pytest.raises(ManifestError):
        Manifest.load(out, KIND)
    assert len(predict(storage.url, graph, out).parts) == 2


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    with pytest.raises(ConfigError, match="parquet or safetensors"):
        predict(world.model("gcn")[0].url, world.cut(2), world.storage("out"), "csv")  # type: ignore[arg-type]
