"""``gkd verify``: every store of a run against its manifest, and every model against its digest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gkd_dist import layout, stages
from gkd_dist.config import Config
from gkd_dist.errors import DataError, ManifestError, ModelError, NewerSchemaError
from gkd_dist.models.io import read_weights
from gkd_dist.session import Session
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.telemetry import Progress
from gkd_dist.verify import orphans, prune, verify_store
from gkd_dist.verify_recompute import DIFFERS, recompute_sample


@dataclass
class Verification:
    """What was looked at and what was wrong with it."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    recomputed: list[dict[str, Any]] = field(default_factory=list)
    num_objects: int = 0
    num_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self)

    def to_text(self) -> str:
        """Lines for a terminal."""
        lines = [f"{self.num_objects:,} objects, {self.num_bytes:,} bytes in {', '.join(self.checked) or 'nothing'}"]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [f"orphan: {key}" for key in self.orphans]
        for one in self.recomputed:
            whose = f" of {one['teacher']}" if "teacher" in one else ""
            lines.append(f"part {one['part']}{whose} recomputed: {one['verdict']}")
        return "\n".join([*lines, "all well" if not self.problems else f"{len(self.problems)} problems"])


def verify_run(
    config: Config, *, orphans: bool = False, prune: bool = False, recompute: int | None = None, seed: int = 0
) -> Verification:
    """Looks at the graph store, all knowledge, models and predictions of the run.

    ``recompute`` parts of the teacher's knowledge, chosen by ``seed``, are computed again if all that
    is sound.
    """
    session = Session.open(config, Progress())
    result = Verification()
    for kind, storage in stores_of(session):
        _verify_manifest(result, kind, storage, orphans, prune)
    if orphans:
        _clean_unfinished(result, session, prune)
    teachers = [view.teacher for view in session.views()]
    for folder in (*teachers, *(session.student(name) for name in ("distilled", "alone"))):
        _verify_model(result, folder)
    if not result.checked:
        raise ManifestError(f"nothing is stored at {session.run.url} yet; run `gkd run` first, or correct the path")
    if recompute is not None:
        _recompute(result, session, recompute, seed)
    return result


def _recompute(result: Verification, session: Session, num_parts: int, seed: int) -> None:
    if result.problems:
        result.problems.append("nothing was recomputed: repair what is above first")
        return
    for view in session.views():
        url, verdicts = recompute_sample(view, num_parts, seed)
        whose = {} if view.is_whole else {"teacher": view.teacher_label}
        result.recomputed += [verdict.to_json() | whose for verdict in verdicts]
        result.problems += [f"{url}: {verdict}" for verdict in verdicts if verdict.verdict == DIFFERS]


def stores_of(session: Session) -> list[tuple[str, Storage]]:
    """(kind, folder) of every manifest of the run."""
    found = [("graph", session.graph)] if session.graph.exists(layout.MANIFEST) else []
    keys = [key for key in session.knowledge.list() if key.endswith(f"/{layout.MANIFEST}")]
    found += [("knowledge", session.knowledge.child(key.rpartition("/")[0])) for key in sorted(keys)]
    for name in ("distilled", "alone"):
        predictions = session.student(name).child("predictions")
        if predictions.exists(layout.MANIFEST):
            found.append(("knowledge", predictions))
    return found


def _unfinished(session: Session) -> list[str]:
    """Keys of the knowledge store in folders without a manifest: of inferences that were interrupted or given up."""
    keys = session.knowledge.list()
    finished = {key.partition("/")[0] for key in keys if key.endswith(f"/{layout.MANIFEST}")}
    return [key for key in keys if "/" in key and key.partition("/")[0] not in finished]


def _clean_unfinished(result: Verification, session: Session, do_prune: bool) -> None:
    """Lists them; deletes those that no run of today's configuration would go on with."""
    today = set()
    for view in session.views():
        with suppress(DataError):  # without its graph or its teacher there is nothing to go on with
            today.add(stages.knowledge_folder(view).url.rpartition("/")[2])
    for key in _unfinished(session):
        result.orphans.append(f"{session.knowledge.url}/{key}")
        if do_prune and key.partition("/")[0] not in today:
            session.knowledge.delete(key)


def _verify_manifest(result: Verification, kind: str, storage: Storage, list_orphans: bool, do_prune: bool) -> None:
    try:
        manifest = Manifest.load(storage, kind)
    except NewerSchemaError:
        raise
    except ManifestError as error:
        result.problems.append(str(error))
        return
    result.checked.append(storage.url)
    result.num_objects += len(manifest.parts)
    result.num_bytes += sum(part.num_bytes for part in manifest.parts)
    result.problems += [f"{storage.url}: {problem}" for problem in verify_store(storage, manifest)]
    if list_orphans:
        keys = prune(storage, manifest) if do_prune else orphans(storage, manifest)
        result.orphans += [f"{storage.url}/{key}" for key in keys]


def _verify_model(result: Verification, folder: Storage) -> None:
    if not folder.exists(layout.MODEL_JSON):
        return
    result.checked.append(folder.url)
    try:
        result.num_bytes += read_weights(folder)[1]
        result.num_objects += 1
    except NewerSchemaError:
        raise
    except ModelError as error:
        result.problems.append(str(error))
