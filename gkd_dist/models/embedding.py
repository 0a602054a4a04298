"""A learned vector for each node of one graph, beside its features or in their place.

Shapes: ``N`` nodes of the whole graph, ``n`` of a local one; ``f`` features, ``d`` width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph


class NodeEmbedding(nn.Module):
    """A table [N, d]; row k belongs to the node whose global number is k."""

    def __init__(self, num_nodes: int, width: int, replace: bool) -> None:
        super().__init__()
        self.num_nodes, self.replace = num_nodes, replace
        self.table = nn.Embedding(num_nodes, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)  # rows of length 1, whatever the width

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, f] to [n, f + d], or to [n, d]; `ModelError` on a graph of another size."""
        if graph.n_id is None and graph.num_nodes != self.num_nodes:
            raise ModelError(wrong_graph(self.num_nodes, graph.num_nodes))
        vectors: Tensor = self.table(graph.global_ids())
        return vectors if self.replace else torch.cat([x, vectors.to(x.dtype)], 1)


def build_embedding(config: ModelConfig) -> NodeEmbedding | None:
    """The table that ``config`` asks for, or None; `ConfigError` where it was not told how many nodes there are."""
    if config.node_embedding is None:
        return None
    if config.num_nodes is None:
        raise ConfigError(
            "a model with node_embedding has a vector for each node and needs to know how many there are; set num_nodes"
        )
    return NodeEmbedding(config.num_nodes, config.node_embedding, config.node_embedding_mode == "replace")


def sized_for(config: ModelConfig, num_nodes: int) -> ModelConfig:
    """``config``, which has node_embedding, for ``num_nodes``; `ConfigError` where it says another number."""
    if config.num_nodes == num_nodes:
        return config
    if config.num_nodes is not None:
        raise ConfigError(
            f"model num_nodes is {config.num_nodes:,}, but the graph has {num_nodes:,} nodes; leave num_nodes out, "
            "it is taken from the graph"
        )
    return config.model_copy(update={"num_nodes": num_nodes})


def check_same_graph(config: ModelConfig, num_nodes: int) -> None:
    """`ModelError` for a model with vectors for the nodes of a graph of another size."""
    if config.node_embedding is not None and config.num_nodes != num_nodes:
        raise ModelError(wrong_graph(int(config.num_nodes or 0), num_nodes))


def wrong_graph(expected: int, found: int) -> str:
    """The sentence that refuses a graph with ``found`` nodes."""
    return (
        f"the model has a learned vector for each of the {expected:,} nodes of the graph that it was trained on, this "
        f"graph has {found:,}; use that graph, or train a model without node_embedding"
    )
