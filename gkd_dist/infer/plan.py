"""Which tasks an inference run has, what each reads, and when it may start. Pure: no storage, no Ray, no torch.

A task computes one layer of one part, or gathers what is kept of one part (its *knowledge*)::

    layer 1 of p        reads the features of p and of its halo
    layer l of p        reads layer l - 1 of p and of the parts that p borders on
    knowledge of p      reads the wanted layers of p and of its borders, and of p alone what the logits are made
                        of (the last layer, or all that jumping knowledge reads) and what taps have left

A last layer that only its own part's knowledge reads is not stored: the knowledge task computes it.

A task depends on its own part and on bordering parts only: there is no barrier between layers.
``borders[p]`` are the parts that own p's first halo hop, in ascending order.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gkd_dist.errors import ModelError

KNOWLEDGE = 0  # in place of a layer number, which count from 1


class Task(NamedTuple):
    """One layer of one part, or (``layer == KNOWLEDGE``) what is kept of the part."""

    layer: int
    part: int

    def __str__(self) -> str:
        what = "knowledge" if self.layer == KNOWLEDGE else f"layer {self.layer}"
        return f"{what} of part {self.part}"


@dataclass(frozen=True)
class Wants:
    """What is to be kept of every part; layers are positive numbers.

    ``logits``: output of the model. ``scores[layer]``: metrics of the raw edge scores of a
    layer. ``embeddings``: layers whose output is kept, of owned nodes and of their first halo hop.
    ``taps``: dotted paths of modules whose output is kept, of owned nodes.
    """

    logits: bool = True
    scores: Mapping[int, Collection[str]] = field(default_factory=dict)
    embeddings: Collection[int] = ()
    taps: Collection[str] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose output is needed on owned and halo nodes, ascending."""
        return tuple(sorted({layer for layer, metrics in self.scores.items() if metrics} | set(self.embeddings)))

    def score_names(self) -> list[tuple[int, str]]:
        """All (layer, metric) pairs in a fixed order."""
        return [(layer, metric) for layer in sorted(self.scores) for metric in sorted(self.scores[layer])]

    def depth(self, num_layers: int, tap_layers: Collection[int] = ()) -> int:
        """How many layers must be computed; raises `ModelError` for a layer that is not there.

        ``tap_layers`` are those in which the taps lie.
        """
        for layer in self.layers:
            if not 1 <= layer <= num_layers:
                raise ModelError(
                    f"layer {layer} is wanted of a model with layers 1..{num_layers}; name a layer that exists"
                )
        if not self.logits and not self.layers and not self.taps:
            raise ModelError("nothing is wanted of the model; ask for logits, scores, embeddings or taps")
        return num_layers if self.logits or KNOWLEDGE in tap_layers else max([*self.layers, *tap_layers])


class TaskGraph:
    """All tasks of a run and who reads whose result; memory O(parts + borders)."""

    def __init__(
        self, depth: int, borders: Sequence[Sequence[int]], wants: Wants, own_layers: Collection[int] | None = None
    ) -> None:
        """``depth`` layers are computed one by one; 0: only knowledge tasks, which read no layer.

        ``own_layers`` are those that knowledge reads of the part alone: for the logits and for
        taps. None: the last one where logits are wanted. ``stored`` is how many layers have tasks
        of their own: all, or all but the last one.
        """
        self.depth = depth
        self.stored = depth if depth in wants.layers else max(0, depth - 1)
        self.borders = borders
        self.wants = wants
        self._kept = wants.layers if depth else ()
        default = (depth,) if wants.logits else ()
        own = set(default if own_layers is None else own_layers) - set(self._kept)
        self._own = tuple(sorted(layer for layer in own if 1 <= layer <= self.stored))
        below_last = {self.stored} if 0 < self.stored < depth else set()
        self._around = tuple(sorted({*self._kept, *below_last}))
        self._readers: list[list[int]] = [[] for _ in borders]
        for part, sources in enumerate(borders):
            for source in sources:
                self._readers[source].append(part)

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return len(self.borders)

    def tasks(self) -> list[Task]:
        """Every task, layers first, knowledge last."""
        steps = [*range(1, self.stored + 1), KNOWLEDGE]
        return [Task(layer, part) for layer in steps for part in range(self.num_parts)]

    def sends(self, layer: int) -> bool:
        """Whether bordering parts read rows of ``layer``, so that they must be copied for them."""
        return layer < self.depth or layer in self._kept

    def needs(self, task: Task) -> list[Task]:
        """Tasks whose results ``task`` reads."""
        layer, part = task
        if layer == 1:
            return []
        around = (part, *self.borders[part])
        if layer > 1:
            return [Task(layer - 1, near) for near in around]
        read = [Task(near_layer, near) for near_layer in self._around for near in around]
        return read + [Task(own, part) for own in self._own if own not in self._around]

    def readers(self, task: Task) -> list[Task]:
        """Tasks that read the result of ``task``: the inverse of `needs`."""
        layer, part = task
        if layer == KNOWLEDGE:
            return []
        around = (part, *self._readers[part])
        read = [Task(layer + 1, near) for near in around] if layer < self.stored else []
        if layer in self._around:
            read += [Task(KNOWLEDGE, near) for near in around]
        elif layer in self._own:
            read.append(Task(KNOWLEDGE, part))
        return read


class Schedule:
    """What may start now and which results nobody reads any more.

    Deeper tasks come first, so that few layer outputs exist at a time; then by part.
    """

    def __init__(self, graph: TaskGraph, done: Iterable[Task] = ()) -> None:
        """``done`` are tasks finished by an earlier attempt."""
        self._graph = graph
        self._done = set(done)
        self._missing: dict[Task, int] = {}
        self._unread: dict[Task, int] = {}
        self._ready: list[tuple[int, Task]] = []
        for task in graph.tasks():
            self._unread[task] = sum(reader not in self._done for reader in graph.readers(task))
            if task not in self._done:
                self._missing[task] = sum(need not in self._done for need in graph.needs(task))
                if self._missing[task] == 0:
                    self._push(task)
        self.num_tasks = len(self._unread)

    @property
    def num_done(self) -> int:
        """Tasks finished, those of earlier attempts included."""
        return len(self._done)

    @property
    def finished(self) -> bool:
        """Whether every task is done."""
        return not self._missing

    def is_read(self, task: Task) -> bool:
        """Whether a task that is not done yet reads the result of ``task``."""
        return self._unread[task] > 0

    def take(self, limit: int) -> list[Task]:
        """Up to ``limit`` tasks that may start; they will not be offered again."""
        return [heapq.heappop(self._ready)[1] for _ in range(min(limit, len(self._ready)))]

    def finish(self, task: Task) -> list[Task]:
        """Records that ``task`` is done; returns the tasks whose results nobody reads any more."""
        del self._missing[task]
        self._done.add(task)
        for reader in self._graph.readers(task):
            if reader in self._missing:
                self._missing[reader] -= 1
                if self._missing[reader] == 0:
                    self._push(reader)
        released = []
        for need in self._graph.needs(task):
            self._unread[need] -= 1
            if self._unread[need] == 0:
                released.append(need)
        return released

    def _push(self, task: Task) -> None:
        depth = self._graph.depth + 1 if task.layer == KNOWLEDGE else task.layer
        heapq.heappush(self._ready, (-depth, task))
