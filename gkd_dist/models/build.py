"""From a model's configuration to a module, and one way to run any of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gkd_dist.config import BUILT_IN_MODELS, ModelConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.layered import LayeredModel, forward_layers, is_layered


def build_model(config: ModelConfig, in_channels: int, out_channels: int) -> nn.Module:
    """The module that ``config`` describes.

    A user class is called as ``attr(in_channels=..., out_channels=..., **args)``. Raises
    `ConfigError` where it cannot be imported or built.
    """
    if config.kind in BUILT_IN_MODELS:
        return LayeredModel(config, in_channels, out_channels)
    factory = import_model(config.kind)
    try:
        model = factory(in_channels=in_channels, out_channels=out_channels, **config.args)
    except TypeError as error:
        raise ConfigError(
            f"model kind {config.kind} could not be built with in_channels, out_channels and args "
            f"{sorted(config.args)}: {error}; its signature is {inspect.signature(factory)}, adjust model.args"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model kind {config.kind} gave a {type(model).__name__}; it must give a torch.nn.Module")
    _check_depth(config, model)
    return model


def _check_depth(config: ModelConfig, model: nn.Module) -> None:
    """``layers`` of the configuration decides halo and layer numbers, so it must be the truth."""
    depth = getattr(model, "num_layers", config.layers)
    if depth != config.layers:
        raise ConfigError(
            f"model kind {config.kind} has {depth} layers, the configuration says {config.layers}; set layers={depth}"
        )


def import_model(path: str) -> Callable[..., Any]:
    """The user's class or function ``module:attr``; `ConfigError` where it cannot be imported."""
    module, _, attribute = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's own lines raise
        raise ConfigError(
            f"model kind {path} could not be imported: {type(error).__name__}: {error}; correct it, or put the folder "
            f"of {module.split('.')[0]} on PYTHONPATH"
        ) from error
    return found


def run_model(
    model: nn.Module, x: Tensor, graph: LocalGraph, layers: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [n, c] and the outputs of ``layers``, for layered and for plain modules.

    A plain module is called as ``model(x, edge_index)``, or with ``edge_weight`` as a third
    argument where the graph has weights.
    """
    if is_layered(model):
        return forward_layers(model, x, graph, layers)
    if layers:
        raise ModelError(
            f"{type(model).__name__} has no layers to name; give it num_layers, forward_layer and activate, "
            "or drop the loss terms that read layers"
        )
    weight = () if graph.edge_weight is None else (graph.edge_weight,)
    return model(x, graph.edge_index, *weight), {}
