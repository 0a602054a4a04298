"""``gkd verify --recompute``: a sample of knowledge parts against what the teacher says today.

Digests show that nothing was altered since it was written; only the teacher shows that it was right
when it was written. On the same kind of processor with the same versions and threads the bits are
equal. Elsewhere floats may round differently: then values may be off by what two roundings of the
stored dtype and contract C1 allow.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_dist import stages
from gkd_dist.errors import ConfigError
from gkd_dist.infer.recompute import recompute_parts
from gkd_dist.partition.store import GraphStore
from gkd_dist.session import Session
from gkd_dist.shards.manifest import Manifest, ObjectEntry
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore

log = logging.getLogger(__name__)
MAX_TASKS = 2000
EQUAL, WITHIN, DIFFERS = "equal bits", "within bound", "differs"
_C1 = 1e-4  # largest difference of two exact evaluations, times max(1, largest value)


@dataclass(frozen=True)
class Recomputed:
    """Verdict on one part; where bits differ also the tensor that is farthest off, and by how much."""

    part: int
    key: str
    verdict: str
    tensor: str = ""
    difference: float = 0.0
    allowed: float = 0.0

    def __str__(self) -> str:
        where = f"part {self.part} ({self.key}) recomputed: {self.verdict}"
        if self.verdict == EQUAL:
            return where
        return f"{where}, {self.tensor} by {self.difference:.3g} (allowed {self.allowed:.3g})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def recompute_sample(session: Session, num_parts: int, seed: int) -> tuple[str, list[Recomputed]]:
    """URL of the run's knowledge store, and a verdict on ``num_parts`` of its parts, chosen by ``seed``.

    Needs the graph, the teacher and finished knowledge of today's configuration; errors as in the
    stages. Raises ConfigError for less than one part.
    """
    if num_parts < 1:
        raise ConfigError(f"--recompute must be at least 1 (got {num_parts}); correct it")
    graph, folder = stages.open_graph(session), stages.knowledge_folder(session)
    manifest = Manifest.load(folder, "knowledge", stages.infer_fingerprint(session))
    count = min(num_parts, len(manifest.parts))
    parts = random.Random(seed).sample(range(len(manifest.parts)), count)
    with (
        tempfile.TemporaryDirectory(prefix="gkd-recompute-") as path,
        stages.task_progress(session, "recompute") as bar,
    ):
        scratch = Storage.open(path)
        found = recompute_parts(
            session.teacher,
            graph,
            scratch,
            stages.infer_wants(session),
            session.config.infer,
            stages.packing(session.config),
            parts,
            max_tasks=MAX_TASKS,
            allow_code=session.allow_code,
            announce=lambda kept, tasks, total: _announce(parts, kept, tasks, total),
            progress=bar,
        )
        stored = KnowledgeStore(folder, manifest)
        return folder.url, [
            compare(graph, stored, scratch, part, entry) for part, entry in sorted(found.items())
        ]  # fmt: skip


def _announce(asked: list[int], parts: list[int], tasks: int, total: int) -> None:
    log.info(
        "recomputing %s with what surrounds %s: %d tasks, a whole inference has %d",
        ", ".join(f"part {part}" for part in sorted(parts)),
        "it" if len(parts) == 1 else "them",
        tasks,
        total,
    )
    if len(parts) < len(asked):
        log.warning(
            "%d of %d parts are left out: they would take more than %d tasks",
            len(asked) - len(parts),
            len(asked),
            MAX_TASKS,
        )


def compare(graph: GraphStore, stored: KnowledgeStore, scratch: Storage, part: int, again: ObjectEntry) -> Recomputed:
    """The stored part against the recomputed object ``again`` in ``scratch``; ShardError where it cannot be read."""
    entry = stored.manifest.parts[part]
    if entry.sha256 == again.sha256 and entry.meta == again.meta and entry.tensors == again.tensors:
        stored.values(part, {"indptr": graph.part(part, ["indptr"])["indptr"]})  # crc32 of the object itself
        return Recomputed(part, entry.key, EQUAL)
    structure = graph.part(part, ["indptr"])
    before = stored.values(part, structure)
    one = KnowledgeStore(scratch, Manifest("knowledge", "", parts=(again,)))
    return worst_difference(part, entry, before, one.values(0, structure), again)


def worst_difference(
    part: int, entry: ObjectEntry, before: Mapping[str, Tensor], after: Mapping[str, Tensor], again: ObjectEntry
) -> Recomputed:
    """Verdict from the values of both objects; only the bounds of the recomputed one are believed."""
    verdict, worst = WITHIN, Recomputed(part, entry.key, WITHIN)
    for name in sorted(before.keys() | after.keys()):
        difference, allowed = _difference(before.get(name), after.get(name), again.meta["floats"].get(name))
        if not difference <= allowed:
            verdict = DIFFERS
        if not worst.tensor or not difference - allowed <= worst.difference - worst.allowed:
            worst = Recomputed(part, entry.key, verdict, name, difference, allowed)
    return Recomputed(part, entry.key, verdict, worst.tensor, worst.difference, worst.allowed)


def _difference(before: Tensor | None, after: Tensor | None, info: Mapping[str, Any] | None) -> tuple[float, float]:
    """(largest difference, what is allowed); infinite where there is nothing to compare."""
    if before is None or after is None or before.shape != after.shape:
        return float("inf"), 0.0
    if before.numel() == 0:
        return 0.0, 0.0
    if info is None:  # integers
        return float((before.long() - after.long()).abs().max()), 0.0
    difference = float((before.double() - after.double()).abs().max())
    largest = max(1.0, float(torch.nan_to_num(after).abs().max()))
    return difference, 2.5 * float(info["bound"]) + _C1 * largest
