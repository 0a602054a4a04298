"""Predictions of a model for every node of a graph, as files for other programs.

::

    <out>/part-00000-<sha8>.parquet (or .safetensors)   n_id, predicted, logits, embeddings
    <out>/manifest.json                                 written last: kind "predictions"

Columns: ``n_id`` int64; ``predicted`` class (int64), or for multi-label tasks one bool per label;
``logits`` c floats; ``embeddings`` (only if asked for) d floats, the output of the last hidden layer.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Collection
from typing import Any, Literal

from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import InferConfig, StorageConfig
from gkd_dist.errors import ConfigError
from gkd_dist.infer.knowledge import embedding_name
from gkd_dist.infer.packing import LOGITS
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import Executor, infer_nodes
from gkd_dist.metrics import predicted_labels
from gkd_dist.models.io import read_model_document
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest, ObjectEntry
from gkd_dist.shards.quantise import unpack_float
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

KIND = "predictions"
FORMAT_VERSION = 1
Format = Literal["parquet", "safetensors"]


def predict(
    model_url: str,
    graph: GraphStore,
    out: Storage,
    format: Format = "parquet",
    embeddings: bool = False,
    *,
    settings: InferConfig | None = None,
    pool: Executor | None = None,
    allow_code: Collection[str] = (),
    storage: StorageConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Writes one file per part of ``graph`` into ``out`` and returns the manifest.

    ``pool`` are Ray actors, None: this process. The same model and graph again return at once; an
    interrupted call goes on. Raises `ModelError` where the model does not fit the graph, and
    `ConfigError` for an unknown ``format``.
    """
    if format not in ("parquet", "safetensors"):
        raise ConfigError(f"predictions are written as parquet or safetensors (got {format!r}); choose one")
    model = Storage.open(model_url, storage)
    document = read_model_document(model)
    fingerprint = _fingerprint(graph, document, format, embeddings)
    if out.exists(layout.MANIFEST) and (published := Manifest.load(out, KIND)).fingerprint == fingerprint:
        return published
    layer = max(1, int(document["config"]["layers"]) - 1)
    work = out.child(f"work-{fingerprint[:8]}")
    exact = (settings or InferConfig(num_actors=0)).exact()
    wants = Wants(embeddings={layer} if embeddings else ())
    options = {"pool": pool, "allow_code": allow_code, "progress": progress}
    knowledge = infer_nodes(model, graph, work, wants, exact, fingerprint=fingerprint, **options)  # type: ignore[arg-type]
    write = _write_parquet if format == "parquet" else write_shard
    entries = []
    for part, entry in enumerate(knowledge.parts):
        table = _table(
            graph, part, _floats(work, entry), document["task"], embedding_name(layer) if embeddings else None
        )
        entries.append(write(out, layout.part(part), table, {"num_owned": table["n_id"].numel()}))
    meta = {**_meta(graph, document), "format": format, "embeddings": layer if embeddings else None}
    manifest = Manifest(KIND, fingerprint, dict(knowledge.inputs), meta, tuple(entries))
    manifest.save(out)
    out.delete_tree(f"work-{fingerprint[:8]}")
    return manifest


def _fingerprint(graph: GraphStore, document: dict[str, Any], format: str, embeddings: bool) -> str:
    weights = document.get("weights", {}).get("sha256")
    made_of = [FORMAT_VERSION, graph.manifest.fingerprint, weights, format, embeddings]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _meta(graph: GraphStore, document: dict[str, Any]) -> dict[str, Any]:
    meta = graph.manifest.meta
    return {"task": document["task"], "num_nodes": meta["num_nodes"], "num_classes": document["out_channels"]}


def _floats(work: Storage, entry: ObjectEntry) -> dict[str, Tensor]:
    return {name: unpack_float(tensor, entry.meta["floats"][name]) for name, tensor in read_shard(work, entry).items()}


def _table(
    graph: GraphStore, part: int, floats: dict[str, Tensor], task: str, embeddings: str | None
) -> dict[str, Tensor]:
    """Columns of one part, a row per owned node."""
    logits = floats[LOGITS]
    num_owned = logits.size(0)
    columns = {
        "n_id": graph.part(part, ["n_id"])["n_id"][:num_owned],
        "predicted": predicted_labels(logits, task),
        "logits": logits,
    }
    if embeddings is not None:
        columns["embeddings"] = floats[embeddings][:num_owned]
    return columns


def _write_parquet(storage: Storage, stem: str, columns: dict[str, Tensor], counts: dict[str, int]) -> ObjectEntry:
    """Like `write_shard`, as a Parquet file; matrices become lists of fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, tensor in columns.items():
        flat = pa.array(tensor.reshape(-1).numpy())
        arrays[name] = flat if tensor.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, tensor.size(1))
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd")
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    key = f"{stem}-{digest[:8]}.parquet"
    storage.write(key, data)
    return ObjectEntry(key, len(data), zlib.crc32(data), digest, (), counts)
