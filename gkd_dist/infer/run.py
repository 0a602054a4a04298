"""The driver of an inference run: hands out tasks, commits what comes back, publishes last.

It holds O(parts + borders): metadata of objects, never a tensor. Where the tasks run is the
`Executor`'s business: Ray actors (`actor.ActorPool`) or this process (`local.LocalExecutor`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import nn

from gkd_dist import layout
from gkd_dist.config import InferConfig
from gkd_dist.config_file import config_fingerprint
from gkd_dist.errors import DataError, ManifestError, ModelError, NewerSchemaError, ObjectNotFoundError
from gkd_dist.infer.commits import Commits
from gkd_dist.infer.knowledge import KIND, Histogram, add_histogram, knowledge_meta, refuse_coarse
from gkd_dist.infer.layerwise import copy_name
from gkd_dist.infer.local import LocalExecutor
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import KNOWLEDGE, Schedule, Task, TaskGraph, Wants
from gkd_dist.infer.taps import check_taps, probe_taps
from gkd_dist.infer.times import TaskTimes
from gkd_dist.infer.worker import Job, Request, Result, model_digest, trim
from gkd_dist.models.embedding import check_same_graph
from gkd_dist.models.io import ModelSpec, read_model, read_model_document
from gkd_dist.models.layered import as_layers, is_layered
from gkd_dist.models.probe import check_model
from gkd_dist.models.tiny import num_ids_of, random_graph
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest, ObjectEntry
from gkd_dist.storage import Storage

log = logging.getLogger(__name__)
_READERS = 16


class Executor(Protocol):
    """Where tasks run."""

    @property
    def num_slots(self) -> int:
        """Tasks that may be in flight."""

    def submit(self, request: Request) -> None:
        """Starts a task, or queues it."""

    def wait(self) -> list[tuple[Task, Result]]:
        """Results that have arrived; waits a bounded time and may return none."""

    def discard(self) -> None:
        """Forgets all tasks in flight."""


class Prepared(NamedTuple):
    """All tasks of a run, what they share, and the model as its folder describes it."""

    plan: TaskGraph
    job: Job
    spec: ModelSpec
    document: dict[str, Any]


def infer_nodes(
    model_storage: Storage,
    graph: GraphStore,
    out: Storage,
    wants: Wants,
    settings: InferConfig,
    *,
    fingerprint: str,
    packing: Packing | None = None,
    pool: Executor | None = None,
    allow_code: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    ownership_check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Runs the model at ``model_storage`` over every node of ``graph``; returns the manifest in ``out``.

    ``packing`` says how the knowledge is stored, None: as ``settings`` do. ``pool`` are Ray actors,
    None: this process. ``progress(done, total)`` counts tasks. ``ownership_check`` runs before every
    commit and may raise to stop the run. A run that was interrupted goes on where it stopped; one
    that is finished returns at once. Raises `ModelError` where the model does not fit the graph or
    lacks a wanted layer, and `DataError` where scores are too coarse for ``infer.max_kl``.
    """
    before = _published(out)
    if before is not None and before.fingerprint == fingerprint:
        out.delete_tree(layout.layer_outputs(fingerprint))
        return before
    packing = packing or Packing.of(settings)
    plan, job, spec, document = prepare(
        model_storage, graph, out, wants, settings, packing, fingerprint, tuple(allow_code)
    )
    run = drive_tasks(plan, job, pool or LocalExecutor(), Commits(job.tmp, fingerprint), progress, ownership_check)
    parts = run.knowledge_entries()
    meta = knowledge_meta(wants, plan.depth, spec, packing, run.histograms, parts)
    refuse_coarse(meta, parts, packing)
    inputs = input_fingerprints(graph, document, wants, packing)
    manifest = Manifest(KIND, fingerprint, inputs, meta, parts)
    ownership_check()
    manifest.save(out)
    _clean_up(out, before, manifest)
    return manifest


def prepare(
    model_storage: Storage,
    graph: GraphStore,
    out: Storage,
    wants: Wants,
    settings: InferConfig,
    packing: Packing,
    fingerprint: str,
    allow_code: tuple[str, ...],
) -> Prepared:
    """What a run will do, after a check that model, graph and wants fit together."""
    model, spec = read_model(model_storage, allow_code)  # for the plan alone: the workers hold their own
    document = read_model_document(model_storage)
    _check_model(model, spec, graph, wants)
    tap_layers = locate_taps(model, graph, wants.taps, spec.features)
    plan = plan_tasks(model, graph, wants, tap_layers)
    job = _job(model_storage, document, graph, out, wants, settings, packing, fingerprint, allow_code, plan)
    return Prepared(plan, replace(job, tap_layers=tap_layers), spec, document)


