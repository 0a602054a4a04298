"""Outputs of any module of a model, by its dotted path: what ``infer.taps`` names.

A tap is recorded by a forward hook while a layer, or the whole model, is computed. Which layer that
is, is found out once on a graph of three nodes (`tap_layers`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.infer.plan import KNOWLEDGE
from gkd_dist.models.build import run_model
from gkd_dist.models.layered import Layers

Recorded = dict[str, list[Tensor]]


def check_taps(model: nn.Module, taps: Collection[str]) -> None:
    """`ConfigError` for a path that names no module of ``model``, with those that are spelled alike."""
    paths = [path for path, _ in model.named_modules() if path]
    for tap in taps:
        if tap not in paths:
            alike = difflib.get_close_matches(tap, paths, n=4, cutoff=0.4) or paths[:4]
            raise ConfigError(
                f"infer.taps names {tap!r}, which is no module of the {type(model).__name__}; "
                f"use a dotted path such as {', '.join(alike) or 'one of its modules (it has none)'}"
            )


@contextmanager
def recording(model: nn.Module, taps: Collection[str]) -> Iterator[Recorded]:
    """Collects what the modules at ``taps`` give inside the ``with`` block, call by call."""
    recorded: Recorded = {}
    with ExitStack() as hooks:
        for tap in taps:
            handle = model.get_submodule(tap).register_forward_hook(_keep(recorded, tap))
            hooks.callback(handle.remove)
        yield recorded


def _keep(recorded: Recorded, tap: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # a copy: what comes after the module may work in place
        recorded.setdefault(tap, []).append(output.detach().clone() if isinstance(output, Tensor) else output)

    return hook


def owned_rows(recorded: Recorded, num_rows: int, num_nodes: int, where: str) -> dict[str, Tensor]:
    """The first ``num_rows`` rows of every tap, float32 [num_rows, d].

    ``num_nodes`` is how many nodes the computation saw. Raises `ModelError` for a module that gave anything but one
    row per node, and for one that ran more than once.
    """
    found = {}
    for tap, outputs in recorded.items():
        if len(outputs) != 1:
            raise ModelError(f"the module {tap} runs {len(outputs)} times in {where}; name one that runs once")
        output = outputs[0]
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.dim() < 1 or output.size(0) not in (num_rows, num_nodes):
            raise ModelError(
                f"the module {tap} gives {shape} in {where}, expected one row for each of {num_nodes} nodes; "
                "remove it from infer.taps or name a module that works on nodes"
            )
        found[tap] = output[:num_rows].reshape(num_rows, -1).float()
    return found


def tap_layers(fired: Mapping[int, Collection[str]], taps: Collection[str]) -> dict[str, int]:
    """Layer of each tap, KNOWLEDGE for those of the readout, from the taps that ``fired`` in each layer.

    Raises `ModelError` for a tap in several layers or in none.
    """
    layers: dict[str, int] = {}
    for tap in taps:
        found = sorted(layer for layer, names in fired.items() if tap in names)
        if len(found) > 1:
            names = ", ".join("the readout" if layer == KNOWLEDGE else f"layer {layer}" for layer in found)
            raise ModelError(f"the module {tap} runs in {names}; name one that runs in a single layer")
        if not found:
            raise ModelError(f"the module {tap} does not run in inference; remove it from infer.taps")
        layers[tap] = found[0]
    return layers


def tap_widths(model: nn.Module, taps: Collection[str], x: Tensor, graph: LocalGraph) -> dict[str, int]:
    """Width of what each tap gives, by a run on the small ``graph``; raises what `check_taps` and `owned_rows` do."""
    check_taps(model, taps)
    with recording(model, taps) as recorded, torch.inference_mode():
        run_model(model, x, graph)
    found = owned_rows(recorded, x.size(0), x.size(0), "the model")
    tap_layers({KNOWLEDGE: set(found)}, taps)
    return {tap: values.size(1) for tap, values in found.items()}


def probe_taps(model: nn.Module, layers: Layers, taps: Collection[str], x: Tensor, graph: LocalGraph) -> dict[str, int]:
    """`tap_layers` of a layered model (``layers`` is its `Layers` view), by a run on the small ``graph``."""
    fired: dict[int, Collection[str]] = {}
    outputs: dict[int, Tensor] = {}
    below = x
    with torch.inference_mode():
        for layer in range(1, layers.num_layers + 1):
            with recording(model, taps) as recorded:
                below = outputs[layer] = layers.forward_layer(layer, layers.activate(layer - 1, below), graph)
            fired[layer] = set(recorded)
        with recording(model, taps) as recorded:
            layers.readout({layer: outputs[layer] for layer in layers.readout_layers})
        fired[KNOWLEDGE] = set(recorded)
    return tap_layers(fired, taps)
