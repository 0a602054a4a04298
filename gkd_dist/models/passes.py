"""One forward pass through a stack of layers, on a graph that is whole, a part, or spread over ranks.

On a graph whose parts stay on their ranks (``graph.halo``), each layer is computed for the owned rows
alone, and the rows of halo nodes come from their owners before the next layer: one exchange per layer
that carries all that is read of it, so that on every rank each exchange needs the one before it, forward
and backward, and none can overtake another.

Shapes: ``n`` local nodes, ``o`` of them owned, ``d_l`` width of layer l, ``c`` classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gkd_dist.errors import ModelError
from gkd_dist.graph import HaloRows, LocalGraph
from gkd_dist.models.norm import tell_norms
from gkd_dist.sampling import LayerGraphs


def run_stack(
    model: nn.Module, stack: Any, x: Tensor, graph: LocalGraph, wanted: Collection[int], recompute: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits and the outputs ``z_l`` [n, d_l] of the ``wanted`` layers of ``stack``, the `Layers` of ``model``.

    Logits are [n, c], on a graph with ``halo`` [o, c]. ``recompute``: of each layer only its input is kept,
    and the layer is computed once more in the backward pass; exchanges are not repeated.
    """
    if graph.layers is not None:
        return _run_sampled(model, stack, x, graph, graph.layers, wanted, recompute)
    rows = _rows_to_compute(model, graph)
    activate = _activation(stack, graph)
    keep = _recomputed if recompute and torch.is_grad_enabled() else _kept
    num_rows = None if graph.halo is None else graph.num_owned
    h, outputs, read = activate(0, x), dict[int, Tensor](), dict[int, Tensor]()
    for layer in range(1, stack.num_layers + 1):
        last = layer == stack.num_layers
        z, above = keep(partial(_layer, model, stack, layer, None if last else activate, num_rows), h, rows)
        if layer in stack.readout_layers:
            read[layer] = z
        asked = z if layer in wanted else None
        asked, h = (asked, above) if graph.halo is None else _exchanged(graph.halo, asked, above)
        if asked is not None:
            outputs[layer] = asked
    return stack.readout(read), outputs


def _run_sampled(
    model: nn.Module,
    stack: Any,
    x: Tensor,
    graph: LocalGraph,
    layers: LayerGraphs,
    wanted: Collection[int],
    recompute: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The same with a graph of its own for each layer; logits are of the rows of the last one, owned nodes first."""
    activate = _activation(stack, layers.graphs[0])
    keep = _recomputed if recompute and torch.is_grad_enabled() else _kept
    h, outputs, read = activate(0, x[layers.nodes]), dict[int, Tensor](), dict[int, Tensor]()
    for layer, inner in enumerate(layers.graphs, start=1):
        above = None if layer == stack.num_layers else activate
        z, h = keep(partial(_layer, model, stack, layer, above, layers.sizes[layer]), h, inner)
        if layer in stack.readout_layers:
            read[layer] = z[: layers.sizes[-1]]
        if layer in wanted:
            outputs[layer] = layers.spread(z, layer, graph.num_nodes)
    return stack.readout(read), outputs


def _activation(stack: Any, graph: LocalGraph) -> Callable[[int, Tensor], Tensor]:
    """``activate`` of a stack, with the noise of the pass where it takes it."""
    activate: Callable[[int, Tensor], Tensor] = stack.activate
    return partial(stack.activate, noise=graph.noise) if getattr(stack, "takes_noise", False) else activate


def _rows_to_compute(model: nn.Module, graph: LocalGraph) -> LocalGraph:
    """The graph that layers see: without rows for halo nodes where these come from elsewhere."""
    if graph.halo is None or not getattr(model, "rows_alone", False):
        return graph
    return graph.owned_rows()


def _layer(
    model: nn.Module,
    stack: Any,
    layer: int,
    activate: Callable[[int, Tensor], Tensor] | None,
    num_rows: int | None,
    h: Tensor,
    graph: LocalGraph,
) -> tuple[Tensor, Tensor | None]:
    """``z_l`` and, below the last layer, ``h_l``; of the first ``num_rows`` rows (None: all)."""
    if model.training:
        tell_norms(model, graph)
    z = checked_layer(model, layer, stack.forward_layer(layer, h, graph), graph)
    z = z[:num_rows]
    return z, None if activate is None else activate(layer, z)


def _exchanged(halo: HaloRows, z: Tensor | None, h: Tensor | None) -> tuple[Any, Any]:
    """Both for all nodes, in one exchange; None stays None."""
    present = [values for values in (z, h) if values is not None]
    if not present:
        return None, None
    filled = halo.fill(present[0] if len(present) == 1 else torch.cat(present, 1))
    blocks = iter(filled.split([values.size(1) for values in present], 1))
    return (None if z is None else next(blocks)), (None if h is None else next(blocks))


def _kept(compute: Callable[[Tensor, LocalGraph], Any], h: Tensor, graph: LocalGraph) -> Any:
    return compute(h, graph)


def _recomputed(compute: Callable[[Tensor, LocalGraph], Any], h: Tensor, graph: LocalGraph) -> Any:
    contexts = lambda: (contextlib.nullcontext(), _recomputing(graph))  # noqa: E731
    return checkpoint(compute, h, graph, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _recomputing(graph: LocalGraph) -> Iterator[None]:
    """Tells modules that count what they see that they have seen it."""
    before, graph.recomputing = graph.recomputing, True
    try:
        yield
    finally:
        graph.recomputing = before


def checked_layer(model: nn.Module, layer: int, z: Tensor, graph: LocalGraph) -> Tensor:
    """``z``, which ``forward_layer`` gave; `ModelError` where it has not one row per node."""
    if not isinstance(z, Tensor) or z.dim() != 2 or z.size(0) != graph.num_rows:
        found = f"shape {list(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise ModelError(
            f"forward_layer({layer}) of {type(model).__name__} gave {found} for {graph.num_rows} nodes; "
            "it must give one row per node"
        )
    return z