def input_fingerprints(
    graph: GraphStore, document: Mapping[str, Any], wants: Wants, packing: Packing
) -> dict[str, str]:
    """What knowledge is made from: the graph store, the model, its weights, and what is kept and how."""
    kept = [
        wants.logits,
        [list(name) for name in wants.score_names()],
        sorted(wants.embeddings),
        *([sorted(wants.taps)] if wants.taps else []),
        *([["topk", packing.topk, *packing.temperatures]] if packing.topk is not None else []),
        packing.dtype,
        packing.scores_dtype,
    ]
    return {
        "graph": graph.manifest.fingerprint,
        "model": str(document["fingerprint"]),
        "weights": model_digest(document),
        "config": config_fingerprint(kept),
    }


def _published(out: Storage) -> Manifest | None:
    """What an earlier run left; a manifest that cannot be read is as good as none."""
    if not out.exists(layout.MANIFEST):
        return None
    try:
        return Manifest.load(out, KIND)
    except NewerSchemaError:
        raise
    except ManifestError:
        return None


def _clean_up(out: Storage, before: Manifest | None, manifest: Manifest) -> None:
    """Deletes the layer outputs, and the objects of the manifest that was just replaced."""
    out.delete_tree(layout.layer_outputs(manifest.fingerprint))
    kept = {entry.key for entry in manifest.parts}
    for entry in before.parts if before else ():
        if entry.key not in kept:
            _delete(out, entry.key)


def _delete(storage: Storage, key: str) -> None:
    with suppress(ObjectNotFoundError):
        storage.delete(key)


def _check_model(model: nn.Module, spec: ModelSpec, graph: GraphStore, wants: Wants) -> None:
    width = graph.num_features_of(spec.features)
    if spec.in_channels != width:
        which = "" if spec.features is None else f" in {spec.features!r}"
        raise ModelError(
            f"the model reads {spec.in_channels} features per node, the graph at {graph.storage.url} has "
            f"{width}{which}; use a graph with the features that the model was trained on"
        )
    check_same_graph(spec.config, int(graph.manifest.meta["num_nodes"]))
    if not is_layered(model) and (wants.layers or not wants.logits):
        raise ModelError(
            f"{spec.config.kind} has no layers to take scores or embeddings from; "
            "give it num_layers, forward_layer and activate, or drop the losses that read teacher layers"
        )
    found = check_model(model, width, bool(graph.manifest.meta["has_edge_weight"]), graph.num_edge_features)
    hops = int(graph.manifest.meta["halo_hops"])
    log.log(logging.INFO if found.exact(hops) else logging.WARNING, "%s", found.sentence(hops))


def locate_taps(
    model: nn.Module, graph: GraphStore, taps: Collection[str], features: str | None = None
) -> dict[str, int]:
    """Layer of each tap; KNOWLEDGE for those outside the layers, which for a model without layers are all.

    `ModelError` for a tap that there is not, or that no layer can be found for.
    """
    if not taps:
        return {}
    check_taps(model, taps)
    layers = as_layers(model)
    if layers is None:
        return dict.fromkeys(taps, KNOWLEDGE)
    tiny = random_graph(
        graph.num_features_of(features),
        bool(graph.manifest.meta["has_edge_weight"]),
        graph.num_edge_features,
        num_ids_of(model),
    )
    return probe_taps(model, layers, taps, tiny.x, tiny.graph)


def plan_tasks(
    model: nn.Module, graph: GraphStore, wants: Wants, tap_layers: Mapping[str, int] | None = None
) -> TaskGraph:
    """All tasks for ``model``; models that are not layered get knowledge tasks alone."""
    layers, found = as_layers(model), set((tap_layers or {}).values())
    if layers is None:
        return TaskGraph(0, [()] * graph.num_parts, wants)
    depth = wants.depth(layers.num_layers, found)
    own = found - {KNOWLEDGE}
    if wants.logits or KNOWLEDGE in found:
        own |= set(layers.readout_layers)
    needs_borders = depth > 1 or wants.layers
    return TaskGraph(depth, read_borders(graph) if needs_borders else [()] * graph.num_parts, wants, own)


def read_borders(graph: GraphStore) -> list[list[int]]:
    """For every part, the parts that own its first halo hop, ascending."""
    borders: list[list[int]] = [[] for _ in range(graph.num_parts)]
    with ThreadPoolExecutor(_READERS, "borders") as readers:
        plans = readers.map(lambda part: graph.part(part, ["send_part"])["send_part"].tolist(), range(graph.num_parts))
        for sender, receivers in enumerate(plans):
            for receiver in receivers:
                borders[receiver].append(sender)
    return borders


def _job(
    model: Storage,
    document: dict[str, Any],
    graph: GraphStore,
    out: Storage,
    wants: Wants,
    settings: InferConfig,
    packing: Packing,
    fingerprint: str,
    allow_code: tuple[str, ...],
    plan: TaskGraph,
) -> Job:
    return Job(
        model=model,
        model_digest=model_digest(document),
        allow_code=allow_code,
        graph=graph.storage,
        graph_fingerprint=graph.manifest.fingerprint,
        tmp=out.child(layout.layer_outputs(fingerprint)),
        out=out,
        wants=wants,
        depth=plan.depth,
        stored=plan.stored,
        sends=frozenset(layer for layer in range(1, plan.stored + 1) if plan.sends(layer)),
        packing=packing,
        threads=settings.threads,
        device="cuda" if settings.gpus_per_actor else "cpu",
        tile_edges=settings.tile_edges,
        tap_layers={},
        features=document.get("features"),
    )


