"""Which tasks are finished, on storage: one small record per task, written by the driver alone.

::

    tmp-<fp8>/started.json                  whose records these are
    tmp-<fp8>/layer-<l>/part-00003.json     record of a layer, beside the object it names
    tmp-<fp8>/knowledge/part-00003.json     record of a part's knowledge, and its score histograms

A restarted driver reads the records by their names: nothing is listed. The first result of a task
counts; the same task with other bytes would mean that the computation is not deterministic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import DataError, ManifestError, ObjectNotFoundError, TeacherError
from gkd_dist.infer.knowledge import KIND
from gkd_dist.infer.plan import KNOWLEDGE, Task
from gkd_dist.infer.worker import Result
from gkd_dist.shards.manifest_json import entry_from_json
from gkd_dist.shards.seal import is_sealed, sealed
from gkd_dist.storage import Storage

STARTED = "started.json"
_READERS = 16


def record_key(task: Task) -> str:
    """Key of the record of ``task``."""
    folder = "knowledge" if task.layer == KNOWLEDGE else f"layer-{task.layer}"
    return f"{folder}/{layout.part(task.part)}.json"


class Commits:
    """The records of one inference run in the folder ``tmp``."""

    def __init__(self, tmp: Storage, fingerprint: str) -> None:
        self._tmp, self._fingerprint = tmp, fingerprint
        self._digests: dict[Task, str] = {}

    def resume(self, tasks: Iterable[Task]) -> dict[Task, Result]:
        """Results of the ``tasks`` that an earlier driver committed; marks the folder as ours."""
        if self._started() == self._fingerprint:
            with ThreadPoolExecutor(_READERS, "records") as readers:
                found = dict(readers.map(lambda task: (task, self._read(task)), tasks))
            results = {task: result for task, result in found.items() if result is not None}
        else:
            results = {}
            self._tmp.delete_tree("")
            self._tmp.write_json(STARTED, {"fingerprint": self._fingerprint})
        self._digests = {task: result.entry.sha256 for task, result in results.items()}
        return results

    def forget(self, task: Task) -> None:
        """The task will be done again: what it left is gone."""
        self._digests.pop(task, None)

    def add(self, task: Task, result: Result) -> bool:
        """Commits ``result``; False where the task has been committed before, with the same bytes.

        Raises `TeacherError` where it has been committed with other bytes.
        """
        known = self._digests.get(task)
        if known is None:
            self._tmp.write(record_key(task), json.dumps(sealed(_to_json(result)), sort_keys=True).encode())
            self._digests[task] = result.entry.sha256
            return True
        if known != result.entry.sha256:
            raise TeacherError(
                f"{task} was computed twice with different bytes "
                f"(sha256 {known[:8]} and {result.entry.sha256[:8]}): inference is not deterministic; "
                "use equal machines and software for all actors, and run again"
            )
        return False

    def _started(self) -> str | None:
        """Fingerprint of the run that the records belong to; None where there are none."""
        try:
            found = json.loads(self._tmp.read(STARTED))
        except (ObjectNotFoundError, ValueError, RecursionError):
            return None
        return str(found.get("fingerprint")) if isinstance(found, dict) else None

    def _read(self, task: Task) -> Result | None:
        where = self._tmp.describe(record_key(task))
        try:
            data = self._tmp.read(record_key(task))
        except ObjectNotFoundError:
            return None
        try:
            return _from_json(json.loads(data), where)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
            DataError,
        ) as error:
            raise ManifestError(
                f"{where} is no record of a finished task ({error}); "
                f"delete {self._tmp.url} and run the same command again"
            ) from error


def _to_json(result: Result) -> dict[str, Any]:
    histograms = {name: [list(histogram), list(histogram.values())] for name, histogram in result.histograms.items()}
    return {"entry": asdict(result.entry), "histograms": histograms}


def _from_json(value: dict[str, Any], where: str) -> Result:
    if not is_sealed(value):
        raise DataError("its content does not match its seal")
    histograms = {
        name: {int(key): int(count) for key, count in zip(keys, counts, strict=True)}
        for name, (keys, counts) in value["histograms"].items()
    }
    return Result(entry_from_json(value["entry"], where, KIND), histograms)
