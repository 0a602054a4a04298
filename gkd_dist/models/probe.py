"""Does a model give the same answer however the graph is cut? Tried on a tiny random graph, before the real one.

`check_model` runs the module a few times on some dozen nodes: twice the same, with nodes and edges in
another order, and on a part of the graph. What it finds is either refused with a sentence, or told:
layer by layer, or how many hops a model that runs as a whole looks.

Shapes: ``n`` nodes, ``m`` edges of the tiny graph; ``f`` features; ``a`` edge attributes; ``c`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkd_dist.errors import ModelError
from gkd_dist.models.basic_gnn import is_basic_gnn, reads_attributes
from gkd_dist.models.build import run_model
from gkd_dist.models.layered import Layers, as_layers, why_not_layered
from gkd_dist.models.refusals import refuse_unsuitable
from gkd_dist.models.tiny import TinyGraph, num_ids_of, random_graph, ring

_BOUND = 1e-3  # of the largest value: far above rounding, far below what another order changes
_HOP_BOUND = 1e-5  # the influence of a node fades with the hops, so what counts as none is smaller here
_MAX_HOPS = 16


@dataclass(frozen=True)
class ModelCheck:
    """How a model runs on parts: layer by layer, or as a whole with ``hops`` hops of halo (None: more than 16)."""

    name: str
    layered: bool
    reason: str = ""
    hops: int | None = None

    def exact(self, halo_hops: int) -> bool:
        """Whether results on parts with ``halo_hops`` are those on the whole graph."""
        return self.layered or (self.hops is not None and self.hops <= halo_hops)

    def sentence(self, halo_hops: int) -> str:
        """What a run says of it."""
        if self.layered:
            return f"{self.name} runs layer by layer: exact"
        halo = f"its halo of {_hops_of(halo_hops)}"
        how = f"{self.name} runs as a whole on each part, with {halo} (k-hop mode, because {self.reason})"
        if self.hops is not None and self.exact(halo_hops):
            return f"{how}: exact, it looks {_hops_of(self.hops)} far"
        if self.hops is None:
            return f"{how}: approximate, it looks more than {_MAX_HOPS} hops far"
        return (
            f"{how}: approximate, it looks {_hops_of(self.hops)} far; "
            f"set partition.halo_hops={self.hops} for exact results and run again"
        )


def _hops_of(count: int) -> str:
    return "1 hop" if count == 1 else f"{count} hops"


@torch.no_grad()
def check_model(
    model: nn.Module, num_features: int, has_edge_weight: bool = False, num_edge_features: int = 0
) -> ModelCheck:
    """Raises `ModelError` for a model whose outputs at a node depend on how the graph is cut or ordered.

    ``num_features``, ``has_edge_weight`` and ``num_edge_features`` say what the real graph has. The
    module must be in eval mode; its parameters and the random state stay as they are.
    """
    refuse_unsuitable(model)
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tiny = random_graph(num_features, has_edge_weight, num_edge_features, num_ids_of(model)).to(device)
        logits = _run(model, tiny)
        _check_repeatable(model, tiny, logits)
        _check_order(model, tiny, logits)
        stack, name = as_layers(model), type(model).__name__
        if stack is None:
            return ModelCheck(name, False, why_not_layered(model), _hops(model, tiny))
        if is_basic_gnn(model):
            _check_view(model, tiny, logits)
        _check_layers(name, stack, tiny, logits)
        return ModelCheck(name, True)


def _run(model: nn.Module, tiny: TinyGraph) -> Tensor:
    """Logits [n, c]."""
    name, graph = type(model).__name__, tiny.graph
    try:
        logits, _ = run_model(model, tiny.x, graph)
    except ModelError:
        raise
    except Exception as error:  # whatever the user's own lines raise
        weights = "" if graph.edge_weight is None else ", edge weights"
        attr = "" if graph.edge_attr is None else f", {graph.edge_attr.size(1)} attributes per edge"
        raise ModelError(
            f"{name} failed on a graph of {tiny.x.size(0)} nodes with {tiny.x.size(1)} features{weights}{attr}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}; "
            "correct its forward, or use a graph with what it was trained on"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(0) != tiny.x.size(0):
        found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"{name} gave {found} for {tiny.x.size(0)} nodes; its forward must return logits with one row per node"
        )
    return logits


def _check_repeatable(model: nn.Module, tiny: TinyGraph, logits: Tensor) -> None:
    difference = distance(_run(model, tiny), logits)
    if difference > _BOUND:
        raise ModelError(
            f"{type(model).__name__} gives other outputs when it is run again in eval mode (they differ by "
            f"{difference:.2g} of the largest): something stays random, like F.dropout without "
            "training=self.training, or x is changed in place; make it depend on self.training, and leave x as it is"
        )


def _check_order(model: nn.Module, tiny: TinyGraph, logits: Tensor) -> None:
    order = torch.randperm(tiny.x.size(0), generator=torch.Generator().manual_seed(1)).to(tiny.x.device)
    difference = distance(_run(model, tiny.permuted(order)), logits[order])
    if difference > _BOUND:
        suspects = [f"{path} ({type(m).__name__})" for path, m in model.named_modules() if _orders(m)]
        of = f"; likely {suspects[0]}" if suspects else ""
        raise ModelError(
            f"outputs of {type(model).__name__} depend on the order of nodes or edges (they differ by "
            f"{difference:.2g} of the largest{of}), which differs from part to part; "
            "use an aggregation without order (mean, sum, max), and no input that is the number of a node"
        )


def _orders(module: nn.Module) -> bool:
    names = ("LSTM", "GRU", "RNN", "SortAggregation", "Embedding", "PositionalEncoding")
    return any(name in type(module).__name__ for name in names)


def _check_view(model: nn.Module, tiny: TinyGraph, logits: Tensor) -> None:
    """Our view of a `BasicGNN` against PyG's own forward, which a later version of PyG may change."""
    graph = tiny.graph
    inputs = {"edge_weight": graph.edge_weight, "edge_attr": graph.edge_attr if reads_attributes(model) else None}
    difference = distance(model(tiny.x, graph.edge_index, **inputs), logits)
    if difference > _BOUND:
        raise ModelError(
            f"the layers of {type(model).__name__} do not give what its own forward does (they differ by "
            f"{difference:.2g} of the largest); use a tested version of torch_geometric (see constraints.txt)"
        )


