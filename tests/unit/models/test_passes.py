"""A forward pass whose layers are computed again in the backward pass: less is kept, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gkd_dist.config import ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.models.layered import LayeredModel, forward_layers
from gkd_dist.models.norm import collecting_norms
from gkd_dist.noise import NodeNoise

NODES, WIDTH, LAYERS = 2000, 32, 5
KINDS = ["gcn", "gat"]


def deep(kind: str, **options: object) -> tuple[LayeredModel, Tensor, LocalGraph]:
    heads = {"heads": 4, "hidden": WIDTH // 4} if kind == "gat" else {"hidden": WIDTH}
    values = {"kind": kind, "layers": LAYERS, "dropout": 0.3, **heads, **options}
    torch.manual_seed(0)
    model = LayeredModel(ModelConfig.model_validate(values), 8, 4).train()
    graph = LocalGraph.from_edge_index(torch.randint(0, NODES, (2, 8000)).unique(dim=1), NODES)
    return model, torch.randn(NODES, 8), graph.with_noise(NodeNoise(torch.arange(NODES), 3))


def kept_bytes(kind: str, recompute: bool) -> int:
    """What a forward pass allocates and does not free before the backward pass."""
    model, x, graph = deep(kind)
    forward_layers(model, x, graph)  # structures that are derived once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits, _ = forward_layers(model, x, graph, recompute=recompute)
    assert logits.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize(("kind", "times"), [("gcn", 2.9), ("gat", 6.5)])
def test_one_tensor_per_layer_is_kept(kind, times):
    inputs = (LAYERS - 1) * NODES * WIDTH * 4
    kept = kept_bytes(kind, recompute=True)
    assert kept <= 1.1 * inputs + NODES * 4 * 4 + 20_000  # logits, and what does not grow with nodes
    assert kept_bytes(kind, recompute=False) > times * inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("dropout_mask", ["node", "unit"])
def test_recomputed_gradients_are_the_same_bits(kind, norm, dropout_mask):
    grads, pending = [], []
    for recompute in (False, True):
        model, x, graph = deep(kind, norm=norm, dropout_mask=dropout_mask)
        torch.manual_seed(5)
        logits, layers = forward_layers(model, x, graph, [2], recompute)
        (logits.square().sum() + layers[2].sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        pending.append([norm.take_pending() for norm in collecting_norms(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*pending, strict=True)), "statistics are counted once"
