"""Reads a graph store: parts as tensors, features as dense matrices, edges as a `LocalGraph`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.errors import GraphError
from gkd_dist.graph import LocalGraph
from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_rows, read_shard
from gkd_dist.sparse import CsrPattern, indptr_from_counts, row_index
from gkd_dist.storage import Storage

KIND = "graph"


@dataclass(frozen=True)
class GraphStore:
    """A finished graph store; small and picklable, it reads parts on demand."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def open(cls, storage: Storage, fingerprint: str | None = None) -> GraphStore:
        """Reads the manifest; ``fingerprint`` is the one it must have, if given."""
        return cls(storage, Manifest.load(storage, KIND, fingerprint))

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return len(self.manifest.parts)

    @property
    def num_features(self) -> int:
        """Features per node in ``x``."""
        return int(self.manifest.meta["num_features"])

    def num_features_of(self, features: str | None) -> int:
        """Width of the named features, of ``x`` for None; `GraphError` where the store has no such features."""
        if features is None:
            return self.num_features
        stored: dict[str, int] = self.manifest.meta.get("features", {})
        if features not in stored:
            close = difflib.get_close_matches(features, stored, n=1)
            raise GraphError(
                f"the graph store at {self.storage.url} has no features {features!r} (it has "
                f"{', '.join(sorted(stored)) or 'x alone'}){f', did you mean {close[0]!r}?' if close else ''}; "
                "name them in graph.features and run `gkd partition`"
            )
        return int(stored[features])

    @property
    def num_edge_features(self) -> int:
        """Attributes per edge, 0 without."""
        return int(self.manifest.meta.get("num_edge_features", 0))

    def part(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors of a part, all or only ``names`` (features in whichever form is stored)."""
        entry = self.manifest.parts[index]
        if names is None:
            return read_shard(self.storage, entry)
        stored = [tensor.name for tensor in entry.tensors]
        wanted = [s for s in stored if s in names or s.rpartition(".")[0] in names]
        return read_shard(self.storage, entry, wanted)

    def part_with(
        self, index: int, features: str | None, without: Sequence[str] = (), pool: BufferPool | None = None
    ) -> dict[str, Tensor]:
        """All tensors of a part but ``without`` and the features that are not asked for, in memory from ``pool``."""
        read, skipped = feature_tensors(features), set(without)
        for name in (None, *self.manifest.meta.get("features", {})):
            skipped |= set(feature_tensors(name)) - set(read)
        stored = [tensor.name for tensor in self.manifest.parts[index].tensors]
        kept = [s for s in stored if not skipped & {s, s.rpartition(".")[0]}]
        return read_shard(self.storage, self.manifest.parts[index], kept if kept != stored else None, pool)

    def has_dense(self, index: int, named: str | None = None) -> bool:
        """Whether `inputs` of a part are read in place: stored dense, as float32."""
        stored = [self.manifest.parts[index].tensor(name) for name in feature_tensors(named)]
        return all(tensor is not None and tensor.dtype == "float32" for tensor in stored)

    def inputs(self, index: int, named: str | None = None) -> Tensor:
        """Features of a part's nodes with its whole halo, float32 [n, f]; ``named`` as in `num_features_of`.

        Read in place where they are stored dense, without a copy.
        """
        entry, names, width = self.manifest.parts[index], feature_tensors(named), self.num_features_of(named)
        if self.has_dense(index, named):
            out = torch.empty(entry.counts["num_owned"] + entry.counts["num_halo"], width)
            read_rows(self.storage, entry, names, out)
            return out
        tensors = self.part(index, names)
        return torch.cat([features(tensors, name, width) for name in names])


def feature_tensors(features: str | None) -> tuple[str, str]:
    """Names of the tensors with the features of owned and of halo nodes; None: ``x``."""
    return ("x", "x_halo") if features is None else (f"features.{features}", f"features_halo.{features}")


def sparse_features(name: str, x: Tensor) -> dict[str, Tensor]:
    """``x`` [n, f] as CSR tensors ``<name>.indptr``, ``.indices`` and ``.values``."""
    rows, columns = torch.nonzero(x, as_tuple=True)
    counts = torch.bincount(rows, minlength=x.size(0))
    return {
        f"{name}.indptr": indptr_from_counts(counts),
        f"{name}.indices": columns.to(torch.int32),
        f"{name}.values": x[rows, columns],
    }


def features(tensors: dict[str, Tensor], name: str, num_features: int) -> Tensor:
    """One of `feature_tensors` of a part as a dense float32 matrix, however it is stored."""
    if name in tensors:
        return tensors[name].float()
    indptr, columns = tensors[f"{name}.indptr"], tensors[f"{name}.indices"].long()
    dense = torch.zeros(indptr.numel() - 1, num_features)
    dense[row_index(indptr), columns] = tensors[f"{name}.values"].float()
    return dense


def local_graph(
    tensors: dict[str, Tensor],
    num_nodes: int | None = None,
    num_rows: int | None = None,
    *,
    forward_only: bool = False,
) -> LocalGraph:
    """Edges of a part: of its first ``num_rows`` rows among its first ``num_nodes`` nodes.

    Defaults to the whole part. Rows from ``num_rows`` on have no edges. The stored transpose is
    used for the whole part and rebuilt for a prefix; ``forward_only`` does without, for inference.
    """
    stored_nodes, stored_rows = tensors["n_id"].numel(), tensors["indptr"].numel() - 1
    num_nodes = stored_nodes if num_nodes is None else num_nodes
    num_rows = min(stored_rows, num_nodes) if num_rows is None else num_rows
    num_edges = int(tensors["indptr"][num_rows])
    indptr = torch.full((num_nodes + 1,), num_edges, dtype=torch.int64)
    indptr[: num_rows + 1] = tensors["indptr"][: num_rows + 1]
    indices = tensors["indices"][:num_edges].long()
    if forward_only:
        pattern = CsrPattern.forward_only(indptr, indices)
    elif num_nodes == stored_nodes and num_rows == stored_rows:
        perm = tensors["t_perm"].long()
        pattern = CsrPattern(indptr, indices, tensors["t_indptr"], row_index(indptr)[perm], perm)
    else:
        pattern = CsrPattern.from_csr(indptr, indices)
    weight, attr = tensors.get("edge_weight"), tensors.get("edge_attr")
    return LocalGraph(
        pattern,
        tensors["in_degree"][:num_nodes],
        tensors["has_self_loop"][:num_nodes],
        None if weight is None else weight[:num_edges],
        edge_attr=None if attr is None else attr[:num_edges],
        n_id=tensors["n_id"][:num_nodes],
    )
