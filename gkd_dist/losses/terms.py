"""The terms of an objective: each counts its items in a batch and sums its loss over them.

A sum over owned nodes (or their in-edges) is *separable*: over all parts it is that of the whole
graph, and the caller divides it once by the count of the whole graph.

Shapes: ``n`` nodes of the batch, the first ``num_owned`` of them owned; ``c`` classes or labels; ``d``
channels of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gkd_dist.config import FitnetLoss, KdLoss, LabelLoss, LspLoss
from gkd_dist.errors import DataError, StudentError
from gkd_dist.graph import Batch, Task
from gkd_dist.losses.fitnet import fitnet_sum
from gkd_dist.losses.kd import kd_sum
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.label import label_sum, labelled
from gkd_dist.losses.lsp import Direction, Reduction, lsp_sum, neighbour_histogram
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.losses.scores import pattern_scores
from gkd_dist.topk import TopK

ScoreKey = tuple[int, str] | tuple[int, str, str]
Output = int | str  # of a student: a layer (from 1), or what the projection head of a term gives


def score_key(layer: int, metric: str, teacher: str | None) -> ScoreKey:
    """What the scores of a teacher's layer are found under; ``teacher`` None where there is one alone."""
    return (layer, metric) if teacher is None else (layer, metric, teacher)


class Term(Protocol):
    """One term: local count and local differentiable sum."""

    @property
    def name(self) -> str:
        """Unique among the terms of an objective."""

    def count(self, batch: Batch) -> Tensor:
        """Items of this batch, a scalar; known before the forward pass."""

    @property
    def reads(self) -> tuple[Output, ...]:
        """What it reads of the student beside or in place of the logits; empty: the logits."""

    def sum(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor]) -> Tensor:
        """Loss summed over the items: ``logits`` [n, c], ``layers`` [n, d] each, to a scalar."""


@dataclass(frozen=True)
class LabelTerm:
    """Cross-entropy on labelled training nodes."""

    name: str
    task: Task

    @classmethod
    def of(cls, name: str, config: LabelLoss, task: Task) -> LabelTerm:
        """From its configuration."""
        return cls(name, task)

    @property
    def reads(self) -> tuple[Output, ...]:
        """The logits."""
        return ()

    def count(self, batch: Batch) -> Tensor:
        """Labelled training nodes."""
        return labelled(batch.y, batch.train_mask, self.task).sum()

    def sum(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor]) -> Tensor:
        """Cross-entropy summed over them."""
        return label_sum(logits[: batch.num_owned], batch.y, batch.train_mask, self.task)


@dataclass(frozen=True)
class KdTerm:
    """Soft-label distillation on owned nodes: all of them, the training ones, or all others."""

    name: str
    task: Task
    temperature: float
    nodes: Literal["all", "train", "unlabelled"]
    teacher: str | None = None  # None: the only one, or the mean of all

    @classmethod
    def of(cls, name: str, config: KdLoss, task: Task) -> KdTerm:
        """From its configuration."""
        return cls(name, task, config.temperature, config.nodes, config.teacher)

    @property
    def reads(self) -> tuple[Output, ...]:
        """The logits."""
        return ()

    def _selected(self, batch: Batch) -> Tensor | None:
        if self.nodes == "all":
            return None
        return batch.train_mask if self.nodes == "train" else ~batch.train_mask

    def count(self, batch: Batch) -> Tensor:
        """Selected nodes."""
        selected = self._selected(batch)
        return torch.tensor(batch.num_owned, device=batch.x.device) if selected is None else selected.sum()

    def sum(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor]) -> Tensor:
        """Divergence summed over them."""
        teacher = batch.teacher_logits if self.teacher is None else batch.logits_of.get(self.teacher)
        if teacher is None:
            raise DataError(f"loss {self.name} needs teacher logits, but unit {batch.unit} has none; run `gkd infer`")
        shape = [teacher.num_nodes, teacher.num_classes] if isinstance(teacher, TopK) else list(teacher.shape)
        if shape != [batch.num_owned, logits.size(1)]:
            raise DataError(
                f"loss {self.name}: teacher logits of unit {batch.unit} are {shape}, "
                f"expected {[batch.num_owned, logits.size(1)]}; teacher and student need the same classes"
            )
        return kd_sum(logits[: batch.num_owned], teacher, self._selected(batch), self.temperature, self.task)


