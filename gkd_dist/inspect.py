"""``gkd inspect``: what is in a store, from its manifest and from its parts, one at a time."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_dist import layout
from gkd_dist.config import Config
from gkd_dist.config_file import load_config
from gkd_dist.driver import config_of
from gkd_dist.errors import ConfigError, GkdError, ManifestError
from gkd_dist.inspect_measures import measure, structure_terms
from gkd_dist.inspect_tables import write_tables
from gkd_dist.partition.store import GraphStore
from gkd_dist.session import Session
from gkd_dist.shards.manifest import Manifest, stored_kind
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore
from gkd_dist.telemetry import Progress
from gkd_dist.verify_run import stores_of

log = logging.getLogger(__name__)
_GRAPH_FACTS = ("num_nodes", "num_edges", "num_features", "num_classes", "task", "method", "halo_hops", "undirected",
                "edge_cut", "cut_fraction", "halo_factor", "balance")  # fmt: skip
_KNOWLEDGE_FACTS = ("mode", "num_layers", "num_classes", "task", "dtype", "scores_dtype", "logits", "embeddings")


@dataclass(frozen=True)
class Target:
    """Stores to look at, and what is known around them: the run's configuration, the graph."""

    stores: list[tuple[str, Storage]]
    config: Config | None = None
    graph: Storage | None = None

    @property
    def knowledge(self) -> list[Storage]:
        """The knowledge stores among them."""
        return [storage for kind, storage in self.stores if kind == "knowledge"]


def open_target(target: str, overrides: Sequence[str] = (), graph: str | None = None) -> Target:
    """A configuration file, a run or a single store; ``graph`` is the URL of a single store's graph.

    Raises ConfigError for a URL that is none of them.
    """
    if target.endswith((".yaml", ".yml")) and Path(target).is_file():
        return _of_run(load_config(target, overrides))
    storage = Storage.open(target)
    if storage.exists(layout.MANIFEST):
        kind = stored_kind(storage)
        return Target([(kind, storage)], None, storage if kind == "graph" else _graph_of(storage, graph))
    if storage.exists(layout.CONFIG):
        return _of_run(config_of(target, overrides))
    raise ConfigError(
        f"{target} is no configuration file, no run ({layout.CONFIG} is missing) and no store "
        f"({layout.MANIFEST} is missing); correct the path"
    )


def _of_run(config: Config) -> Target:
    session = Session.open(config, Progress())
    # predictions of students are no teacher's knowledge
    stores = [(kind, storage) for kind, storage in stores_of(session) if not storage.url.endswith("/predictions")]
    if not stores:
        raise ManifestError(f"nothing is stored at {session.run.url} yet; run `gkd run` first, or correct the path")
    return Target(stores, config, session.graph if session.graph.exists(layout.MANIFEST) else None)


def _graph_of(knowledge: Storage, given: str | None) -> Storage | None:
    """The graph store of a knowledge store: as given, or where a run has it."""
    if given is not None:
        return Storage.open(given)
    root = knowledge.url.rsplit("/", 2)[0]
    if not knowledge.url.removeprefix(root).startswith(f"/{layout.KNOWLEDGE}/"):
        return None
    beside = Storage.open(root).child(layout.GRAPH)
    return beside if beside.exists(layout.MANIFEST) else None


def inspect_stores(
    target: Target, *, part: int | None = None, sample: int | None = None, list_parts: bool = False
) -> list[dict[str, Any]]:
    """A report per store, as plain values. ``part`` or a ``sample`` of parts are read instead of all."""
    graph = None if target.graph is None else GraphStore.open(target.graph)
    reports = []
    for kind, storage in target.stores:
        manifest = graph.manifest if graph and kind == "graph" else Manifest.load(storage, kind)
        chosen = choose_parts(len(manifest.parts), part, sample, storage.url)
        with _understood(storage):
            report = _from_manifest(manifest, storage, chosen if part is not None or list_parts else [])
            if kind == "knowledge":
                _add_structure(report, target.config, graph, KnowledgeStore(storage, manifest), chosen)
            reports.append(report)
    return reports


