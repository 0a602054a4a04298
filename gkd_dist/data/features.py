"""Named node features: matrices beside the graph's own ``x`` that a teacher or a student may read instead.

Each is an ``.npy`` file, or an ``.npz`` archive of one array, at any fsspec URL: [N, f], row i is node i.

Shapes: ``N`` nodes, ``f`` features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gkd_dist.config import StorageConfig
from gkd_dist.data.arrays import load_file, to_tensor
from gkd_dist.errors import GraphError


def read_named_features(
    urls: Mapping[str, str], num_nodes: int, storage: StorageConfig | None = None
) -> dict[str, Tensor]:
    """Float32 [N, f] of every name in ``urls``.

    Raises `DataError` where a file is not there and `GraphError` where it does not fit the graph.
    """
    found = {}
    for name, url in urls.items():
        what = f"graph.features.{name} ({url})"
        found[name] = check_named_features(
            what, to_tensor(load_file(url, f"graph.features.{name}", storage), what), num_nodes
        )
    return found


def check_named_features(what: str, values: Tensor, num_nodes: int) -> Tensor:
    """``values`` [N] or [N, f], real and finite, as contiguous float32 [N, f]; raises `GraphError`."""
    shape = list(values.shape)
    if values.dim() not in (1, 2) or shape[0] != num_nodes or shape[-1] == 0:
        raise GraphError(
            f"{what} has shape {shape}, expected [{num_nodes}, f] with f at least 1; give one row per node of the "
            "graph, in the order of its x"
        )
    values = values.reshape(num_nodes, -1).float().contiguous()
    finite = torch.isfinite(values)
    if not finite.all():
        node = int((~finite).any(1).nonzero()[0])
        raise GraphError(
            f"{what} holds {int((~finite).sum())} NaN or infinite values (first at node {node}); replace or drop them"
        )
    return values