@dataclass
class LspTerm:
    """Local structure preserving loss between one teacher layer and one student layer.

    ``teacher_layer`` and ``student_layer`` are positive numbers. ``student_sigma`` is None while it
    waits for the median of the student's scores. ``teacher`` names one of several. ``compiled``: see
    `gkd_dist.losses.fused`.
    """

    name: str
    kernel: Kernel
    direction: Direction
    reduction: Reduction
    self_loops: bool
    teacher_layer: int
    student_layer: int
    teacher_sigma: float
    student_sigma: float | None
    teacher: str | None = None
    compiled: bool = False
    fan_out: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        config: LspLoss,
        teacher_layer: int,
        student_layer: int,
        teacher_medians: Mapping[ScoreKey, float],
    ) -> LspTerm:
        """From its configuration, layers as positive numbers; raises `ConfigError` or `DataError` for its sigma."""
        kernel = Kernel(config.kernel, config.outer_softmax, config.c, config.degree, config.temperature)
        teacher_sigma = config.sigma if config.teacher_sigma is None else config.teacher_sigma
        kernel.check_sigma(config.sigma)
        kernel.check_sigma(teacher_sigma)
        if isinstance(teacher_sigma, str):
            key = score_key(teacher_layer, kernel.metric, config.teacher)
            if key not in teacher_medians:
                raise DataError(
                    f"loss {name}: the knowledge store has no median of the {kernel.metric} scores of teacher layer "
                    f"{teacher_layer}; run `gkd infer` with this configuration or give teacher_sigma a number"
                )
            teacher_sigma = kernel.sigma_from_median(teacher_medians[key])
        return cls(
            name,
            kernel,
            config.direction,
            config.reduction,
            config.self_loops,
            teacher_layer,
            student_layer,
            teacher_sigma,
            None if isinstance(config.sigma, str) else config.sigma,
            config.teacher,
            fan_out=config.fan_out,
        )

    @property
    def reads(self) -> tuple[Output, ...]:
        """Its layer, of owned nodes and of their in-neighbours."""
        return (self.student_layer,)

    def neighbours(self, batch: Batch) -> Neighbours:
        """In-edges of owned nodes that the term looks at; in a training step at most ``fan_out`` of each node."""
        graph, k = batch.graph, self.fan_out
        found = Neighbours.of_graph(graph, batch.num_owned, self_loops=self.self_loops)
        if k is None or graph.noise is None:
            return found
        above = self.student_layer + 1  # the layer that would read the same rows of the same neighbours
        return graph.drawn(f"{above} {k} {self.self_loops}", lambda: found.sampled(graph, above, k))

    def nodes(self, batch: Batch) -> Tensor:
        """Nodes whose output it reads beside the owned ones, int64."""
        return self.neighbours(batch).pattern.indices

    def count(self, batch: Batch) -> Tensor:
        """Owned nodes with a neighbour, or their edges."""
        neighbours = self.neighbours(batch)
        count = neighbours.num_nodes if self.reduction == "nodes" else neighbours.num_edges
        return torch.tensor(count, device=batch.x.device)

    def sum(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor]) -> Tensor:
        """Divergence summed over owned nodes."""
        if self.student_sigma is None:
            raise StudentError(
                f"loss {self.name}: sigma is the median of the student's scores, which is not known yet; "
                "call Objective.set_student_medians first"
            )
        neighbours = self.neighbours(batch)
        student = self._student_scores(layers, neighbours)
        teacher = self._teacher_scores(batch).index_select(0, neighbours.picked)
        return lsp_sum(
            self.kernel.logits(student, self.student_sigma),
            self.kernel.logits(teacher, self.teacher_sigma),
            neighbours,
            self.direction,
        )

    def student_histogram(self, batch: Batch, layers: Mapping[Output, Tensor]) -> Tensor:
        """Histogram of the student's scores in this batch, int64 [65536]."""
        neighbours = self.neighbours(batch)
        with torch.no_grad():
            return neighbour_histogram(self._student_scores(layers, neighbours), neighbours)

    def _student_scores(self, layers: Mapping[Output, Tensor], neighbours: Neighbours) -> Tensor:
        z = layers[self.student_layer]
        pattern, metric = neighbours.pattern, self.kernel.metric
        return pattern_scores(z, pattern, metric, rows=neighbours.rows, compiled=self.compiled)

    def _teacher_scores(self, batch: Batch) -> Tensor:
        scores = batch.teacher_scores.get(score_key(self.teacher_layer, self.kernel.metric, self.teacher))
        if scores is None:
            raise DataError(
                f"loss {self.name} needs {self.kernel.metric} scores of teacher layer {self.teacher_layer}, "
                f"but unit {batch.unit} has none; run `gkd infer`"
            )
        if scores.numel() != batch.num_owned_edges:
            raise DataError(
                f"loss {self.name}: unit {batch.unit} has {scores.numel()} teacher scores for "
                f"{batch.num_owned_edges} in-edges of owned nodes; run `gkd infer` again"
            )
        return scores


@dataclass(frozen=True)
class FitnetTerm:
    """Mean squared error between a student layer, projected to the teacher's width, and a teacher layer.

    Layers are positive numbers. The head that projects has the name of the term. ``teacher`` names one of several.
    """

    name: str
    teacher_layer: int
    student_layer: int
    normalize: bool
    teacher: str | None = None

    @classmethod
    def of(cls, name: str, config: FitnetLoss, teacher_layer: int, student_layer: int) -> FitnetTerm:
        """From its configuration, layers as positive numbers."""
        return cls(name, teacher_layer, student_layer, config.normalize, config.teacher)

    @property
    def reads(self) -> tuple[Output, ...]:
        """What its head gives, of owned nodes."""
        return (self.name,)

    def count(self, batch: Batch) -> Tensor:
        """Owned nodes."""
        return torch.tensor(batch.num_owned, device=batch.x.device)

    def sum(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor]) -> Tensor:
        """Mean squared errors summed over owned nodes; ``layers`` has the output [num_owned, d] of the head."""
        teacher = batch.teacher_embeddings.get((self.teacher_layer, self.teacher))
        if teacher is None:
            raise DataError(
                f"loss {self.name} needs embeddings of teacher layer {self.teacher_layer}, but unit {batch.unit} has "
                "none; run `gkd infer`"
            )
        projected = layers[self.name]
        if projected.shape != teacher.shape:
            raise DataError(
                f"loss {self.name}: the student's projected layer of unit {batch.unit} is {list(projected.shape)}, "
                f"the teacher's {list(teacher.shape)}; set projection to auto"
            )
        return fitnet_sum(projected, teacher, self.normalize)