@contextmanager
def _understood(storage: Storage) -> Iterator[None]:
    """ManifestError for a manifest whose digest fits and whose remarks make no sense."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, GkdError):
            raise
        raise ManifestError(
            f"{storage.describe(layout.MANIFEST)} describes its parts in a way that cannot be understood "
            f"({type(error).__name__}: {error}); run the stage that writes the store again"
        ) from error


def choose_parts(num_parts: int, part: int | None, sample: int | None, where: str) -> list[int]:
    """Numbers of the parts to read, ascending; ConfigError for one that does not exist."""
    if part is not None:
        if not 0 <= part < num_parts:
            raise ConfigError(f"{where} has no part {part}, its parts are 0 to {num_parts - 1}; correct --part")
        return [part]
    if sample is None or sample >= num_parts:
        return list(range(num_parts))
    if sample < 1:
        raise ConfigError(f"--sample must be at least 1 (got {sample}); correct it")
    return sorted(random.Random(0).sample(range(num_parts), sample))


def _from_manifest(manifest: Manifest, storage: Storage, listed: Sequence[int]) -> dict[str, Any]:
    """What the manifest alone tells."""
    sizes = [entry.num_bytes for entry in manifest.parts]
    facts = _GRAPH_FACTS if manifest.kind == "graph" else _KNOWLEDGE_FACTS
    return {
        "url": storage.url,
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "format_version": manifest.format_version,
        "inputs": manifest.inputs,
        "num_parts": len(sizes),
        "num_bytes": sum(sizes),
        "part_bytes": {
            "min": min(sizes, default=0),
            "median": statistics.median(sizes) if sizes else 0,
            "max": max(sizes, default=0),
        },
        "facts": {name: manifest.meta[name] for name in facts if name in manifest.meta},
        "tensors": _tensors(manifest),
        "scores": manifest.meta.get("scores", {}),
        "bounds": manifest.meta.get("bounds", []),
        "structure": [],
        "parts_read": 0,
        "notes": [],
        "parts": [_part(manifest, number) for number in listed],
    }


def _tensors(manifest: Manifest) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in manifest.parts:
        for tensor in entry.tensors:
            row = found.setdefault(
                tensor.name, {"name": tensor.name, "dtypes": [], "num_elements": 0, "num_bytes": 0, "bound": None}
            )
            if tensor.dtype not in row["dtypes"]:
                row["dtypes"].append(tensor.dtype)
            count = 1
            for size in tensor.shape:
                count *= size
            row["num_elements"] += count
            row["num_bytes"] += tensor.stop - tensor.start
            bound = entry.meta.get("floats", {}).get(tensor.name, {}).get("bound")
            if bound is not None:
                row["bound"] = bound if row["bound"] is None else max(row["bound"], bound)
    return list(found.values())


def _part(manifest: Manifest, number: int) -> dict[str, Any]:
    entry = manifest.parts[number]
    return {
        "part": number,
        "key": entry.key,
        "num_bytes": entry.num_bytes,
        "sha256": entry.sha256,
        "counts": entry.counts,
        "floats": entry.meta.get("floats", {}),
    }


def _add_structure(
    report: dict[str, Any], config: Config | None, graph: GraphStore | None, knowledge: KnowledgeStore, parts: list[int]
) -> None:
    if "num_layers" not in knowledge.manifest.meta:
        return  # predictions: no teacher's structure in them
    readers = structure_terms(knowledge.manifest, config)
    if not readers:
        report["notes"].append("neither scores nor embeddings are stored: no entropy and no lost mass")
    elif graph is None:
        report["notes"].append("the graph store is not known: give --graph URL for entropy and lost teacher mass")
    elif graph.manifest.fingerprint != knowledge.manifest.inputs.get("graph"):
        report["notes"].append(
            f"the graph store at {graph.storage.url} is of another cut: run `gkd infer` again, or give --graph URL"
        )
    else:
        with Progress().task("inspect", total=len(parts)) as task:
            found = measure(graph, knowledge, readers, parts, task.advance)
        report["structure"] = [structure.to_json() for structure in found]
        report["parts_read"] = len(parts)


def to_parquet(target: Target, url: str, *, part: int | None = None, sample: int | None = None) -> dict[str, Any]:
    """Writes nodes and edges, with what the teacher knows of them where there is one store of it.

    Raises ConfigError where the graph is not known, or which of several knowledge stores is meant.
    """
    if target.graph is None:
        raise ConfigError("tables need the graph store, which is not beside this store; give --graph URL")
    graph = GraphStore.open(target.graph)
    stores = [store for store in (_teacher_knowledge(storage) for storage in target.knowledge) if store is not None]
    mine = [store for store in stores if store.manifest.inputs.get("graph") == graph.manifest.fingerprint]
    if len(mine) > 1:
        raise ConfigError(
            f"there are {len(mine)} knowledge stores ({', '.join(store.storage.url for store in mine)}); "
            "give the URL of one of them instead of the run"
        )
    if stores and not mine:
        stores[0].manifest.require_input("graph", graph.manifest.fingerprint, stores[0].storage.url)
    out = Storage.open(url) if target.config is None else Storage.open(url, target.config.storage)
    out.check_writable()
    parts = choose_parts(graph.num_parts, part, sample, graph.storage.url)
    with Progress().task("to-parquet", total=len(parts)) as task:
        keys = write_tables(graph, mine[0] if mine else None, parts, out, task.advance)
    return {"url": out.url, "files": keys}


def _teacher_knowledge(storage: Storage) -> KnowledgeStore | None:
    manifest = Manifest.load(storage, "knowledge")
    return KnowledgeStore(storage, manifest) if "num_layers" in manifest.meta else None