@dataclass
class _Run:
    """One run at work: what is in flight, what is committed and still needed."""

    plan: TaskGraph
    job: Job
    executor: Executor
    commits: Commits
    ownership_check: Callable[[], None]
    histograms: dict[str, Histogram] = field(default_factory=dict)
    times: TaskTimes = field(default_factory=TaskTimes)
    _entries: dict[Task, ObjectEntry] = field(default_factory=dict)

    def drive(self, progress: Callable[[int, int], None]) -> None:
        """Runs every task that is not committed yet."""
        schedule = self._resume()
        progress(schedule.num_done, schedule.num_tasks)
        in_flight = 0
        try:
            while not schedule.finished:
                for task in schedule.take(self.executor.num_slots - in_flight):
                    self.executor.submit(self._request(task))
                    in_flight += 1
                for task, result in self.executor.wait():
                    in_flight -= 1
                    self.times.add(task, result.seconds)
                    if result.warning:
                        log.warning("%s", result.warning)
                    self._commit(schedule, task, result)
                    progress(schedule.num_done, schedule.num_tasks)
        except DataError:
            self.ownership_check()  # who has lost the run misses what its successor has deleted: that is the reason
            raise
        finally:
            self.executor.discard()
            for line in self.times.summary():
                log.info("%s", line)

    def entry(self, task: Task) -> ObjectEntry:
        """The object of a task that is done and still read, or of knowledge."""
        return self._entries[task]

    def knowledge_entries(self) -> tuple[ObjectEntry, ...]:
        """Entries of the knowledge parts, in part order."""
        return tuple(self._entries[Task(KNOWLEDGE, part)] for part in range(self.plan.num_parts))

    def _resume(self) -> Schedule:
        results = self._still_there(self.commits.resume(self.plan.tasks()))
        schedule = Schedule(self.plan, results)
        for task, result in results.items():
            self._keep(task, result)
        for task in results:
            if task.layer != KNOWLEDGE and not schedule.is_read(task):
                del self._entries[task]  # what an interruption left of it goes with the folder
        if results:
            log.info("resuming: %d of %d tasks were done before", schedule.num_done, schedule.num_tasks)
        return schedule

    def _still_there(self, results: dict[Task, Result]) -> dict[Task, Result]:
        """``results`` without those whose object is needed and gone, and without what these were made from, if gone.

        Layer outputs that nobody reads any more are gone by right.
        """
        todo = [task for task in results if task.layer == KNOWLEDGE]
        todo += [need for task in self.plan.tasks() if task not in results for need in self.plan.needs(task)]
        looked: set[Task] = set()
        while todo:
            asked = [task for task in dict.fromkeys(todo) if task in results and task not in looked]
            looked.update(asked)
            with ThreadPoolExecutor(_READERS, "objects") as readers:
                there = list(readers.map(lambda task: self._is_there(task, results[task].entry), asked))
            gone = [task for task, found in zip(asked, there, strict=True) if not found]
            for task in gone:
                log.warning("the object of %s is gone, it is done again", task)
                self.commits.forget(task)
                del results[task]
            todo = [need for task in gone for need in self.plan.needs(task)]
        return results

    def _is_there(self, task: Task, entry: ObjectEntry) -> bool:
        storage = self.job.out if task.layer == KNOWLEDGE else self.job.tmp
        try:
            return storage.size(entry.key) == entry.num_bytes
        except ObjectNotFoundError:
            return False

    def _request(self, task: Task) -> Request:
        inputs = {need: self._entries[need] for need in self.plan.needs(task)}
        for need, entry in inputs.items():
            if need.part != task.part:
                inputs[need] = trim(entry, ("owned", copy_name(task.part)))
        return Request(self.job, task, inputs)

    def _commit(self, schedule: Schedule, task: Task, result: Result) -> None:
        self.ownership_check()
        if self.commits.add(task, result):
            self._keep(task, result)
            for released in schedule.finish(task):
                self._release(released)

    def _keep(self, task: Task, result: Result) -> None:
        self._entries[task] = result.entry
        for name, histogram in result.histograms.items():
            add_histogram(self.histograms.setdefault(name, {}), histogram)

    def _release(self, task: Task) -> None:
        """Deletes a layer output that no task reads any more; its record stays, so that it is not redone."""
        _delete(self.job.tmp, self._entries.pop(task).key)


def drive_tasks(
    plan: TaskGraph,
    job: Job,
    executor: Executor,
    commits: Commits,
    progress: Callable[[int, int], None],
    ownership_check: Callable[[], None] = lambda: None,
) -> _Run:
    """Runs all tasks of ``plan`` that are not committed yet, and returns what came of them."""
    run = _Run(plan, job, executor, commits, ownership_check)
    run.drive(progress)
    return run
