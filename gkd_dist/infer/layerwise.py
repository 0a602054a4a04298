"""What one task computes, from tensors to tensors: no storage, no Ray.

Layer l of a part needs the activations of its owned nodes and of their first halo hop, nothing
else: every in-edge of an owned node is in the part, and degrees are those of the whole graph. Rows
of halo nodes are computed by the parts that own them.

Shapes: ``o`` owned nodes; ``n`` owned and first-hop halo nodes; ``m`` in-edges of owned nodes;
``d_l`` width of layer l; ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from gkd_dist.errors import ModelError, TeacherError
from gkd_dist.graph import LocalGraph
from gkd_dist.losses.scores import Metric, pattern_scores
from gkd_dist.models.build import run_model
from gkd_dist.models.layered import Layers, as_layers
from gkd_dist.models.passes import checked_layer
from gkd_dist.partition.store import local_graph
from gkd_dist.sparse import CsrPattern

FORWARD = ("n_id", "in_degree", "has_self_loop", "indptr", "indices", "edge_weight", "edge_attr", "halo_owner")
STRUCTURE = (*FORWARD, "t_indptr", "t_perm")
SENDS = ("send_part", "send_ptr", "send_rows")


def copy_name(part: int) -> str:
    """Name of the tensor that holds the rows of a layer which ``part`` has in its halo."""
    return f"to-{part:05d}"


def one_hop_graph(part: Mapping[str, Tensor], counts: Mapping[str, int]) -> LocalGraph:
    """In-edges of the owned nodes among owned and first-hop halo nodes: n nodes, o rows, m edges."""
    num_owned = counts["num_owned"]
    graph = local_graph(dict(part), num_owned + counts["num_halo_1"], num_owned, forward_only=True)
    return with_rows(graph, num_owned)


def with_rows(graph: LocalGraph, num_rows: int) -> LocalGraph:
    """``graph`` with ``num_rows`` rows: rows are cut off with their edges, or added without edges, at the end."""
    indptr = graph.pattern.indptr
    missing = max(0, num_rows + 1 - indptr.numel())
    indptr = torch.cat([indptr[: num_rows + 1], indptr[-1:].expand(missing)])
    num_edges = int(indptr[-1])
    pattern = CsrPattern.forward_only(indptr, graph.pattern.indices[:num_edges])
    cut = lambda values: None if values is None else values[:num_edges]  # noqa: E731
    return replace(graph, pattern=pattern, edge_weight=cut(graph.edge_weight), edge_attr=cut(graph.edge_attr))


def halo_sources(part: Mapping[str, Tensor], counts: Mapping[str, int]) -> list[int]:
    """Parts that own the first halo hop, in the order of its rows."""
    owners = part["halo_owner"][: counts["num_halo_1"]]
    return [int(owner) for owner in torch.unique_consecutive(owners)]


def compute_layer(model: nn.Module, layer: int, below: Tensor, graph: LocalGraph) -> Tensor:
    """``z_layer`` of the nodes that have a row in ``graph``, float32 [o, d_l].

    ``below`` [n, d_(l-1)] is the output of the layer below (features for layer 1), before
    activation. Built-in models compute those rows alone; others are given a row for every node.
    """
    layers = as_layers(model)
    assert layers is not None
    num_rows = graph.num_rows
    if not getattr(layers, "rows_alone", False):
        graph = with_rows(graph, graph.num_nodes)
    with torch.inference_mode():
        z = layers.forward_layer(layer, layers.activate(layer - 1, below), graph)
    return checked_layer(model, layer, z, graph)[:num_rows].float()


def compute_readout(layers: Layers, outputs: dict[int, Tensor]) -> Tensor:
    """Logits [o, c] from the outputs of the layers that ``layers`` reads them out of."""
    with torch.inference_mode():
        return layers.readout(outputs).float()


def khop_graph(part: Mapping[str, Tensor]) -> LocalGraph:
    """All edges of the part, those of halo nodes too."""
    return local_graph(dict(part))


def compute_khop(model: nn.Module, x: Tensor, graph: LocalGraph, num_owned: int) -> Tensor:
    """Logits of the owned nodes [o, c] by running ``model`` on the part with its whole halo."""
    with torch.inference_mode():
        logits, _ = run_model(model, x, graph)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(0) != x.size(0):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(model).__name__} gave {found} for {x.size(0)} nodes; "
            "its forward must return logits with one row per node"
        )
    return logits[:num_owned].float()


def tap_name(tap: str) -> str:
    """Name of the tensor that holds the output of the module at ``tap``."""
    return f"taps.{tap}"


def layer_tensors(z: Tensor, part: Mapping[str, Tensor], with_copies: bool) -> dict[str, Tensor]:
    """What is stored of a layer: ``owned`` [o, d_l] and, per bordering part, the rows it reads.

    The copies are in the reader's halo order, so that one range read brings a halo in place.
    """
    tensors = {"owned": z.contiguous()}
    if with_copies:
        starts, rows = part["send_ptr"].tolist(), part["send_rows"].long()
        for k, reader in enumerate(part["send_part"].tolist()):
            tensors[copy_name(reader)] = z[rows[starts[k] : starts[k + 1]]]
    return tensors


def edge_scores(z: Tensor, graph: LocalGraph, metrics: Iterable[str]) -> dict[str, Tensor]:
    """Raw scores of the m in-edges of owned nodes per metric, float32 [m], in edge order.

    ``z`` [n, d_l] covers owned and first-hop halo nodes.
    """
    pattern = with_rows(graph, graph.num_nodes).pattern  # scores are defined on a square one
    with torch.inference_mode():
        return {metric: pattern_scores(z, pattern, cast(Metric, metric)).float() for metric in metrics}


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises `ModelError` where a result is NaN or infinite, before it can be stored."""
    for name, tensor in tensors.items():
        # a sum is several times cheaper, and finite only where every value is
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} of {where} has NaN or infinite values; "
                "check the weights of the model and the features of the graph"
            )


def out_of_memory(task: object, num_nodes: int, num_edges: int, reason: str) -> TeacherError:
    """The error for a part that does not fit the memory even alone."""
    return TeacherError(
        f"{task} ({num_nodes:,} nodes, {num_edges:,} edges) does not fit the memory of its device ({reason}); "
        "lower infer.tile_edges, or raise partition.num_parts"
    )
