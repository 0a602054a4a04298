"""Which nodes train, validate and test: the masks of a data set, or masks drawn by seed.

All functions are pure; draws use their own generator. Shapes: ``N`` nodes, ``k`` alternative splits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gkd_dist.config import PerClassSplit, RandomSplit
from gkd_dist.data.labels import Labels
from gkd_dist.data.validate import labelled_nodes
from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.graph import SPLITS

Masks = dict[str, Tensor]


def given_masks(name: str, masks: Mapping[str, Tensor], index: int, num_nodes: int) -> Masks:
    """The data set's own masks as bool [N]; of masks [N, k], column ``index``.

    Raises `GraphError` where a mask is missing or malformed, `ConfigError` where ``index`` is no column.
    """
    missing = [split for split in SPLITS if split not in masks]
    if missing:
        raise GraphError(
            f"{name}: the data set has no {' and no '.join(f'{split}_mask' for split in missing)}; "
            "set graph.split, e.g. {kind: per_class, train: 20, val: 30} or {kind: random, train: 0.6, val: 0.2}"
        )
    for split in SPLITS:
        _check_mask(name, split, masks[split], num_nodes)
    num_splits = max(mask.size(1) if mask.dim() == 2 else 1 for mask in masks.values())
    if index >= num_splits:
        raise ConfigError(
            f"graph.split_index is {index}, but {name} has {num_splits} split{'s' * (num_splits > 1)}; "
            f"set graph.split_index to 0{f' .. {num_splits - 1}' * (num_splits > 1)}"
        )
    return {split: _column(masks[split], index).bool() for split in SPLITS}


def _column(mask: Tensor, index: int) -> Tensor:
    """A mask shared by all splits has one column or none of its own."""
    if mask.dim() == 1:
        return mask
    return mask[:, index if mask.size(1) > 1 else 0]


def _check_mask(name: str, split: str, mask: Tensor, num_nodes: int) -> None:
    if mask.dim() not in (1, 2) or mask.size(0) != num_nodes or mask.numel() == 0:
        raise GraphError(
            f"{name}: {split}_mask has shape {list(mask.shape)}, expected [{num_nodes}] "
            f"or [{num_nodes}, num_splits]; give one entry per node, not a list of node ids"
        )
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise GraphError(f"{name}: {split}_mask holds values other than 0 and 1; give one boolean per node")


def draw_masks(name: str, split: PerClassSplit | RandomSplit, labels: Labels, seed: int) -> Masks:
    """Masks bool [N] drawn from the labelled nodes; a pure function of ``split``, labels and seed."""
    generator = torch.Generator().manual_seed(seed if split.seed is None else split.seed)
    if isinstance(split, RandomSplit):
        return _random(name, split, labels, generator)
    if labels.task == "multilabel":
        raise GraphError(
            f"{name}: graph.split.kind per_class needs one class per node, but the nodes have {labels.num_classes} "
            "binary labels each; set graph.split to {kind: random, train: 0.6, val: 0.2}"
        )
    return _per_class(name, split, labels, generator)


def _per_class(name: str, split: PerClassSplit, labels: Labels, generator: torch.Generator) -> Masks:
    """``train`` and ``val`` nodes of each class that occurs; all other labelled nodes test."""
    counts = torch.bincount(labels.y[labels.y >= 0], minlength=labels.num_classes)
    for label, count in enumerate(counts.tolist()):
        if 0 < count < split.train + split.val:
            raise GraphError(
                f"{name}: class {label} has {count} labelled nodes, but graph.split takes {split.train} for training "
                f"and {split.val} for validation of each class; lower graph.split.train or graph.split.val"
            )
    train, val = (torch.zeros(labels.y.numel(), dtype=torch.bool) for _ in range(2))
    for label in counts.nonzero().flatten().tolist():
        nodes = _shuffled(labels.y == label, generator)
        train[nodes[: split.train]] = True
        val[nodes[split.train : split.train + split.val]] = True
    test = labelled_nodes(labels.y) & ~train & ~val
    if not test.any():
        raise GraphError(
            f"{name}: graph.split leaves no node for testing (training and validation take all "
            f"{int(counts.sum())} labelled nodes); lower graph.split.train or graph.split.val"
        )
    return {"train": train, "val": val, "test": test}


def _random(name: str, split: RandomSplit, labels: Labels, generator: torch.Generator) -> Masks:
    """Fractions of the labelled nodes, rounded; what is left tests."""
    nodes = _shuffled(labelled_nodes(labels.y), generator)
    num_train, num_val = round(split.train * nodes.numel()), round(split.val * nodes.numel())
    if min(num_train, num_val, nodes.numel() - num_train - num_val) < 1:
        raise GraphError(
            f"{name}: graph.split leaves a split empty ({num_train} training, {num_val} validation, "
            f"{nodes.numel() - num_train - num_val} test nodes of {nodes.numel()} labelled ones); "
            "change graph.split.train and graph.split.val"
        )
    masks = {}
    for key, part in zip(SPLITS, nodes.tensor_split([num_train, num_train + num_val]), strict=True):
        masks[key] = torch.zeros(labels.y.size(0), dtype=torch.bool)
        masks[key][part] = True
    return masks


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    nodes = mask.nonzero().flatten()
    return nodes[torch.randperm(nodes.numel(), generator=generator)]