def _check_layers(name: str, stack: Layers, tiny: TinyGraph, logits: Tensor) -> None:
    """Each layer on a part with one hop of halo, `activate` and `readout` on single rows, against all nodes."""
    owned = torch.arange(0, tiny.x.size(0), 3, device=tiny.x.device)
    part, nodes = tiny.part(owned, hops=1)
    h, outputs = stack.activate(0, tiny.x), {}
    for layer in range(1, stack.num_layers + 1):
        before = h.clone()
        z = stack.forward_layer(layer, h, tiny.graph)
        _must_not_change(h, before, f"forward_layer({layer}) of {name}")
        here = stack.forward_layer(layer, h[nodes], part.graph)[: owned.numel()]
        _must_agree(here, z[owned], f"forward_layer({layer}) of {name} needs more than the in-edges of a node")
        outputs[layer], before = z, z.clone()
        h = stack.activate(layer, z) if layer < stack.num_layers else h
        _must_not_change(z, before, f"activate({layer}) of {name}")
        if layer < stack.num_layers:
            _must_agree(stack.activate(layer, z[owned]), h[owned], f"activate({layer}) of {name} mixes nodes")
    read = {layer: outputs[layer][owned] for layer in stack.readout_layers}
    copies = {layer: values.clone() for layer, values in read.items()}
    _must_agree(stack.readout(read), logits[owned], f"readout of {name} mixes nodes")
    for layer, values in copies.items():
        _must_not_change(read[layer], values, f"readout of {name}")


def _must_not_change(found: Tensor, before: Tensor, what: str) -> None:
    if not torch.equal(found.nan_to_num(), before.nan_to_num()):
        raise ModelError(
            f"{what} changes its input in place, which is stored and read again; use the function that gives a new "
            "tensor (relu in place of relu_, inplace=False)"
        )


def _must_agree(found: Tensor, expected: Tensor, what: str) -> None:
    difference = distance(found, expected)
    if difference > _BOUND:
        raise ModelError(
            f"{what} (on a part of the graph it differs by {difference:.2g} of the largest value), so that layers are "
            "not exact; use degrees from graph.in_degree and norms per node, or drop the members of the layer "
            "protocol to run it as a whole on its halo"
        )


def _hops(model: nn.Module, tiny: TinyGraph) -> int | None:
    """Smallest halo on which owned rows are exact; None: more than 16 hops, with an influence that fades."""
    graph = tiny.graph
    width = 0 if graph.edge_attr is None else graph.edge_attr.size(1)
    around = ring(4 * _MAX_HOPS, tiny.x.size(1), graph.edge_weight is not None, width).to(tiny.x.device)
    owned = torch.arange(2, device=tiny.x.device)
    expected, difference = _run(model, around)[owned], torch.inf
    for hops in range(1, _MAX_HOPS + 1):
        part, _ = around.part(owned, hops)
        difference = distance(_run(model, part)[: owned.numel()], expected)
        if difference <= _HOP_BOUND:
            return hops
    if difference > _BOUND:
        raise ModelError(
            f"outputs of {type(model).__name__} at a node depend on nodes more than {_MAX_HOPS} hops away (they "
            f"differ by {difference:.2g} of the largest), so that no halo is enough; use norms and pooling that do "
            "not look at the whole graph"
        )
    return None


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value or to 1; infinite for other shapes; NaN equals NaN."""
    if found.shape != expected.shape:
        return torch.inf
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    if found.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def layer_widths(
    model: nn.Module, num_features: int, has_edge_weight: bool = False, num_edge_features: int = 0
) -> dict[int, int]:
    """Width ``d_l`` of every layer (from 1) of a layered model in eval mode; empty for one that runs as a whole."""
    stack = as_layers(model)
    if stack is None:
        return {}
    tiny, widths = random_graph(num_features, has_edge_weight, num_edge_features, num_ids_of(model)), {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        h = stack.activate(0, tiny.x)
        for layer in range(1, stack.num_layers + 1):
            z = stack.forward_layer(layer, h, tiny.graph)
            widths[layer] = z.size(1)
            h = stack.activate(layer, z) if layer < stack.num_layers else z
    return widths
