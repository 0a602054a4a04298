"""Batches in page-locked memory, from which a copy to a CUDA device need not block."""

from __future__ import annotations

from dataclasses import replace

from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.sparse import CsrPattern


def pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory, from which a copy to the device need not block."""
    logits = batch.teacher_logits
    return replace(
        batch,
        graph=_pinned_graph(batch.graph),
        x=batch.x.pin_memory(),
        y=batch.y.pin_memory(),
        train_mask=batch.train_mask.pin_memory(),
        val_mask=batch.val_mask.pin_memory(),
        test_mask=batch.test_mask.pin_memory(),
        n_id=batch.n_id.pin_memory(),
        teacher_logits=None if logits is None else logits.pin_memory(),
        teacher_scores={key: scores.pin_memory() for key, scores in batch.teacher_scores.items()},
        logits_of={name: values.pin_memory() for name, values in batch.logits_of.items()},
        teacher_embeddings={key: values.pin_memory() for key, values in batch.teacher_embeddings.items()},
    )


def _pinned_graph(graph: LocalGraph) -> LocalGraph:
    pattern, weight, attr = graph.pattern, graph.edge_weight, graph.edge_attr
    structure = (pattern.indptr, pattern.indices, pattern.t_indptr, pattern.t_indices, pattern.t_perm)
    return LocalGraph(
        CsrPattern(*(tensor.pin_memory() for tensor in structure)),
        graph.in_degree.pin_memory(),
        graph.has_self_loop.pin_memory(),
        None if weight is None else weight.pin_memory(),
        graph.num_owned,
        None if attr is None else attr.pin_memory(),
        None if graph.n_id is None else graph.n_id.pin_memory(),
    )
