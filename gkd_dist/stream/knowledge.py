"""What a teacher knows about one part, aligned with the graph part.

Raw edge scores come from the store where they were stored, and from embeddings otherwise; the
batch looks the same in both cases. Owned in-edges of a part are ordered alike in the graph part and
in the knowledge part, so nothing is searched or sorted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from gkd_dist.errors import ManifestError
from gkd_dist.graph import LocalGraph
from gkd_dist.losses.scores import Metric, pattern_scores
from gkd_dist.partition.store import local_graph
from gkd_dist.shards.manifest import Manifest, ObjectEntry
from gkd_dist.shards.quantise import unpack_float, unpack_rows
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage
from gkd_dist.topk import TopK

KIND = "knowledge"
OFFSET, SCALE = ".offset", ".scale"
LOGITS, TOP, INDEX, TAIL = "logits", "logits.topk", "logits.index", "logits.tail"
Score = tuple[int, str]  # (teacher layer from 1, metric)
ScoreKey = Score | tuple[int, str, str]  # with the name of the teacher, where there are several
EmbeddingKey = tuple[int, str | None]  # teacher layer from 1, and the name of the teacher where there are several


@dataclass(frozen=True)
class Wants:
    """What the losses need to know of the teacher: its logits, raw scores by (layer, metric), embeddings by layer.

    ``temperatures`` are those that the logits are used at, which matters where only the largest are stored.
    Where there are several teachers, ``logits`` is their mean, ``logits_of`` names those whose own are
    read, and scores carry the name of their teacher.
    """

    logits: bool = False
    scores: frozenset[ScoreKey] = frozenset()
    temperatures: frozenset[float] = frozenset()
    logits_of: frozenset[str] = frozenset()
    embeddings: frozenset[EmbeddingKey] = frozenset()

    @classmethod
    def of(
        cls,
        logits: bool = False,
        scores: Iterable[ScoreKey] = (),
        temperatures: Iterable[float] = (),
        logits_of: Iterable[str] = (),
        embeddings: Iterable[EmbeddingKey] = (),
    ) -> Wants:
        """The same from any iterables."""
        return cls(logits, frozenset(scores), frozenset(temperatures), frozenset(logits_of), frozenset(embeddings))

    def __bool__(self) -> bool:
        return self.logits or bool(self.scores or self.logits_of or self.embeddings)

    def sorted_scores(self) -> list[ScoreKey]:
        """Scores in the order in which they are read."""
        return sorted(self.scores)

    def sorted_embeddings(self) -> list[EmbeddingKey]:
        """Embeddings in the order in which they are read."""
        return sorted(self.embeddings, key=lambda key: (key[0], key[1] or ""))


class Known(NamedTuple):
    """What a teacher knows of one part of o owned nodes and m in-edges.

    Logits float32 [o, c] or the largest of them, scores float32 [m] each, embeddings float32 [o, d] each.
    """

    logits: Tensor | TopK | None
    scores: dict[ScoreKey, Tensor]
    embeddings: dict[EmbeddingKey, Tensor]


NOTHING = Wants()


class KnowledgeStore(NamedTuple):
    """A finished knowledge store, of which parts are read on demand."""

    storage: Storage
    manifest: Manifest

    @property
    def url(self) -> str:
        """Where it is."""
        return self.storage.url

    def check(self, graph: Manifest, wants: Wants) -> None:
        """Raises ManifestError unless this is knowledge about ``graph`` and holds what is wanted."""
        self.manifest.require_input("graph", graph.fingerprint, self.storage.url)
        self.manifest.require_parts(len(graph.parts), self.storage.url)
        for entry in self.manifest.parts:
            self._names(entry, wants)
        topk = self.manifest.meta.get("topk")
        absent = sorted(wants.temperatures - set(topk["temperatures"])) if topk and wants.logits else []
        if topk and absent:
            raise ManifestError(
                f"knowledge in {self.storage.url} has the top {topk['k']} logits with tails at temperatures "
                f"{topk['temperatures']}, a kd loss asks for {absent[0]:g}; run `gkd infer` with the losses of this run"
            )

    def part(self, index: int, graph_part: dict[str, Tensor], wants: Wants) -> Known:
        """What is wanted of part ``index``."""
        values = self.values(index, graph_part, self._names(self.manifest.parts[index], wants))
        scores: dict[ScoreKey, Tensor] = {}
        inner: LocalGraph | None = None
        for layer, metric, *_ in wants.sorted_scores():
            if score_name(layer, metric) in values:
                scores[layer, metric] = values[score_name(layer, metric)]
                continue
            embeddings = values[embedding_name(layer)]
            inner = inner or local_graph(graph_part, embeddings.size(0), graph_part["y"].size(0))
            scores[layer, metric] = pattern_scores(embeddings, inner.pattern, cast(Metric, metric))
        kept = {
            key: values[embedding_name(key[0])][: graph_part["y"].size(0)].clone() for key in wants.sorted_embeddings()
        }
        return Known(values.get(LOGITS, self._top_k(values)), scores, kept)

    def embedding_width(self, layer: int) -> int:
        """Channels of the stored embeddings of a layer, after `check`."""
        stored = {tensor.name: tensor for tensor in self.manifest.parts[0].tensors}
        return int(stored[embedding_name(layer)].shape[1])

    def _top_k(self, values: Mapping[str, Tensor]) -> TopK | None:
        """The largest logits, where these are stored and were read."""
        if TOP not in values:
            return None
        top, meta = values[TOP], self.manifest.meta
        tail = values.get(TAIL, top.new_empty(top.size(0), 0))
        return TopK(top, values[INDEX], tail, tuple(meta["topk"]["temperatures"]), int(meta["num_classes"]))

    def values(
        self, index: int, graph_part: Mapping[str, Tensor], names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """What part ``index`` holds, or what ``names`` make up: packed floats as float32, the rest as it is."""
        entry = self.manifest.parts[index]
        infos = entry.meta["floats"]
        tensors = read_shard(self.storage, entry, names)
        packing = {name + end for name, info in infos.items() if info.get("affine") for end in (OFFSET, SCALE)}
        return {
            name: _unpack(name, tensors, infos[name], graph_part) if name in infos else tensor
            for name, tensor in tensors.items()
            if name not in packing
        }

    def num_bytes(self, index: int, wants: Wants) -> int:
        """Bytes that `part` reads."""
        entry = self.manifest.parts[index]
        names = set(self._names(entry, wants))
        return sum(tensor.stop - tensor.start for tensor in entry.tensors if tensor.name in names)

    def _names(self, entry: ObjectEntry, wants: Wants) -> list[str]:
        """Tensors to read: each score itself or else the embeddings that it follows from."""
        stored = {tensor.name for tensor in entry.tensors}
        names = set()
        if wants.logits:
            names = {TOP, INDEX, *(stored & {TAIL})} if TOP in stored else {LOGITS}
        for layer, metric, *_ in wants.sorted_scores():
            score, embeddings = score_name(layer, metric), embedding_name(layer)
            if not stored & {score, embeddings}:
                self._missing(f"neither {score} nor {embeddings}", stored)
            names |= {score, *(stored & {score + OFFSET, score + SCALE})} if score in stored else {embeddings}
        for layer, _ in wants.sorted_embeddings():
            if embedding_name(layer) not in stored:
                self._missing(f"no {embedding_name(layer)}", stored)
            names.add(embedding_name(layer))
        if not names <= stored:
            self._missing("no logits", stored)
        return sorted(names)

    def _missing(self, what: str, stored: set[str]) -> None:
        raise ManifestError(
            f"knowledge in {self.storage.url} has {what} (it has {', '.join(sorted(stored))}); "
            "run `gkd infer` with the losses of this run"
        )


def _unpack(
    name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], graph_part: Mapping[str, Tensor]
) -> Tensor:
    """Float32 values of one stored tensor; bytes have the offset and scale of each target beside them."""
    if not info.get("affine"):
        return unpack_float(tensors[name], info)
    offset = tensors[name + OFFSET]
    return unpack_rows(tensors[name], offset, tensors[name + SCALE], graph_part["indptr"][: offset.numel() + 1])


def score_name(layer: int, metric: str) -> str:
    """Name of a stored score tensor."""
    return f"scores.{layer}.{metric}"


def embedding_name(layer: int) -> str:
    """Name of a stored embedding tensor."""
    return f"embeddings.{layer}"
