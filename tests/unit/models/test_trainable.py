"""Models of others in train mode: norms over owned rows, batches without nodes, layers that losses name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as pyg

from gkd_dist.config import KdLoss, LspLoss, ModelConfig
from gkd_dist.distill.module import StudentModule, merge_running_statistics
from gkd_dist.errors import ModelError, StudentError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.build import build_model, resolve_model, run_model
from gkd_dist.models.norm import OwnedBatchNorm1d, own_batch_norms
from gkd_dist.models.tiny import random_graph
from gkd_dist.models.trainable import check_empty, refuse_layers_that_are_not_there, refuse_untrainable
from gkd_dist.stream.units import empty_batch
from gkd_dist.world import World
from tests.user_models import Layered, Plain

KINDS = ["GCN", "GraphSAGE", "GAT", "GIN", "PNA", "EdgeCNN"]
EMPTY = empty_batch(6, 4, "multiclass")
META = {"in_degree_histogram": {"0": 3, "2": 5, "4": 7}}


def basic(name: str, **args: object) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(kind=f"torch_geometric.nn:{name}", layers=2, hidden=8, args=args)
    return build_model(resolve_model(config, META), 6, 4)


class NodeNorm(nn.Module):
    """A plain module with a batch norm of torch in it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, **options)
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """[n, 6] to [n, 4]."""
        return self.lin(self.norm(x).index_add(0, edge_index[1], x[edge_index[0]]))


class ScaledNorm(nn.BatchNorm1d):
    """What users derive from torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] to [n, d]."""
        return 2 * super().forward(x)


# --- batch norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_with_owned_rows_alone_it_is_that_of_torch(momentum: float | None, affine: bool) -> None:
    theirs = nn.Sequential(nn.BatchNorm1d(5, momentum=momentum, affine=affine))
    ours = copy.deepcopy(theirs)
    own_batch_norms(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(3):
        x = torch.randn(7, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        merge_running_statistics(ours, World())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_module_that_is_used_twice_stays_one() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleList([norm, norm])
    own_batch_norms(model)
    assert model[0] is model[1]
    assert model[0].weight is norm.weight


def part_of(owned: int) -> tuple[Tensor, LocalGraph, Tensor]:
    """The first ``owned`` nodes of the tiny graph with two hops of halo: features, graph, which nodes."""
    tiny = random_graph(6, False, 0)
    part, nodes = tiny.part(torch.arange(owned), hops=2)
    return part.x, replace(part.graph, num_owned=owned), nodes


@pytest.mark.parametrize("name", KINDS)
def test_statistics_are_those_of_owned_rows(name: str) -> None:
    """What lies in the halo may be anything: statistics of owned nodes (of their in-edges in EdgeCNN) do not see it.

    One layer deep, halo rows are the inputs of owned ones and do count; so the last hop is changed under two layers.
    """
    x, graph, nodes = part_of(8)
    assert nodes.numel() > 8
    student = StudentModule(basic(name, norm="batch_norm")).train()
    norms = [module for module in student.modules() if isinstance(module, OwnedBatchNorm1d)]
    assert any(norm.on_edges for norm in norms) == (name == "EdgeCNN")
    seen: dict[nn.Module, Tensor] = {}
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, _out: seen.update({module: inputs[0].detach()}))
    student(x, graph)
    assert len(seen) == len(norms) > 0
    for norm, rows in seen.items():
        count = int(graph.pattern.indptr[8]) if norm.on_edges else 8
        owned = rows[:count].double()
        expected = torch.cat([owned.sum(0), owned.square().sum(0), torch.tensor([count])])
        torch.testing.assert_close(norm.take_pending(), expected)
        assert rows.size(0) > count


@pytest.mark.parametrize("name", KINDS)
def test_on_a_whole_graph_training_is_that_of_pyg(name: str) -> None:
    """The same model in PyG's own forward: loss, gradients and running statistics of three steps."""
    tiny, y = random_graph(6, False, 0), torch.arange(24) % 4
    theirs = basic(name, norm="batch_norm").train()
    ours = StudentModule(copy.deepcopy(theirs)).train()
    first, second = (torch.optim.SGD(model.parameters(), 0.05) for model in (theirs, ours))
    for _ in range(3):
        loss = F.cross_entropy(theirs(tiny.x, tiny.graph.edge_index), y)
        mine = F.cross_entropy(ours(tiny.x, tiny.graph)[0], y)
        torch.testing.assert_close(mine, loss)
        for optimizer, value in ((first, loss), (second, mine)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        merge_running_statistics(ours, World())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("model", [basic("GCN", norm="batch_norm"), NodeNorm()])
def test_running_statistics_move_once_per_step_by_count(model: nn.Module) -> None:
    """Two units of different size are merged as if they were one."""
    student = StudentModule(model).train()
    norm = next(module for module in student.modules() if isinstance(module, OwnedBatchNorm1d))
    before, rows = norm.running_mean.clone(), []
    norm.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].detach()))
    for owned in (3, 10):
        x, graph, _ = part_of(owned)
        student(x, graph)
        assert torch.equal(norm.running_mean, before)
    merge_running_statistics(student, World())
    together = torch.cat([rows[0][:3], rows[1][:10]])
    torch.testing.assert_close(norm.running_mean, 0.1 * together.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * together.var(0))
    assert int(norm.num_batches_tracked) == 1


