"""What one task computes, from tensors to tensors: no storage, no Ray.

Layer l of a part needs the activations of its owned nodes and of their first halo hop, nothing
else: every in-edge of an owned node is in the part, and degrees are those of the whole graph. Rows
of halo nodes are computed by the parts that own them.

Shapes: ``o`` owned nodes; ``n`` owned and first-hop halo nodes; ``m`` in-edges of owned nodes;
``d_l`` width of layer l; ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gkd_dist.errors import ModelError, TeacherError
from gkd_dist.graph import LocalGraph
from gkd_dist.losses.scores import Metric, pattern_scores
from gkd_dist.models.build import run_model
from gkd_dist.partition.store import features, local_graph

FEATURES = ("x", "x_halo")
STRUCTURE = (
    "n_id",
    "in_degree",
    "has_self_loop",
    "indptr",
    "indices",
    "t_indptr",
    "t_perm",
    "edge_weight",
    "edge_attr",
    "halo_owner",
)
SENDS = ("send_part", "send_ptr", "send_rows")


def copy_name(part: int) -> str:
    """Name of the tensor that holds the rows of a layer which ``part`` has in its halo."""
    return f"to-{part:05d}"


def one_hop_graph(part: Mapping[str, Tensor], counts: Mapping[str, int]) -> LocalGraph:
    """In-edges of the owned nodes among owned and first-hop halo nodes: n nodes, m edges."""
    num_owned = counts["num_owned"]
    return local_graph(dict(part), num_owned + counts["num_halo_1"], num_owned)


def first_input(part: Mapping[str, Tensor], counts: Mapping[str, int], num_features: int) -> Tensor:
    """Features of owned and first-hop halo nodes, float32 [n, f]."""
    halo = features(dict(part), "x_halo", num_features)[: counts["num_halo_1"]]
    return torch.cat([features(dict(part), "x", num_features), halo])


def halo_sources(part: Mapping[str, Tensor], counts: Mapping[str, int]) -> list[int]:
    """Parts that own the first halo hop, in the order of its rows."""
    owners = part["halo_owner"][: counts["num_halo_1"]]
    return [int(owner) for owner in torch.unique_consecutive(owners)]


def compute_layer(model: Any, layer: int, below: Tensor, graph: LocalGraph, num_owned: int) -> Tensor:
    """``z_layer`` of the owned nodes, float32 [o, d_l].

    ``below`` [n, d_(l-1)] is the output of the layer below (features for layer 1), before
    activation.
    """
    with torch.inference_mode():
        z = model.forward_layer(layer, model.activate(layer - 1, below), graph)
    if z.dim() != 2 or z.size(0) != graph.num_nodes:
        raise ModelError(
            f"forward_layer({layer}) of {type(model).__name__} gave shape {list(z.shape)} for {graph.num_nodes} nodes; "
            "it must give one row per node"
        )
    return z[:num_owned].float()


def compute_khop(model: nn.Module, part: Mapping[str, Tensor], num_features: int, device: str) -> Tensor:
    """Logits of the owned nodes [o, c] by running ``model`` on the part with its whole halo."""
    x = torch.cat([features(dict(part), name, num_features) for name in FEATURES]).to(device)
    with torch.inference_mode():
        logits, _ = run_model(model, x, local_graph(dict(part)).to(device))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(0) != x.size(0):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(model).__name__} gave {found} for {x.size(0)} nodes; "
            "its forward must return logits with one row per node"
        )
    return logits[: part["n_id"].numel() - part["halo_owner"].numel()].float()


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
    with torch.inference_mode():
        return {metric: pattern_scores(z, graph.pattern, cast(Metric, metric)).float() for metric in metrics}


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises `ModelError` where a result is NaN or infinite, before it can be stored."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} of {where} has NaN or infinite values; "
                "check the weights of the model and the features of the graph"
            )


def out_of_memory(task: object, num_nodes: int, num_edges: int, cause: Exception) -> TeacherError:
    """The error for a part that does not fit the device."""
    return TeacherError(
        f"{task} ({num_nodes:,} nodes, {num_edges:,} edges) does not fit the memory of the device "
        f"({str(cause).splitlines()[0]}); raise partition.num_parts"
    )
