"""Modules that no part of a graph can run: refused by name, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import nn

from gkd_dist.errors import ModelError
from gkd_dist.models.refusals import refuse_unsuitable

MODE = r"mode 'graph', PyG's default, .*use norm_kwargs: \{mode: node\}$"
WHOLE = r"normalises over the whole graph.*norm: batch_norm, or norm: layer_norm with norm_kwargs: \{mode: node\}$"
TRACK = r"track_running_stats=False .*use norm_kwargs: \{track_running_stats: true\}$"


def gnn(norm: str | None = None, **norm_kwargs: Any) -> nn.Module:
    return pyg.GIN(6, 4, 2, 3, norm=norm, norm_kwargs=norm_kwargs or None).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (gnn("layer_norm"), rf"^convs.0.nn.norms.0 \(LayerNorm\) has {MODE}"),
        (gnn("graph_norm"), rf"\(GraphNorm\) {WHOLE}"),
        (gnn("pair_norm"), rf"\(PairNorm\) {WHOLE}"),
        (gnn("instance_norm"), rf"\(InstanceNorm\) has {TRACK}"),
        (gnn("batch_norm", track_running_stats=False), rf"\(BatchNorm1d\) has {TRACK}"),
        (gnn("diff_group_norm", groups=2, track_running_stats=False), rf"\(BatchNorm1d\) has {TRACK}"),
        (nn.Sequential(pyg.GraphSizeNorm()).eval(), rf"^0 \(GraphSizeNorm\) {WHOLE}"),
        (pyg.MeanSubtractionNorm().eval(), rf"^the model \(MeanSubtractionNorm\) {WHOLE}"),
        (pyg.GCN(6, 4, 2, 3, cached=True).eval(), r"^convs.0 \(GCNConv\) has cached=True .*build it with cached=False"),
        (pyg.SGConv(6, 4, cached=True).eval(), r"\(SGConv\) has cached=True"),
    ],
)
def test_what_looks_at_the_whole_graph_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        refuse_unsuitable(model)


@pytest.mark.parametrize(
    "model",
    [
        gnn(),
        gnn("batch_norm"),
        gnn("layer_norm", mode="node"),
        gnn("instance_norm", track_running_stats=True),
        gnn("diff_group_norm", groups=2),
        nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), pyg.MessageNorm()).eval(),
    ],
)
def test_norms_per_node_and_running_statistics_pass(model: nn.Module) -> None:
    refuse_unsuitable(model)


def test_a_model_in_train_mode_is_refused() -> None:
    model = pyg.GCN(6, 4, 2, 3)
    with pytest.raises(
        ModelError, match=r"GCN is in train mode \(\d+ modules, first GCN\).*call model.eval\(\) first$"
    ):
        refuse_unsuitable(model)
    model.eval().dropout.train()
    with pytest.raises(ModelError, match=r"in train mode \(1 modules, first dropout\)"):
        refuse_unsuitable(model)


def test_what_is_refused_for_its_norm_really_depends_on_the_rest_of_the_graph() -> None:
    """The other direction of the list: each refused norm changes a row when other rows change."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:4], 3 + x[4:]])
    norms = [pyg.GraphNorm(4), pyg.PairNorm(), pyg.MeanSubtractionNorm(), pyg.LayerNorm(4), pyg.InstanceNorm(4)]
    norms.append(pyg.BatchNorm(4, track_running_stats=False))
    for norm in norms:
        assert (norm.eval()(x)[:4] - norm(other)[:4]).abs().max() > 0.1, norm
        with pytest.raises(ModelError):
            refuse_unsuitable(norm)
