"""The objective over batches: sums and counts that do not know how the graph was cut.

The graph of these tests has 12 nodes: a ring of eight with chords and a self-loop, two leaves that
hang on it, and two nodes without edges.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from gkd_dist.config import Loss
from gkd_dist.errors import ConfigError, DataError, StudentError
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.losses import Objective, edge_scores, kd_loss, lsp_loss
from gkd_dist.sparse import CsrPattern, indptr_from_counts

NUM_NODES, NUM_CLASSES, WIDTH = 12, 3, 4
RING = [(i, (i + 1) % 8) for i in range(8)]
PAIRS = [*RING, *((b, a) for a, b in RING), (0, 4), (4, 0), (2, 6), (8, 1), (1, 8), (9, 1), (3, 3)]
EDGES = torch.tensor(sorted(PAIRS, key=lambda p: (p[1], p[0]))).T
NAN = float("nan")
ALL_TERMS = [
    {"kind": "label"},
    {"kind": "kd", "weight": 2.0, "temperature": 2.0},
    {"kind": "lsp", "sigma": 1.0, "outer_softmax": False},
    {"kind": "lsp", "kernel": "cosine", "temperature": 0.5, "reduction": "edges", "direction": "teacher||student"},
    {"kind": "lsp", "kernel": "laplacian", "sigma": 2.0, "self_loops": True, "teacher_layer": 2, "student_layer": 2},
    {"kind": "kd", "nodes": "train"},
    {"kind": "kd", "nodes": "unlabelled"},
]


def losses(*terms: dict[str, Any]) -> list[Loss]:
    return [TypeAdapter(Loss).validate_python(term) for term in terms]


def objective(
    *terms: dict[str, Any], task: str = "multiclass", medians: dict[tuple[int, str], float] | None = None
) -> Objective:
    return Objective(losses(*terms), task, teacher_layers=3, student_layers=2, teacher_medians=medians or {})  # type: ignore[arg-type]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGITS, TEACHER_LOGITS = randn(NUM_NODES, NUM_CLASSES, seed=0), randn(NUM_NODES, NUM_CLASSES, seed=1)
HIDDEN, TEACHER_Z = {1: randn(NUM_NODES, WIDTH, seed=2), 2: LOGITS}, randn(NUM_NODES, 7, seed=3)
MULTICLASS_Y = torch.tensor([0, 1, 2, 0, 1, -1, 0, 1, 2, 0, 1, 2])
MULTILABEL_Y = torch.where(MULTICLASS_Y[:, None] < 0, NAN, (randn(NUM_NODES, NUM_CLASSES, seed=4) > 0).double()).float()
TRAIN = torch.arange(NUM_NODES) % 2 == 0
TRAIN[5] = True  # without a label


def part(owned: list[int], task: str = "multiclass") -> tuple[Batch, Tensor]:
    """The batch of ``owned`` with its one-hop halo, and the global ids of its nodes."""
    mine = torch.isin(EDGES[1], torch.tensor(owned, dtype=torch.int64))
    halo = sorted(set(EDGES[0][mine].tolist()) - set(owned))
    n_id = torch.tensor(owned + halo, dtype=torch.int64)
    local = torch.full((NUM_NODES,), -1)
    local[n_id] = torch.arange(n_id.numel())
    source, target = local[EDGES[:, mine]]
    order = torch.argsort(target, stable=True)
    counts = torch.bincount(target, minlength=n_id.numel())
    pattern = CsrPattern.from_csr(indptr_from_counts(counts), source[order])
    inner = torch.tensor(owned, dtype=torch.int64)
    scores = {
        (layer, metric): edge_scores(TEACHER_Z, EDGES, metric)[mine][order]  # type: ignore[arg-type]
        for layer, metric in ((2, "sqeuclidean"), (2, "cosine"), (2, "manhattan"))
    }
    batch = Batch(
        unit=0,
        graph=LocalGraph(pattern, torch.bincount(EDGES[1], minlength=NUM_NODES)[n_id].float(), n_id == 3),
        x=torch.zeros(n_id.numel(), 1),
        y=(MULTICLASS_Y if task == "multiclass" else MULTILABEL_Y)[inner],
        train_mask=TRAIN[inner],
        val_mask=~TRAIN[inner],
        test_mask=~TRAIN[inner],
        n_id=n_id,
        num_owned=len(owned),
        teacher_logits=TEACHER_LOGITS[inner],
        teacher_scores=scores,
    )
    return batch, n_id


def evaluate(goal: Objective, cut: list[list[int]], task: str = "multiclass") -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sums, counts and the gradients of the sums' total with respect to both outputs, over all parts."""
    logits, hidden = LOGITS.clone().requires_grad_(), HIDDEN[1].clone().requires_grad_()
    sums, counts = 0, 0
    for owned in cut:
        batch, n_id = part(owned, task)
        sums = sums + goal.sums(batch, logits[n_id], {1: hidden[n_id], 2: logits[n_id]})
        counts = counts + goal.counts(batch)
    assert isinstance(sums, Tensor)
    assert isinstance(counts, Tensor)
    weights = torch.arange(1.0, len(sums) + 1, dtype=torch.float64)
    return sums.detach(), counts, list(torch.autograd.grad((sums * weights).sum(), [logits, hidden]))


