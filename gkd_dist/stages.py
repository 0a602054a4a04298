"""What each stage reads, writes and does. `flow` decides which of them run.

A stage is finished when the document that it writes last carries the fingerprint that the
configuration and its inputs give today.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gkd_dist import fingerprints as fp
from gkd_dist import layout
from gkd_dist.config import Config, LabelLoss
from gkd_dist.errors import ConfigError, DataError, ManifestError, ModelError, NewerSchemaError
from gkd_dist.models.io import read_model_document
from gkd_dist.partition.store import GraphStore
from gkd_dist.plan import plan_knowledge, say_knowledge
from gkd_dist.preflight import check_student
from gkd_dist.session import Session
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage

if TYPE_CHECKING:
    from gkd_dist.stream.ensemble import Ensemble

log = logging.getLogger(__name__)

# --- partition -------------------------------------------------------------------------------


def partition_fingerprint(session: Session) -> str:
    """Of the graph store."""
    return fp.graph_fingerprint(session.config)


def partition_done(session: Session) -> bool:
    """Whether the graph store is there and of today's configuration."""
    return manifest_fingerprint(session.graph, "graph") == partition_fingerprint(session)


def partition(session: Session) -> None:
    """Reads the data set, cuts it and writes the graph store."""
    from gkd_dist.data.sources import load_graph
    from gkd_dist.partition.build import build_graph_store

    config = session.config
    with session.progress.task("partition", total=config.partition.num_parts) as task:
        graph = load_graph(config.graph, config.seed, storage=config.storage)
        build_graph_store(
            graph,
            session.graph,
            config.partition,
            halo_hops=config.halo_hops(),
            seed=config.seed if config.partition.seed is None else config.partition.seed,
            fingerprint=partition_fingerprint(session),
            advance=task.advance,
            before_commit=session.check_ownership,
        )


def partition_discard(session: Session) -> None:
    """Takes the manifest away; the parts are written again under the same names or become orphans."""
    _discard_manifest(session.graph, "graph")


def _discard_manifest(folder: Storage, kind: str) -> None:
    manifest_fingerprint(folder, kind)  # raises where a later version wrote it
    folder.delete(layout.MANIFEST)


def manifest_fingerprint(storage: Storage, kind: str) -> str | None:
    """Fingerprint of a finished store; None where there is none or it cannot be read."""
    if not storage.exists(layout.MANIFEST):
        return None
    try:
        return Manifest.load(storage, kind).fingerprint
    except NewerSchemaError:
        raise
    except ManifestError as error:
        log.warning("%s; it will be written again", error)
        return None


def open_graph(session: Session) -> GraphStore:
    """The graph store of today's configuration; `ManifestError` names the stage that makes it."""
    return session.once("graph", lambda: GraphStore.open(session.graph, partition_fingerprint(session)))


# --- teach -----------------------------------------------------------------------------------


def teach_fingerprint(session: Session) -> str:
    """Of the teacher, or of several; reads the checkpoint where the configuration names one."""
    config = session.config
    if config.teachers:
        return fp.of_several({view.config.teacher.name: teach_fingerprint(view) for view in session.views()})
    if config.teacher.checkpoint is None:
        return fp.trained_teacher_fingerprint(config)
    return session.once("teacher", lambda: fp.given_teacher_fingerprint(config, _state_digest(_checkpoint(session))))


def teach_done(session: Session) -> bool:
    """Whether each teacher's folder holds that teacher."""
    return all(model_fingerprint(view.teacher) == teach_fingerprint(view) for view in session.views())


def teach(session: Session) -> None:
    """Trains each teacher that is not done in this process, or takes over its checkpoint."""
    check_student(session.config, open_graph(session).manifest.meta)  # before the teacher's work, for nothing otherwise
    for view in session.views():
        if view is not session and teach_done(view):
            continue
        _try_teacher(view)
        if view.config.teacher.checkpoint is None:
            _train_teacher(view)
        else:
            _adopt_teacher(view)


def _try_teacher(session: Session) -> None:
    """Refuses, before any work, a teacher that inference would refuse after it; on a tiny graph, without its weights.

    Raises `ModelError`.
    """
    import torch

    from gkd_dist.infer.taps import check_taps
    from gkd_dist.models.build import build_model, resolve_model
    from gkd_dist.models.probe import check_model

    graph, teacher = open_graph(session), session.config.teacher
    meta, width = graph.manifest.meta, graph.num_features_of(teacher.features)
    with torch.random.fork_rng(devices=[]):
        model = build_model(resolve_model(teacher.model, meta), width, int(meta["num_classes"])).eval()
    check_model(model, width, bool(meta["has_edge_weight"]), graph.num_edge_features)
    check_taps(model, session.config.infer.taps)


