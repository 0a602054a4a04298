"""Modules that no cut of the graph can run exactly, found by looking at them: named, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch_geometric import nn as pyg

from gkd_dist.errors import ModelError

_NODE_NORM = "use norm: batch_norm, or norm: layer_norm with norm_kwargs: {mode: node}"
_WHOLE_GRAPH = (pyg.GraphNorm, pyg.PairNorm, pyg.GraphSizeNorm, pyg.MeanSubtractionNorm)


def refuse_unsuitable(model: nn.Module) -> None:
    """Raises `ModelError` for a model in train mode, and for modules that look at the whole graph in eval mode."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ModelError(
            f"{type(model).__name__} is in train mode ({len(training)} modules, first {training[0]}), where dropout "
            "and batch statistics make its outputs depend on the batch; call model.eval() first"
        )
    for sentence in _unsuitable(model):
        raise ModelError(sentence)


def _unsuitable(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, _WHOLE_GRAPH):
            yield f"{name} normalises over the whole graph, which no part has; {_NODE_NORM}"
        if isinstance(module, pyg.LayerNorm) and module.mode == "graph":
            yield (
                f"{name} has mode 'graph', PyG's default, and normalises over all nodes at once, which no part has; "
                "use norm_kwargs: {mode: node}"
            )
        if isinstance(module, pyg.InstanceNorm) and not module.track_running_stats:
            yield _no_statistics(name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            yield _no_statistics(name)
        if getattr(module, "cached", False) is True and isinstance(module, pyg.MessagePassing):
            yield (
                f"{name} has cached=True and would use the edges of the first part for all others; "
                "build it with cached=False, its weights are the same"
            )


def _no_statistics(name: str) -> str:
    return (
        f"{name} has track_running_stats=False and normalises by the nodes it is given, of which a part has only some; "
        "use norm_kwargs: {track_running_stats: true}"
    )