WHOLE = [list(range(NUM_NODES))]


# --- one part ---------------------------------------------------------------------------------


def test_means_are_those_of_the_public_functions() -> None:
    sums, counts, _ = evaluate(objective(*ALL_TERMS), WHOLE)
    means = sums / counts
    labelled = TRAIN & (MULTICLASS_Y >= 0)
    expected = [
        torch.nn.functional.cross_entropy(LOGITS[labelled], MULTICLASS_Y[labelled]),
        kd_loss(LOGITS, TEACHER_LOGITS, temperature=2.0),
        lsp_loss(HIDDEN[1], EDGES, teacher_z=TEACHER_Z, sigma=1.0, outer_softmax=False),
        lsp_loss(
            HIDDEN[1],
            EDGES,
            teacher_z=TEACHER_Z,
            kernel="cosine",
            temperature=0.5,
            reduction="edges",
            direction="teacher||student",
        ),
        lsp_loss(LOGITS, EDGES, teacher_z=TEACHER_Z, kernel="laplacian", sigma=2.0, self_loops=True),
        kd_loss(LOGITS, TEACHER_LOGITS, selected=TRAIN),
        kd_loss(LOGITS, TEACHER_LOGITS, selected=~TRAIN),
    ]
    torch.testing.assert_close(means, torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_counts_by_hand() -> None:
    batch, _ = part(WHOLE[0])
    # 7 training nodes of which 5 has no label; 12 owned nodes; nodes 0..8 have a neighbour, 9..11 have
    # none; 23 edges of which one is a loop.
    assert EDGES.size(1) == 23
    assert objective(*ALL_TERMS).counts(batch).tolist() == [6, 12, 9, 22, 9, 7, 5]
    assert objective(*ALL_TERMS).counts(batch).dtype == torch.float64


def test_half_precision_outputs_are_summed_in_fp32() -> None:
    batch, _ = part(WHOLE[0])
    assert batch.teacher_logits is not None
    scores = {key: value.float() for key, value in batch.teacher_scores.items()}
    batch = replace(batch, teacher_logits=batch.teacher_logits.float(), teacher_scores=scores)
    halves = {layer: output.bfloat16() for layer, output in HIDDEN.items()}
    sums = objective(*ALL_TERMS).sums(batch, LOGITS.bfloat16(), halves)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), evaluate(objective(*ALL_TERMS), WHOLE)[0], rtol=0.02, atol=0.02)


def test_names_layers_and_weights() -> None:
    goal = objective(*ALL_TERMS[:5], {"kind": "lsp", "sigma": 1.0, "schedule": {"start": 2, "stop": 4}, "weight": 9.0})
    assert goal.names == ["label", "kd", "lsp", "lsp_1", "lsp_2", "lsp_3"]
    assert goal.student_layers == (1, 2)
    assert goal.weights(0).tolist() == [1, 2, 1, 1, 1, 0]
    assert goal.weights(2).tolist() == [1, 2, 1, 1, 1, 9]
    assert objective({"kind": "label"}).student_layers == ()


# --- many parts ---------------------------------------------------------------------------------

