"""`RawGraph`: what a source delivers before anything about it is checked.

Shapes: ``N`` nodes, ``E`` directed edges, ``f`` features of a node, ``a`` of an edge, ``c`` binary labels,
``k`` alternative splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RawGraph:
    """Tensors as they were read, of any number type, with nothing promised about their content.

    Meant to be: ``x`` [N, f]; ``edge_index`` [2, E], row 0 source; ``y`` [N] or [N, 1] (classes) or
    [N, c] (binary labels); ``masks`` from split name (``train``, ``val``, ``test``) to [N] or
    [N, k]; ``edge_weight`` [E]; ``edge_attr`` [E] or [E, a]. ``name`` is what messages call the graph.
    """

    name: str
    x: Tensor
    edge_index: Tensor
    y: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    edge_weight: Tensor | None = None
    edge_attr: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        """N, by the rows of ``x``."""
        return self.x.size(0)