def teach_discard(session: Session) -> None:
    """Takes all teachers and their checkpoints away."""
    for view in session.views():
        _discard_model(view.teacher)


def _discard_model(folder: Storage) -> None:
    model_fingerprint(folder)  # raises where a later version wrote it
    folder.delete(layout.MODEL_JSON)  # first: from now on there is no model
    folder.delete_tree(layout.CHECKPOINTS)


def _checkpoint(session: Session) -> dict[str, Tensor]:
    from gkd_dist.models.io import read_checkpoint

    assert session.config.teacher.checkpoint is not None
    return read_checkpoint(session.config.teacher.checkpoint, session.config.storage)


def _state_digest(state: dict[str, Tensor]) -> str:
    from gkd_dist.shards.codec import encode

    return hashlib.sha256(encode({name: value.contiguous() for name, value in state.items()})).hexdigest()


def _adopt_teacher(session: Session) -> None:
    from gkd_dist.models.build import build_model, resolve_model
    from gkd_dist.models.fit import load_weights
    from gkd_dist.models.io import ModelSpec, save_model

    graph, config = open_graph(session), session.config
    meta, state, features = graph.manifest.meta, _checkpoint(session), config.teacher.features
    kind, width, num_classes = (
        resolve_model(config.teacher.model, meta),
        graph.num_features_of(features),
        int(meta["num_classes"]),
    )
    model = build_model(kind, width, num_classes)
    load_weights(model, state, str(config.teacher.checkpoint))
    spec = ModelSpec(kind, width, num_classes, meta["task"], features=features)
    session.check_ownership()
    save_model(session.teacher, model, spec, fp.given_teacher_fingerprint(config, _state_digest(state)))


def _train_teacher(session: Session) -> None:
    from gkd_dist.distill.job import train_inline
    from gkd_dist.distill.task import TrainTask

    config = session.config
    task = TrainTask(
        session.teacher_label,
        session.teacher,
        open_graph(session),
        None,
        config.teacher.model,
        (LabelLoss(kind="label"),),
        config.teacher.train,
        config.teacher.model.layers,
        config.seed if config.teacher.seed is None else config.teacher.seed,
        teach_fingerprint(session),
        config.teacher.features,
    )
    with session.progress.task(f"teach{_of_which(session)}", total=config.teacher.train.epochs) as bar:
        train_inline(session.run, task, _follow(bar), owns_run=session.check_ownership)


def _of_which(session: Session) -> str:
    """Which of several teachers, for people."""
    return "" if session.is_whole else f" {session.config.teacher.name}"


def model_fingerprint(folder: Storage) -> str | None:
    """Fingerprint of a finished model; None where there is none or it cannot be read."""
    if not folder.exists(layout.MODEL_JSON):
        return None
    try:
        return str(read_model_document(folder).get("fingerprint"))
    except NewerSchemaError:
        raise
    except ModelError as error:
        log.warning("%s", error)
        return None


def _follow(bar: Any) -> Any:
    """Moves a progress bar to the epoch that training has reached."""
    reached = [0]

    def follow(progress: Any) -> None:
        bar.advance(max(0, progress.epoch - reached[0]), text=str(progress))
        reached[0] = max(reached[0], progress.epoch)

    return follow


# --- infer -----------------------------------------------------------------------------------


def infer_fingerprint(session: Session) -> str:
    """Of the teacher's knowledge, or of that of several; needs the graph store and the teachers."""
    return session.once("knowledge", lambda: _infer_fingerprint(session))


def _infer_fingerprint(session: Session) -> str:
    if session.config.teachers:
        return fp.of_several({view.config.teacher.name: infer_fingerprint(view) for view in session.views()})
    graph = open_graph(session)
    document = read_model_document(session.teacher)
    scores, embeddings = plan_knowledge(session.config, graph.manifest.meta)
    wants: dict[str, Any] = {
        "scores": {str(k): sorted(v) for k, v in scores.items()},
        "embeddings": sorted(embeddings),
    }
    if session.config.infer.logits != "all":
        wants["logits"] = [session.config.infer.logits, *packing(session.config).temperatures]
    wants |= fp.inference_details(session.config.infer)
    return fp.knowledge_fingerprint(session.config, teach_fingerprint(session), document["weights"]["sha256"], wants)


def knowledge_folder(session: Session) -> Storage:
    """Folder of the knowledge of a single teacher; of several, each view of the session has its own."""
    return session.knowledge.child(layout.knowledge(session.config.teacher.name, infer_fingerprint(session)))


def infer_done(session: Session) -> bool:
    """Whether the knowledge is complete; `DataError` where it is too coarse for a width that has changed since."""
    return all(_knows(view) for view in session.views())


