"""From a model's configuration to a module, and one way to run any of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gkd_dist.config import BUILT_IN_MODELS, ModelConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.basic_gnn import (
    basic_gnn_args,
    is_basic_gnn,
    is_basic_gnn_class,
    reads_attributes,
    with_graph_args,
)
from gkd_dist.models.embedding import sized_for
from gkd_dist.models.layered import LayeredModel, forward_layers, is_layered, why_not_layered
from gkd_dist.models.norm import tell_norms

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
)


def build_model(config: ModelConfig, in_channels: int, out_channels: int) -> nn.Module:
    """The module that ``config`` describes.

    A user class is called as ``attr(in_channels=..., out_channels=..., **args)``; what PyG's
    ``BasicGNN`` family takes beside these comes from ``layers`` and ``hidden``. Raises `ConfigError`
    where it cannot be imported or built.
    """
    if config.kind in BUILT_IN_MODELS:
        return LayeredModel(config, in_channels, out_channels)
    factory = import_model(config.kind)
    args = basic_gnn_args(factory, config) if is_basic_gnn_class(factory) else config.args
    try:
        model = factory(in_channels=in_channels, out_channels=out_channels, **args)
    except Exception as error:  # whatever the user's own lines raise
        lines = str(error).splitlines() or ["no message"]
        raise ConfigError(
            f"model kind {config.kind} could not be built with in_channels, out_channels and args "
            f"{sorted(args)}: {_named(error)}{lines[0]}; its signature is {inspect.signature(factory)}, "
            "adjust model.args"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model kind {config.kind} gave a {type(model).__name__}; it must give a torch.nn.Module")
    _check_sizes(config, model)
    return model


def resolve_model(config: ModelConfig, graph_meta: Mapping[str, Any]) -> ModelConfig:
    """``config`` with what a model takes from the graph it is made for, so that it can be built without that graph.

    ``graph_meta`` is the ``meta`` of the graph's manifest. Raises `ConfigError` where the class
    cannot be imported.
    """
    if config.kind in BUILT_IN_MODELS:
        return config if config.node_embedding is None else sized_for(config, int(graph_meta["num_nodes"]))
    factory = import_model(config.kind)
    if not is_basic_gnn_class(factory):
        return config
    args = with_graph_args(factory, config.args, graph_meta)
    return config.model_copy(update={"args": args})


def _named(error: Exception) -> str:
    return "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "


def _check_sizes(config: ModelConfig, model: nn.Module) -> None:
    """``layers`` and ``hidden`` of the configuration decide halo and layer numbers, so they must be the truth."""
    depth = getattr(model, "num_layers", config.layers)
    if depth != config.layers:
        raise ConfigError(
            f"model kind {config.kind} has {depth} layers, the configuration says {config.layers}; set layers={depth}"
        )
    hidden = model.hidden_channels if is_basic_gnn(model) else config.hidden
    if hidden != config.hidden:
        raise ConfigError(
            f"model kind {config.kind} is {hidden} wide, the configuration says {config.hidden}; set hidden={hidden}"
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
    model: nn.Module, x: Tensor, graph: LocalGraph, layers: Sequence[int] = (), recompute: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [n, c] and the outputs of ``layers``, for layered and for plain modules.

    A plain module is called as ``model(x, edge_index)``, with edge weights and attributes of the
    graph where its ``forward`` takes them (`edge_inputs`).
    """
    if is_layered(model):
        return forward_layers(model, x, graph, layers, recompute)
    if layers:
        raise ModelError(f"{no_layers(model)}, or drop the loss terms that read layers")
    if model.training:
        tell_norms(model, graph)
    positional, named = edge_inputs(model, graph)
    return model(x, graph.edge_index, *positional, **named), {}


def no_layers(model: nn.Module) -> str:
    """The first half of a sentence that refuses a layer of a model that has none; the caller adds the other way out."""
    reason = f" ({why_not_layered(model)})" if is_basic_gnn(model) else ""
    return f"{type(model).__name__} has no layers to name{reason}; give it num_layers, forward_layer and activate"


def edge_inputs(model: nn.Module, graph: LocalGraph) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What ``forward`` of a plain module takes of the edges beside their ends: by position, and by name.

    By name where it names ``edge_weight`` or ``edge_attr``; else weights are its third argument.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())[2:]
    names = {parameter.name for parameter in parameters}
    unread = is_basic_gnn(model) and not reads_attributes(model)
    found = {"edge_weight": graph.edge_weight, "edge_attr": None if unread else graph.edge_attr}
    named = {name: value for name, value in found.items() if value is not None and name in names}
    by_position = parameters and parameters[0].kind in _POSITIONAL and not names & found.keys()
    return ([graph.edge_weight] if by_position and graph.edge_weight is not None else []), named
