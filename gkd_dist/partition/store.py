"""Reads a graph store: parts as tensors, features as dense matrices, edges as a `LocalGraph`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.graph import LocalGraph
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
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
        """Features per node."""
        return int(self.manifest.meta["num_features"])

    @property
    def num_edge_features(self) -> int:
        """Attributes per edge, 0 without."""
        return int(self.manifest.meta.get("num_edge_features", 0))

    def part(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors of a part, all or only ``names`` (``x`` and ``x_halo`` in whichever form is stored)."""
        entry = self.manifest.parts[index]
        if names is None:
            return read_shard(self.storage, entry)
        stored = [tensor.name for tensor in entry.tensors]
        wanted = [s for s in stored if s in names or s.split(".")[0] in names]
        return read_shard(self.storage, entry, wanted)


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
    """``x`` or ``x_halo`` of a part as a dense float32 matrix, however it is stored."""
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
    )