def test_rows_that_are_neither_nodes_nor_edges_are_refused() -> None:
    class Odd(NodeNorm):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            self.norm(torch.cat([x, x, x[:1]]))
            return self.lin(x)

    x, graph, _ = part_of(8)
    with pytest.raises(ModelError, match=r"norm \(BatchNorm1d\) got \d+ rows in a unit of \d+ nodes .*LayerNorm"):
        StudentModule(Odd()).train()(x, graph)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (basic("GCN", norm="instance_norm"), r"norms.0 \(InstanceNorm\) .*use batch_norm"),
        (nn.Sequential(nn.InstanceNorm1d(3)), r"0 \(InstanceNorm1d\) normalises over all nodes"),
        (nn.Sequential(nn.SyncBatchNorm(3)), r"0 \(SyncBatchNorm\) .*halo included; use torch.nn.BatchNorm1d"),
        (nn.Sequential(ScaledNorm(3)), r"0 \(ScaledNorm\) takes statistics .*use torch.nn.BatchNorm1d itself \(no sub"),
        (nn.BatchNorm1d(3), r"the model \(BatchNorm1d\) takes statistics .* as a part of the model"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), r"0 \(BatchNorm1d\) .*with track_running_stats"),
        (pyg.HeteroBatchNorm(3, 2), r"the model \(HeteroBatchNorm\)"),
    ],
)  # fmt: skip
def test_statistics_over_all_rows_are_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        refuse_untrainable(model)


@pytest.mark.parametrize("model", [basic("GCN", norm="batch_norm"), NodeNorm()])
def test_those_that_are_replaced_are_not_refused(model: nn.Module) -> None:
    for _ in range(2):
        refuse_untrainable(model)
        own_batch_norms(model)


def test_a_loss_about_layers_needs_layers() -> None:
    lsp = LspLoss(kind="lsp")
    refuse_layers_that_are_not_there(Layered(6, 4), [lsp])
    refuse_layers_that_are_not_there(Plain(6, 4), [KdLoss(kind="kd")])
    with pytest.raises(ModelError, match=r"a lsp loss reads layer -2 .*Plain has no layers .*or remove the lsp loss$"):
        refuse_layers_that_are_not_there(Plain(6, 4), [lsp])


# --- batches without nodes -------------------------------------------------------------------


@pytest.mark.parametrize("args", [{}, {"norm": "batch_norm", "dropout": 0.5}, {"jk": "cat"}, {"jk": "lstm"}])
@pytest.mark.parametrize("name", KINDS)
def test_models_of_pyg_run_on_nothing_and_reach_every_parameter(name: str, args: dict[str, object]) -> None:
    student = StudentModule(basic(name, **args)).train()
    check_empty(student.model, EMPTY, 0)
    logits, *_ = student(EMPTY.x, EMPTY.graph)
    (logits.sum() * 0).backward()
    unreached = [name for name, p in student.named_parameters() if p.grad is None]
    assert unreached == []


@pytest.mark.parametrize("model", [Plain(6, 4), Layered(6, 4), NodeNorm()])
def test_user_classes_run_on_nothing(model: nn.Module) -> None:
    state = torch.random.get_rng_state()
    check_empty(StudentModule(model).model, EMPTY, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_cannot_is_refused_with_the_rank() -> None:
    class Peak(Plain):
        def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
            return self.lin(x - x.max())

    class Pooled(Plain):
        def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
            return self.lin(x).sum(0, keepdim=True)

    with pytest.raises(StudentError, match=r"rank 3: Peak cannot run .*RuntimeError: .*make its forward accept x of"):
        check_empty(Peak(6, 4), EMPTY, 3)
    with pytest.raises(StudentError, match=r"it gave \[1, 4\] for no nodes"):
        check_empty(Pooled(6, 4), EMPTY, 0)


def test_dropout_follows_the_seed() -> None:
    student = StudentModule(basic("GAT", dropout=0.5)).train()
    x, graph, _ = part_of(8)
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(run_model(student.model, x, graph)[0])
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])
