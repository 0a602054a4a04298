"""The k largest logits of each node, and what the other classes weigh together.

The probability of the k classes, and of all others as one, is exact at each temperature that the log
of the others' sum was taken at.

Shapes: ``o`` nodes; ``k`` kept classes of ``c``; ``t`` temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd_dist.errors import DataError

_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class TopK:
    """Logits in brief; where a batch has logits [o, c], it may have these.

    ``values`` float32 [o, k] in descending order; ``index`` int16, int32 or int64 [o, k], their
    classes; ``tail`` float32 [o, t], log Σ exp(z / T) over the other classes for each T of
    ``temperatures``.
    """

    values: Tensor
    index: Tensor
    tail: Tensor
    temperatures: tuple[float, ...]
    num_classes: int

    @property
    def num_nodes(self) -> int:
        """o."""
        return self.values.size(0)

    def tail_at(self, temperature: float) -> Tensor:
        """Log-sum-exp of the other classes at ``temperature``, [o]; `DataError` for one that is not there."""
        if temperature not in self.temperatures:
            known = ", ".join(f"{value:g}" for value in self.temperatures) or "none"
            raise DataError(
                f"the teacher's top-{self.values.size(1)} logits have no tail at temperature {temperature:g} "
                f"(they have {known}); run `gkd infer` with the losses of this run"
            )
        return self.tail[:, self.temperatures.index(temperature)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopK:
        """The same on ``device``."""
        move = lambda t: t.to(device, non_blocking=non_blocking)  # noqa: E731
        return replace(self, values=move(self.values), index=move(self.index), tail=move(self.tail))

    def pin_memory(self) -> TopK:
        """The same in page-locked memory."""
        return replace(
            self, values=self.values.pin_memory(), index=self.index.pin_memory(), tail=self.tail.pin_memory()
        )


def top_k(logits: Tensor, k: int, temperatures: Sequence[float]) -> TopK:
    """The k largest of ``logits`` float [o, c] for 0 < k < c; of equal ones those of smaller class."""
    num_nodes, num_classes = logits.shape
    if not 0 < k < num_classes:
        raise ValueError(f"k must be between 1 and {num_classes - 1} (got {k})")
    index_type = torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32
    values, index = torch.empty(num_nodes, k), torch.empty(num_nodes, k, dtype=index_type)
    tail = torch.empty(num_nodes, len(temperatures))
    for start in range(0, num_nodes, max(1, _CHUNK_VALUES // num_classes)):
        rows = slice(start, start + max(1, _CHUNK_VALUES // num_classes))
        ordered, classes = logits[rows].sort(dim=1, descending=True, stable=True)
        values[rows], index[rows] = ordered[:, :k], classes[:, :k].to(index_type)
        for column, temperature in enumerate(temperatures):
            tail[rows, column] = (ordered[:, k:].double() / temperature).logsumexp(1).float()
    return TopK(values, index, tail, tuple(temperatures), num_classes)


def concatenate(blocks: Sequence[Tensor | TopK]) -> Tensor | TopK:
    """Logits of several parts as those of one; all are of one kind."""
    if isinstance(blocks[0], Tensor):
        return torch.cat([block for block in blocks if isinstance(block, Tensor)])
    briefs = [block for block in blocks if isinstance(block, TopK)]
    return replace(
        briefs[0],
        values=torch.cat([brief.values for brief in briefs]),
        index=torch.cat([brief.index for brief in briefs]),
        tail=torch.cat([brief.tail for brief in briefs]),
    )