def _knows(session: Session) -> bool:
    folder = knowledge_folder(session)
    if manifest_fingerprint(folder, "knowledge") != infer_fingerprint(session):
        return False
    if session.config.infer.max_kl is not None:
        from gkd_dist.infer.knowledge import refuse_coarse

        manifest = Manifest.load(folder, "knowledge")
        refuse_coarse(manifest.meta, manifest.parts, packing(session.config))
    return True


def packing(config: Config) -> Any:
    """How the teacher's knowledge is stored."""
    from gkd_dist.infer.packing import Packing

    return Packing.of(config.infer, config.losses, config.teacher.model.layers)


def infer_wants(session: Session) -> Any:
    """What is kept of every part."""
    from gkd_dist.infer.plan import Wants

    scores, embeddings = plan_knowledge(session.config, open_graph(session).manifest.meta)
    return Wants(True, scores, embeddings, session.config.infer.taps)


def infer_discard(session: Session) -> None:
    """Takes this knowledge away, and what a half-finished inference left."""
    for view in session.views():
        _discard_knowledge(view)


def _discard_knowledge(session: Session) -> None:
    try:
        folder = knowledge_folder(session)
    except NewerSchemaError:
        raise
    except (ManifestError, ModelError):
        return  # without its graph or its teacher there is no such knowledge
    _discard_manifest(folder, "knowledge")
    folder.delete_tree(layout.layer_outputs(infer_fingerprint(session)))


def infer(session: Session) -> None:
    """Runs each teacher that is not done over every node and stores what the losses need."""
    for view in session.views():
        if view is session or not _knows(view):
            _infer_one(view)


def _infer_one(session: Session) -> None:
    from gkd_dist.infer.run import infer_nodes

    graph = open_graph(session)
    check_losses(session.config, graph)  # before the teacher's work, which would be for nothing
    check_student(session.config, graph.manifest.meta)
    say_knowledge(session.config, graph.manifest.meta)
    with task_progress(session, f"infer{_of_which(session)}") as progress:
        infer_nodes(
            session.teacher,
            graph,
            knowledge_folder(session),
            infer_wants(session),
            session.config.infer,
            fingerprint=infer_fingerprint(session),
            packing=packing(session.config),
            pool=session.actors(),
            allow_code=session.allow_code,
            progress=progress,
            ownership_check=session.check_ownership,
        )


@contextmanager
def task_progress(session: Session, name: str) -> Iterator[Any]:
    """A bar whose total is known once the tasks are planned."""
    with session.progress.task(name, total=None) as bar:
        reached = [0]

        def report(done: int, total: int) -> None:
            bar.advance(done - reached[0], total=total)
            reached[0] = done

        yield report


# --- distill ---------------------------------------------------------------------------------


def student_fingerprints(session: Session) -> dict[str, str]:
    """Fingerprint of each student of the run, by name."""
    names = {"distilled": fp.student_fingerprint(session.config, _learned_fingerprint(session))}
    if session.config.student.alone:
        names["alone"] = fp.student_fingerprint(session.config, None)
    return names


def _learned_fingerprint(session: Session) -> str:
    """Of the knowledge that the distilled student reads; a teacher that no loss reads has no part in it."""
    if not session.config.teachers:
        return infer_fingerprint(session)
    return fp.of_several({view.config.teacher.name: infer_fingerprint(view) for view in _read_views(session)})


def _read_views(session: Session) -> list[Session]:
    """The views of the teachers that a loss reads."""
    config = session.config
    read = {teacher.name for loss in config.losses for teacher in config.readers_of(loss)}
    return [view for view in session.views() if view.config.teacher.name in read]


def distill_fingerprint(session: Session) -> str:
    """Of all students together."""
    return fp.evaluation_fingerprint(student_fingerprints(session), "")


def distill_done(session: Session) -> bool:
    """Whether every student is trained."""
    return all(model_fingerprint(session.student(n)) == f for n, f in student_fingerprints(session).items())


def distill_discard(session: Session) -> None:
    """Takes all students and their checkpoints away."""
    for name in ("distilled", "alone"):
        _discard_model(session.student(name))


def student_tasks(session: Session) -> tuple[Any, ...]:
    """One training task per student, the distilled one first."""
    from gkd_dist.distill.task import TrainTask

    config, graph = session.config, open_graph(session)
    knowledge = open_knowledge(session, _read_views(session)) if config.teachers else open_knowledge(session)
    depths = {teacher.name: teacher.model.layers for teacher in config.teachers} or config.teacher.model.layers
    label = tuple(loss for loss in config.losses if isinstance(loss, LabelLoss)) or (LabelLoss(kind="label"),)
    return tuple(
        TrainTask(
            name,
            session.student(name),
            graph,
            knowledge if name == "distilled" else None,
            config.student.model,
            config.student_losses() if name == "distilled" else label,
            config.distill,
            depths,
            config.seed,
            fingerprint,
            config.student.features,
        )
        for name, fingerprint in student_fingerprints(session).items()
    )


