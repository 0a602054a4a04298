"""One worker: reads what a task needs, computes it, writes it, and reports only metadata.

The same class works inside a Ray actor and in the driver's own process. Several threads may call
`Worker.run` at once: reading and writing overlap, computing does not, so that results do not depend
on how many tasks are in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dist import layout
from gkd_dist.errors import ConfigError, ManifestError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.infer import layerwise
from gkd_dist.infer.knowledge import Histogram, embedding_name, measured_scores, score_histogram, score_name
from gkd_dist.infer.packing import Packing, pack_knowledge
from gkd_dist.infer.plan import KNOWLEDGE, Task, Wants
from gkd_dist.models.io import read_model, read_model_document
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

_HALO_READERS = 8  # range reads at a time, to hide the latency of object stores


@dataclass(frozen=True)
class Job:
    """What all tasks of one inference run share; small and picklable.

    ``depth`` layers are computed one by one; 0: the model runs on whole parts (k-hop mode).
    ``sends``: layers whose rows bordering parts read. ``tmp`` holds the layer outputs, ``out`` the
    knowledge.
    """

    model: Storage
    model_digest: str
    allow_code: tuple[str, ...]
    graph: Storage
    graph_fingerprint: str
    tmp: Storage
    out: Storage
    wants: Wants
    depth: int
    sends: frozenset[int]
    packing: Packing
    threads: int
    device: str


@dataclass(frozen=True)
class Request:
    """One task and the stored layer outputs that it reads."""

    job: Job
    task: Task
    inputs: Mapping[Task, ObjectEntry]


@dataclass(frozen=True)
class Result:
    """What a task wrote; for knowledge tasks also the histogram of each score tensor."""

    entry: ObjectEntry
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


class Worker:
    """Runs tasks; keeps the model and the graph manifest of the latest job."""

    def __init__(self) -> None:
        self._computing = threading.Lock()
        self._loading = threading.Lock()
        self._models: dict[tuple[str, str, str], nn.Module] = {}
        self._graphs: dict[tuple[str, str], GraphStore] = {}

    def run(self, request: Request) -> Result:
        """Computes ``request.task`` and writes its object."""
        with self._loading:
            model, store = self._model(request.job), self._graph(request.job)
        work = _Work(request, model, store, self._computing)
        return work.knowledge() if request.task.layer == KNOWLEDGE else work.layer()

    def _model(self, job: Job) -> nn.Module:
        key = (job.model.url, job.model_digest, job.device)
        if key not in self._models:
            if job.device != "cpu" and not torch.cuda.is_available():
                raise ConfigError("infer.gpus_per_actor is above 0 but this process sees no CUDA device; set it to 0")
            model, _ = read_model(job.model, job.allow_code)
            if model_digest(read_model_document(job.model)) != job.model_digest:
                raise ModelError(
                    f"the model at {job.model.url} changed while it was in use; run the same command again"
                )
            self._models = {key: model.to(job.device)}
        return self._models[key]

    def _graph(self, job: Job) -> GraphStore:
        key = (job.graph.url, job.graph_fingerprint)
        if key not in self._graphs:
            self._graphs = {key: GraphStore.open(job.graph, job.graph_fingerprint)}
        return self._graphs[key]


def model_digest(document: Mapping[str, Any]) -> str:
    """Digest of the weights, as ``model.json`` states it."""
    return str(document.get("weights", {}).get("sha256"))


class _Work:
    """One task at work: read, compute, write."""

    def __init__(self, request: Request, model: nn.Module, store: GraphStore, computing: threading.Lock) -> None:
        self.request, self.model, self.store = request, model, store
        self.job, self.task = request.job, request.task
        self.counts = store.manifest.parts[self.task.part].counts
        self._computing = computing

    def layer(self) -> Result:
        """Computes one layer of the owned nodes."""
        layer, sends = self.task.layer, self.task.layer in self.job.sends
        part = self._part(*(layerwise.SENDS if sends else ()), *(layerwise.FEATURES if layer == 1 else ()))
        if layer == 1:
            below = layerwise.first_input(part, self.counts, self.store.num_features)
        else:
            below = self._owned_and_halo(layer - 1, part)
        graph = layerwise.one_hop_graph(part, self.counts)
        with self._compute():
            moved = below.to(self.job.device), graph.to(self.job.device)
            z = layerwise.compute_layer(self.model, layer, *moved, self.counts["num_owned"]).cpu()
        layerwise.check_finite({"output": z}, str(self.task))
        tensors = layerwise.layer_tensors(z, part, sends)
        return Result(write_shard(self.job.tmp, f"layer-{layer}/{layout.part(self.task.part)}", tensors))

    def knowledge(self) -> Result:
        """Gathers what is kept of the part."""
        wants = self.job.wants
        part = self._part(*(() if self.job.depth else layerwise.FEATURES))
        outputs = {layer: self._owned_and_halo(layer, part) for layer in wants.layers}
        tensors = {embedding_name(layer): outputs[layer] for layer in sorted(wants.embeddings)}
        if wants.logits:
            tensors["logits"] = self._logits(part, outputs)
        histograms, measured = {}, measured_scores(wants, self.job.packing)
        if any(measured.values()):
            scores, graph = self._scores(part, outputs, measured)
            loops = graph.pattern.rows() == graph.pattern.indices
            histograms = {name: score_histogram(values, loops) for name, values in scores.items()}
            tensors |= {score_name(*score): scores[score_name(*score)] for score in wants.score_names()}
        layerwise.check_finite(tensors, str(self.task))
        indptr = part["indptr"][: self.counts["num_owned"] + 1]
        stored, meta = pack_knowledge(tensors, indptr, self.job.packing, f"part {self.task.part}")
        entry = write_shard(
            self.job.out,
            layout.part(self.task.part),
            stored,
            {name: self.counts[name] for name in ("num_owned", "num_halo_1", "num_owned_edges")},
            meta,
        )
        return Result(entry, histograms)

    def _logits(self, part: dict[str, Tensor], outputs: dict[int, Tensor]) -> Tensor:
        depth = self.job.depth
        if depth == 0:
            with self._compute():
                return layerwise.compute_khop(self.model, part, self.store.num_features, self.job.device).cpu()
        if depth in outputs:
            return outputs[depth][: self.counts["num_owned"]]
        return self._read(Task(depth, self.task.part), "owned")

    def _scores(
        self, part: dict[str, Tensor], outputs: dict[int, Tensor], measured: Mapping[int, Collection[str]]
    ) -> tuple[dict[str, Tensor], LocalGraph]:
        graph = layerwise.one_hop_graph(part, self.counts)
        scores: dict[str, Tensor] = {}
        with self._compute():
            on_device = graph.to(self.job.device)
            for layer, metrics in sorted(measured.items()):
                z = outputs[layer].to(self.job.device)
                found = layerwise.edge_scores(z, on_device, sorted(metrics))
                scores |= {score_name(layer, metric): values.cpu() for metric, values in found.items()}
        return scores, graph

    def _part(self, *names: str) -> dict[str, Tensor]:
        return self.store.part(self.task.part, [*layerwise.STRUCTURE, *names])

    def _owned_and_halo(self, layer: int, part: dict[str, Tensor]) -> Tensor:
        """Stored output of ``layer`` on owned and first-hop halo nodes, [n, d_layer]."""
        sources = layerwise.halo_sources(part, self.counts)
        copies = layerwise.copy_name(self.task.part)
        reads = [(Task(layer, self.task.part), "owned"), *((Task(layer, source), copies) for source in sources)]
        with ThreadPoolExecutor(_HALO_READERS, "halo") as readers:
            blocks = list(readers.map(lambda read: self._read(*read), reads))
        rows = torch.cat(blocks)
        expected = self.counts["num_owned"] + self.counts["num_halo_1"]
        if rows.size(0) != expected:
            raise ManifestError(
                f"layer {layer} has {rows.size(0)} rows for part {self.task.part} and its halo, expected {expected}: "
                f"the layer outputs are of another cut; delete {self.job.tmp.url} and run again"
            )
        return rows

    def _read(self, of: Task, name: str) -> Tensor:
        return read_shard(self.job.tmp, self.request.inputs[of], [name])[name]

    @contextmanager
    def _compute(self) -> Iterator[None]:
        """One computation at a time, with the configured threads; running out of memory gets its sentence."""
        with self._computing:
            threads = torch.get_num_threads()
            torch.set_num_threads(self.job.threads)
            try:
                yield
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                num_nodes = self.counts["num_owned"] + self.counts["num_halo_1"]
                raise layerwise.out_of_memory(self.task, num_nodes, self.counts["num_owned_edges"], error) from error
            finally:
                torch.set_num_threads(threads)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def trim(entry: ObjectEntry, names: Sequence[str]) -> ObjectEntry:
    """``entry`` of a bordering part with the tensors ``names`` alone.

    A request would otherwise grow with the borders of the borders. At least one tensor that is not
    read must stay, because `read_shard` takes an object whose tensors are all wanted as a whole.
    """
    return replace(entry, tensors=tuple(tensor for tensor in entry.tensors if tensor.name in names))
