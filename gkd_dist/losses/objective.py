"""The objective: the configured terms side by side, as sums and counts.

``objective = Σ_k weight_k · Σ_units sum_k / Σ_units count_k``. Sums and counts here are of one batch;
adding them over units and ranks and dividing once is the caller's part, so that the value does not
depend on how the graph was cut.

Shapes: ``k`` terms; ``n`` nodes of a batch, ``c`` classes or labels, ``d`` channels of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gkd_dist.config import FitnetLoss, KdLoss, LabelLoss, Loss, resolve_layer
from gkd_dist.graph import Batch, Task
from gkd_dist.losses.bounds import named_losses
from gkd_dist.losses.median import NUM_KEYS, median_of_histogram
from gkd_dist.losses.precision import at_least_fp32
from gkd_dist.losses.terms import FitnetTerm, KdTerm, LabelTerm, LspTerm, Output, ScoreKey, Term

INERT = 1e-6  # a gradient this much smaller than that of the labels changes nothing


class Objective:
    """Weighted terms over batches; owns the widths that the student's own medians give.

    Args:
        losses: configured terms; the first of a kind is named after it, others get ``_1``, ``_2``.
        task: multiclass or multilabel.
        teacher_layers: depth of the teacher, which negative layer numbers count from; of several, by name.
        student_layers: depth of the student.
        teacher_medians: median raw score by (positive teacher layer, metric), for ``sigma: median``; of several
            teachers by (layer, metric, name).

    Raises `ConfigError` for options that contradict each other, `DataError` for a median that is
    missing or zero, ValueError for a layer that a model does not have.
    """

    def __init__(
        self,
        losses: Sequence[Loss],
        task: Task,
        teacher_layers: int | Mapping[str, int],
        student_layers: int,
        teacher_medians: Mapping[ScoreKey, float],
    ) -> None:
        self._losses = tuple(losses)
        self._terms: list[Term] = []
        for name, loss in named_losses(self._losses):
            if isinstance(loss, LabelLoss):
                self._terms.append(LabelTerm.of(name, loss, task))
            elif isinstance(loss, KdLoss):
                self._terms.append(KdTerm.of(name, loss, task))
            else:
                depth = teacher_layers if isinstance(teacher_layers, int) else teacher_layers[str(loss.teacher)]
                teacher_layer = resolve_layer(loss.teacher_layer, depth)
                student_layer = resolve_layer(loss.student_layer, student_layers)
                if isinstance(loss, FitnetLoss):
                    self._terms.append(FitnetTerm.of(name, loss, teacher_layer, student_layer))
                else:
                    self._terms.append(LspTerm.of(name, loss, teacher_layer, student_layer, teacher_medians))
        self._warned: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the terms, in order."""
        return [term.name for term in self._terms]

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Positive numbers of the student layers whose output `sums` needs on nodes of the halo too, ascending."""
        return tuple(sorted({term.student_layer for term in self._lsp}))

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What `sums` needs of the student beside its logits: `student_layers`, and projection heads by their terms."""
        return (*self.student_layers, *(term.name for term in self._terms if isinstance(term, FitnetTerm)))

    @property
    def _lsp(self) -> list[LspTerm]:
        return [term for term in self._terms if isinstance(term, LspTerm)]

    @property
    def draws(self) -> bool:
        """Whether a term looks at other nodes in every step."""
        return any(term.fan_out is not None for term in self._lsp)

    def nodes(self, batch: Batch) -> dict[int, Tensor]:
        """Local numbers of the nodes whose output of a layer is read beside the owned ones, by layer."""
        found: dict[int, Tensor] = {}
        for term in self._lsp:
            nodes, known = term.nodes(batch), found.get(term.student_layer)
            found[term.student_layer] = nodes if known is None else torch.cat([known, nodes])
        return found

    def weights(self, epoch: int) -> Tensor:
        """Weight times schedule of each term in ``epoch`` (from 0), float32 [k]."""
        return torch.tensor([loss.weight * loss.schedule.factor(epoch) for loss in self._losses])

    def counts(self, batch: Batch) -> Tensor:
        """Items of each term in this batch, float64 [k]; known before the forward pass."""
        return torch.stack([term.count(batch).double() for term in self._terms])

    def sums(self, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor], epoch: int | None = None) -> Tensor:
        """Differentiable sum of each term over this batch, float32 [k] (float64 for float64 outputs).

        ``logits`` [n, c] and ``layers[l]`` [n, d] are of all nodes of the batch, those beyond the
        owned ones included; what a projection head gives is of the owned ones alone. Every output is
        connected to the result, if only with a zero gradient, also in an empty batch. With ``epoch``
        given, terms whose weight is 0 in it are 0 unseen.
        """
        active = [epoch is None or weight > 0 for weight in self.weights(epoch or 0).tolist()]
        off = at_least_fp32(logits).new_zeros(())
        sums = torch.stack(
            [term.sum(batch, logits, layers) if on else off for term, on in zip(self._terms, active, strict=True)]
        )
        for output in self._unread(active, logits, layers):
            # Only owned rows: the halo may hold anything, and 0 times infinity is not 0.
            sums = sums + at_least_fp32(output[: batch.num_owned]).sum() * 0
        return sums

    def _unread(self, active: Sequence[bool], logits: Tensor, layers: Mapping[Output, Tensor]) -> list[Tensor]:
        """Outputs that no active term reads, whose parameters would get no gradient."""
        terms = [term for term, on in zip(self._terms, active, strict=True) if on]
        read = {output for term in terms for output in term.reads}
        unread = [layers[layer] for layer in layers if layer not in read]
        return unread if any(not term.reads for term in terms) else [logits, *unread]

    @property
    def compiled(self) -> bool:
        """Whether edge scores are a compiled loop; other last bits than without, so to be set once."""
        return any(term.compiled for term in self._lsp)

    @compiled.setter
    def compiled(self, compiled: bool) -> None:
        for term in self._lsp:
            term.compiled = compiled

    # --- widths from the student's own scores -------------------------------------------------

    @property
    def student_sigma(self) -> dict[str, float]:
        """Student-side width of each LSP term that has one already; part of a checkpoint."""
        return {term.name: term.student_sigma for term in self._lsp if term.student_sigma is not None}

    @student_sigma.setter
    def student_sigma(self, sigma: Mapping[str, float]) -> None:
        for term in self._lsp:
            term.student_sigma = sigma.get(term.name, term.student_sigma)

    @property
    def needs_student_median(self) -> list[tuple[str, int, str]]:
        """(term, student layer, metric) of the terms that still wait for a median."""
        return [(term.name, term.student_layer, term.kernel.metric) for term in self._lsp if term.student_sigma is None]

    def student_histograms(self, batch: Batch, layers: Mapping[Output, Tensor]) -> Tensor:
        """Histogram of the student's scores for each entry of `needs_student_median`: int64 [w, 65536].

        To be added over all units and ranks and handed to `set_student_medians`.
        """
        waiting = [term for term in self._lsp if term.student_sigma is None]
        histograms = [term.student_histogram(batch, layers) for term in waiting]
        return torch.stack(histograms) if histograms else torch.zeros(0, NUM_KEYS, dtype=torch.int64)

    def set_student_medians(self, histograms: Tensor) -> None:
        """Fixes the widths that wait, from the summed `student_histograms` int64 [w, 65536].

        Raises `DataError` where there are no scores or their median is 0.
        """
        waiting = [term for term in self._lsp if term.student_sigma is None]
        for term, histogram in zip(waiting, histograms, strict=True):
            term.student_sigma = term.kernel.sigma_from_median(median_of_histogram(histogram))

    # --- terms that do nothing -----------------------------------------------------------------

    def check_inert(self, term_grad_norms: Mapping[str, float]) -> list[str]:
        """A message for each distillation term whose gradient is lost beside that of the labels.

        Where there are no labels the largest other gradient stands in for theirs. ``term_grad_norms``: norm of each
        term's gradient by its name, terms that are off left out.
        Each term is named once in the life of this objective.
        """
        terms = {term.name: term for term in self._terms}
        labels = {name: norm for name, norm in term_grad_norms.items() if isinstance(terms[name], LabelTerm)}
        norms = labels or term_grad_norms
        largest = max(norms, key=lambda name: norms[name], default="")
        messages = []
        for name, norm in term_grad_norms.items():
            if isinstance(terms[name], LabelTerm) or name in self._warned or not norm < INERT * norms[largest]:
                continue
            self._warned.add(name)
            advice = _LSP_ADVICE if isinstance(terms[name], LspTerm) else "raise its weight or remove it"
            messages.append(
                f"loss {name} is inert: its gradient norm {norm:.3g} is below {INERT:g} of that of {largest}, "
                f"{norms[largest]:.3g}; {advice}"
            )
        return messages


_LSP_ADVICE = "set sigma: median, outer_softmax: false or kernel: cosine with a temperature, or remove it"