CUTS = {
    "halves": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
    "uneven, one without labels, one without edges, one empty": [[0], [2, 3, 4, 5, 6, 7, 8], [1, 9], [10, 11], []],
    "scattered": [[0, 5, 10], [1, 6, 11], [2, 7], [3, 8], [4, 9]],
    "nodes alone": [[i] for i in range(NUM_NODES)],
}


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("cut", list(CUTS))
def test_sums_counts_and_gradients_do_not_depend_on_the_cut(cut: str, task: str) -> None:
    goal = objective(*ALL_TERMS, task=task)
    sums, counts, grads = evaluate(goal, CUTS[cut], task)
    whole_sums, whole_counts, whole_grads = evaluate(goal, WHOLE, task)
    assert counts.tolist() == whole_counts.tolist()
    torch.testing.assert_close(sums, whole_sums, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


# --- empty batches, terms that are off ---------------------------------------------------------------


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_an_empty_batch_gives_every_parameter_a_zero_gradient(task: str) -> None:
    batch, _ = part([], task)
    first, last = torch.nn.Linear(5, WIDTH), torch.nn.Linear(WIDTH, NUM_CLASSES)
    for terms in (ALL_TERMS, ALL_TERMS[:1], ALL_TERMS[2:3]):  # all, label alone, LSP alone
        goal = objective(*terms, task=task)
        first.zero_grad()
        last.zero_grad()
        hidden = first(torch.zeros(0, 5))
        logits = last(hidden)
        sums = goal.sums(batch, logits, {1: hidden, 2: logits})
        assert sums.tolist() == [0.0] * len(terms)
        sums.sum().backward()
        for parameter in (*first.parameters(), *last.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() == 0
        assert goal.counts(batch).tolist() == [0.0] * len(terms)


def test_lsp_alone_still_gives_the_last_layer_a_gradient() -> None:
    batch, n_id = part([0, 1, 2])
    logits = LOGITS[n_id].clone().requires_grad_()
    with torch.no_grad():
        logits[-1] = float("inf")  # a halo row may hold anything
    goal = objective(ALL_TERMS[2])
    sums = goal.sums(batch, logits, {1: HIDDEN[1][n_id]})
    assert torch.isfinite(sums).all()
    (grad,) = torch.autograd.grad(sums.sum(), logits)
    assert grad.abs().sum() == 0


def test_terms_that_are_off_in_an_epoch_are_zero_and_unseen() -> None:
    batch, n_id = part([0, 1, 2])
    goal = objective({"kind": "label"}, {"kind": "lsp", "sigma": 1.0, "schedule": {"stop": 30}})
    hidden = HIDDEN[1][n_id].clone().requires_grad_()
    on = goal.sums(batch, LOGITS[n_id], {1: hidden}, epoch=29)
    off = goal.sums(batch, LOGITS[n_id], {1: hidden}, epoch=30)
    assert on[0] == off[0]
    assert on[1] > 0
    assert off[1] == 0
    (grad,) = torch.autograd.grad(off.sum(), hidden)
    assert grad.abs().sum() == 0


# --- widths from medians ---------------------------------------------------------------------------

BY_MEDIAN = {"kind": "lsp", "sigma": "median", "outer_softmax": False}


def test_student_medians_are_those_of_the_whole_graph_whatever_the_cut() -> None:
    sigma = []
    for cut in (WHOLE, *CUTS.values()):
        goal = objective(
            BY_MEDIAN, {**BY_MEDIAN, "kernel": "laplacian"}, medians={(2, "sqeuclidean"): 3.0, (2, "manhattan"): 3.0}
        )
        assert goal.needs_student_median == [("lsp", 1, "sqeuclidean"), ("lsp_1", 1, "manhattan")]
        batches = [part(owned) for owned in cut]
        goal.set_student_medians(sum(goal.student_histograms(b, {1: HIDDEN[1][n_id]}) for b, n_id in batches))  # type: ignore[arg-type]
        assert goal.needs_student_median == []
        sigma.append(goal.student_sigma)
    assert all(each == sigma[0] for each in sigma)
    no_loops = EDGES[:, EDGES[0] != EDGES[1]]
    median = edge_scores(HIDDEN[1], no_loops).float().bfloat16().float().median().item()
    assert sigma[0]["lsp"] == median / 2


def test_loss_with_medians_equals_the_public_function() -> None:
    scores = edge_scores(TEACHER_Z, EDGES[:, EDGES[0] != EDGES[1]])
    goal = objective(BY_MEDIAN, medians={(2, "sqeuclidean"): scores.bfloat16().float().median().item()})
    batch, _ = part(WHOLE[0])
    with pytest.raises(StudentError, match="median of the student's scores, which is not known yet"):
        goal.sums(batch, LOGITS, HIDDEN)
    goal.set_student_medians(goal.student_histograms(batch, HIDDEN))
    mean = goal.sums(batch, LOGITS, HIDDEN) / goal.counts(batch)
    expected = lsp_loss(HIDDEN[1], EDGES, teacher_z=TEACHER_Z, sigma="median", outer_softmax=False)
    torch.testing.assert_close(mean[0], expected, rtol=1e-12, atol=0)


def test_widths_survive_a_checkpoint() -> None:
    medians = {(2, "sqeuclidean"): 3.0}
    first, again = objective(BY_MEDIAN, medians=medians), objective(BY_MEDIAN, medians=medians)
    batch, _ = part(WHOLE[0])
    first.set_student_medians(first.student_histograms(batch, HIDDEN))
    again.student_sigma = first.student_sigma
    assert again.needs_student_median == []
    assert torch.equal(first.sums(batch, LOGITS, HIDDEN), again.sums(batch, LOGITS, HIDDEN))


def test_fixed_widths_need_no_medians() -> None:
    goal = objective({"kind": "lsp", "sigma": 2.5}, {"kind": "label"})
    assert goal.needs_student_median == []
    assert goal.student_sigma == {"lsp": 2.5}
    assert goal.student_histograms(part([0])[0], HIDDEN).shape == (0, 1 << 16)


# --- inert terms --------------------------------------------------------------------------------------


def test_a_term_without_effect_is_named_once() -> None:
    """RBF with sigma 1 on 136 features of unit variance, self-loops kept: the self edge takes it all."""
    z = randn(NUM_NODES, 136, seed=5).float().requires_grad_()
    looped = torch.cat([EDGES, torch.arange(NUM_NODES).repeat(2, 1)], 1).unique(dim=1)
    graph = LocalGraph.from_edge_index(looped, NUM_NODES)
    whole, _ = part(WHOLE[0])
    teacher = edge_scores(randn(NUM_NODES, 136, seed=6), graph.edge_index)
    batch = replace(whole, graph=graph, teacher_scores={(2, "sqeuclidean"): teacher})
    logits = z @ randn(136, NUM_CLASSES, seed=7).float()
    goal = objective(
        {"kind": "label"}, {"kind": "lsp", "sigma": 1.0, "self_loops": True}, {"kind": "lsp", "sigma": 100.0}
    )
    sums = goal.sums(batch, logits, {1: z})
    norms = {
        name: torch.autograd.grad(value, z, retain_graph=True)[0].norm().item()
        for name, value in zip(goal.names, sums, strict=True)
    }
    (message,) = goal.check_inert(norms)
    assert message.startswith("loss lsp is inert: its gradient norm")
    assert "sigma: median" in message
    assert goal.check_inert(norms) == []


def test_inertness_is_relative_to_the_labels() -> None:
    terms = ({"kind": "label"}, {"kind": "kd"}, {"kind": "lsp", "sigma": 1.0})
    assert objective(*terms).check_inert({"label": 1.0, "kd": 1e-5, "lsp": 2e-6}) == []
    assert len(objective(*terms).check_inert({"label": 1.0, "kd": 0.0, "lsp": 9e-7})) == 2
    assert objective(*terms).check_inert({"kd": 0.0}) == []  # nothing to compare with
    assert objective(*terms).check_inert({}) == []
    assert objective(*terms).check_inert({"label": 0.0, "kd": 0.0}) == []


def test_without_labels_the_largest_other_term_is_the_measure() -> None:
    goal = objective({"kind": "kd"}, {"kind": "lsp", "sigma": 1.0})
    (message,) = goal.check_inert({"kd": 2.0, "lsp": 1e-6})
    assert "loss lsp is inert: its gradient norm 1e-06 is below 1e-06 of that of kd, 2; set sigma" in message
    assert objective({"kind": "kd"}, {"kind": "lsp", "sigma": 1.0}).check_inert({"kd": 2.0, "lsp": 1e-5}) == []


# --- faults -------------------------------------------------------------------------------------------


def test_missing_knowledge_is_named() -> None:
    batch, _ = part(WHOLE[0])
    poor = replace(batch, teacher_logits=None, teacher_scores={})
    with pytest.raises(DataError, match="loss kd needs teacher logits, but unit 0 has none"):
        objective({"kind": "kd"}).sums(poor, LOGITS, {})
    with pytest.raises(DataError, match="loss lsp needs sqeuclidean scores of teacher layer 2, but unit 0 has none"):
        objective({"kind": "lsp"}).sums(poor, LOGITS, HIDDEN)
    with pytest.raises(DataError, match=r"teacher logits of unit 0 are \[12, 3\], expected \[12, 5\]"):
        objective({"kind": "kd"}).sums(batch, torch.zeros(12, 5), {})
    short = replace(batch, teacher_scores={(2, "sqeuclidean"): torch.zeros(4)})
    with pytest.raises(DataError, match="unit 0 has 4 teacher scores for 23 in-edges"):
        objective({"kind": "lsp"}).sums(short, LOGITS, HIDDEN)
    with pytest.raises(DataError, match="no median of the sqeuclidean scores of teacher layer 2"):
        objective(BY_MEDIAN)
    with pytest.raises(ConfigError, match="kernel linear with outer_softmax: true has no width"):
        objective({"kind": "lsp", "kernel": "linear", "sigma": "median"})