def open_knowledge(session: Session, views: Sequence[Session] | None = None) -> tuple[Storage, Manifest] | Ensemble:
    """What the teacher knows, or what all of several do, or those of ``views``.

    `ManifestError` names the stage that makes it.
    """
    from gkd_dist.stream.ensemble import Ensemble

    stored = {view.config.teacher.name: _open_one(view) for view in (session.views() if views is None else views)}
    return Ensemble(stored) if session.config.teachers else next(iter(stored.values()))


def _open_one(session: Session) -> tuple[Storage, Manifest]:
    storage = knowledge_folder(session)
    return storage, Manifest.load(storage, "knowledge", infer_fingerprint(session))


def distill(session: Session) -> None:
    """Trains the students with the configured launcher."""
    from gkd_dist.distill.job import TrainJob, run_inline

    config = session.config.distill
    tasks, graph = student_tasks(session), open_graph(session)
    found = check_student(session.config, graph.manifest.meta)
    if not found.layered:
        log.warning("student: %s", found.sentence(int(graph.manifest.meta["halo_hops"])))
    if os.environ.get("RANK", "0") == "0":  # one voice of a group that a launcher started
        _say_what_is_approximate(session, graph)
    job = TrainJob(session.run, tasks, config, session.owner)
    if config.launcher in ("torchrun", "deepspeed"):
        _distill_in_group(job)
        return
    with session.progress.task("distill", total=config.epochs * len(tasks)) as bar:
        follow = _follow_many(bar, config.epochs, [task.name for task in tasks])
        if config.launcher == "inline":
            run_inline(job, lambda task: follow)
            return
        from gkd_dist.distill.placement import train_on_ray

        _say_cache(tasks[0])
        session.make_room_for_workers()
        session.start_ray()
        train_on_ray(job, follow)


def _say_what_is_approximate(session: Session, graph: GraphStore) -> None:
    """Once, where fewer hops are stored than training needs."""
    from gkd_dist.little_halo import what_is_approximate

    known = [(view.config, *_open_one(view)) for view in _read_views(session)]
    if line := what_is_approximate(session.config, graph, known):
        log.warning("%s", line)


def _say_cache(task: Any) -> None:
    """What workers keep on the disks of their machines, where they do: theirs is a log that nobody reads."""
    from gkd_dist.stream.node_cache import describe_cache, stores_of

    if line := describe_cache(stores_of(task.graph, task.knowledge), task.train.cache):
        log.info("%s", line)


def _distill_in_group(job: Any) -> None:
    """This process is one rank of a group that torchrun or the deepspeed launcher started."""
    from gkd_dist.distill.job import run_in_group
    from gkd_dist.distill.watch import report_to_store
    from gkd_dist.world import World

    world = World.from_env(use_gpu=job.config.gpus_per_worker > 0)
    if world.world_size != job.config.num_workers:
        raise ConfigError(
            f"the launcher started {world.world_size} processes, distill.num_workers is {job.config.num_workers}; "
            f"set distill.num_workers={world.world_size}"
        )
    run_in_group(job, world, lambda task: report_to_store(task.output))


def _follow_many(bar: Any, epochs: int, names: list[str]) -> Any:
    """One bar for students that train one after the other."""
    reached = [0]

    def follow(progress: Any) -> None:
        place = names.index(progress.name) * epochs + progress.epoch
        bar.advance(max(0, place - reached[0]), text=f"{progress.name} {progress}")
        reached[0] = max(reached[0], place)

    return follow


def check_losses(config: Config, graph: GraphStore) -> None:
    """`DataError` for an LSP term on a graph without edges, `ConfigError` for the largest of binary labels."""
    if config.infer.logits != "all" and graph.manifest.meta["task"] == "multilabel":
        raise ConfigError(
            f"infer.logits is {config.infer.logits}, but the labels of this graph are each yes or no and have no "
            "largest ones; set infer.logits=all"
        )
    has_lsp = any(loss.kind == "lsp" for loss in config.losses)
    if has_lsp and not any(part.counts["num_lsp_nodes"] for part in graph.manifest.parts):
        raise DataError(
            "an LSP loss needs edges, but no node of the graph has an in-neighbour other than itself; "
            "remove the lsp term or choose a graph with edges"
        )
