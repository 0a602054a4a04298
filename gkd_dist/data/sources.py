"""`load_graph`: from the ``graph`` section of a config to a checked `Graph`.

Read (one module per source) -> check -> labels -> masks -> prepare -> check the splits. Only the
reading touches anything outside; the rest are pure functions.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gkd_dist.config import ArraysSource, GraphConfig, PygSource, StorageConfig, SyntheticSource
from gkd_dist.data.labels import Labels, read_labels
from gkd_dist.data.prepare import prepare
from gkd_dist.data.raw import RawGraph
from gkd_dist.data.splits import Masks, draw_masks, given_masks
from gkd_dist.data.synthetic import default_split, generate
from gkd_dist.data.validate import check_arrays, check_graph
from gkd_dist.graph import Graph

_log = logging.getLogger(__name__)


def load_graph(
    config: GraphConfig, seed: int, data_root: Path | None = None, storage: StorageConfig | None = None
) -> Graph:
    """The graph of ``config``, validated, with duplicate edges coalesced; edges untouched otherwise.

    ``seed`` serves splits and generated graphs that name none of their own. ``data_root`` is where
    PyG data sets lie (default: `default_data_root`), ``storage`` how object stores are reached.
    Raises `ConfigError` where the config cannot be right, `GraphError` where the data are not,
    `DataError` where they cannot be had.
    """
    raw = _read(config, seed, data_root, storage)
    if config.edge_attr == "drop":
        raw = replace(raw, edge_attr=None)
    check_arrays(raw)
    labels = read_labels(raw.name, raw.y, raw.num_nodes)
    graph = prepare(_assemble(raw, labels, _masks(config, raw, labels, seed)), config)
    if config.features:
        from gkd_dist.data.features import read_named_features

        graph = replace(graph, features=read_named_features(config.features, graph.num_nodes, storage))
    check_graph(graph)
    _log.info("%s: %d nodes, %d edges, %d features", graph.name, graph.num_nodes, graph.num_edges, graph.num_features)
    return graph


def default_data_root() -> Path:
    """``$GKD_DATA``, or ``gkd_dist`` in the user's cache folder."""
    named = os.environ.get("GKD_DATA")
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache").absolute() / "gkd_dist"


def _read(config: GraphConfig, seed: int, data_root: Path | None, storage: StorageConfig | None) -> RawGraph:
    """Imports inside: a generated graph needs neither torch_geometric nor a store."""
    source = config.source
    if isinstance(source, SyntheticSource):
        return generate(source, seed)
    if isinstance(source, PygSource):
        from gkd_dist.data.pyg import read_pyg

        return read_pyg(source, seed, default_data_root() if data_root is None else data_root, config.edge_attr)
    from gkd_dist.data.arrays import read_arrays

    assert isinstance(source, ArraysSource)
    return read_arrays(source.path, storage)


def _masks(config: GraphConfig, raw: RawGraph, labels: Labels, seed: int) -> Masks:
    split = config.split
    if split is None and isinstance(config.source, SyntheticSource):
        split = default_split(config.source)
    if split is None:
        return given_masks(raw.name, raw.masks, config.split_index, raw.num_nodes)
    if config.split_index:
        _log.warning("graph.split_index %d is not used: graph.split draws the splits", config.split_index)
    return draw_masks(raw.name, split, labels, seed)


def _assemble(raw: RawGraph, labels: Labels, masks: Masks) -> Graph:
    return Graph(
        x=raw.x.float().contiguous(),
        edge_index=raw.edge_index.to(torch.int64).contiguous(),
        y=labels.y,
        train_mask=masks["train"],
        val_mask=masks["val"],
        test_mask=masks["test"],
        num_classes=labels.num_classes,
        task=labels.task,
        edge_weight=None if raw.edge_weight is None else raw.edge_weight.float().contiguous(),
        name=raw.name,
        edge_attr=None if raw.edge_attr is None else _two_dimensional(raw.edge_attr).float().contiguous(),
    )


def _two_dimensional(edge_attr: Tensor) -> Tensor:
    """[E] or [E, a] to [E, a]."""
    return edge_attr.unsqueeze(1) if edge_attr.dim() == 1 else edge_attr
