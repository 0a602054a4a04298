"""What several teachers know about one part: the mean of their logits, and the scores of each.

Scores keep the name of their teacher, because depths and widths differ: a structure loss is taken against
every teacher, and the mean of those losses is the term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkd_dist.errors import ManifestError
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import EmbeddingKey, KnowledgeStore, ScoreKey, Wants
from gkd_dist.topk import TopK

Stored = tuple[Storage, Manifest]


class Taught(NamedTuple):
    """Of one part: logits float32 [o, c] of the teacher or the mean of all, and what single teachers know.

    Scores float32 [m] each, embeddings float32 [o, d] each, logits by teacher.
    """

    logits: Tensor | TopK | None
    scores: dict[ScoreKey, Tensor]
    logits_of: dict[str, Tensor | TopK]
    embeddings: dict[EmbeddingKey, Tensor]


@dataclass(frozen=True)
class Ensemble:
    """Finished knowledge stores by the name of their teacher, all about one graph; picklable."""

    stores: Mapping[str, Stored]

    @property
    def has_mean(self) -> bool:
        """Whether all logits of every teacher are stored: the largest alone have no mean."""
        return not any(manifest.meta.get("topk") for _, manifest in self.stores.values())

    @property
    def url(self) -> str:
        """Where they are."""
        return ", ".join(storage.url for storage, _ in self.stores.values())

    def check(self, graph: Manifest, wants: Wants) -> None:
        """Raises `ManifestError` unless all stores are about ``graph`` and hold what is wanted of them."""
        for name, stored in self.stores.items():
            store = KnowledgeStore(*stored)
            store.check(graph, self._wants_of(name, wants))
            if wants.logits and store.manifest.meta.get("topk"):
                raise ManifestError(
                    f"knowledge in {store.storage.url} has the largest logits alone, of which there is no mean over "
                    "teachers; run `gkd infer` with infer.logits=all, or name a teacher in every kd loss"
                )

    def part(self, index: int, graph_part: dict[str, Tensor], wants: Wants) -> Taught:
        """What all teachers know of part ``index``."""
        logits, scores, logits_of = [], dict[ScoreKey, Tensor](), dict[str, Tensor | TopK]()
        embeddings = dict[EmbeddingKey, Tensor]()
        for name, stored in self.stores.items():
            mine = self._wants_of(name, wants)
            if not mine:
                continue
            found, known, kept = KnowledgeStore(*stored).part(index, graph_part, mine)
            scores |= {(layer, metric, name): values for (layer, metric, *_), values in known.items()}
            embeddings |= {(layer, name): values for (layer, _), values in kept.items()}
            if wants.logits and isinstance(found, Tensor):
                logits.append(found)
            if name in wants.logits_of and found is not None:
                logits_of[name] = found
        mean = torch.stack(logits).mean(0) if wants.logits else None
        return Taught(mean, scores, logits_of, embeddings)

    def embedding_width(self, key: EmbeddingKey) -> int:
        """Channels of the stored embeddings of a layer of the teacher that ``key`` names, after `check`."""
        layer, name = key
        return KnowledgeStore(*self.stores[str(name)]).embedding_width(layer)

    def num_bytes(self, index: int, wants: Wants) -> int:
        """Bytes that `part` reads."""
        wanted = {name: self._wants_of(name, wants) for name in self.stores}
        return sum(KnowledgeStore(*self.stores[name]).num_bytes(index, mine) for name, mine in wanted.items() if mine)

    @staticmethod
    def _wants_of(name: str, wants: Wants) -> Wants:
        scores = {(layer, metric) for layer, metric, *teacher in wants.scores if teacher == [name]}
        embeddings = {(layer, None) for layer, teacher in wants.embeddings if teacher == name}
        return Wants.of(wants.logits or name in wants.logits_of, scores, wants.temperatures, embeddings=embeddings)
