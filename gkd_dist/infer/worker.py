"""One worker: reads what a task needs, computes it, writes it, and reports only metadata.

The same class works inside a Ray actor and in the driver's own process. Several threads may call
`Worker.run` at once: reading and writing overlap with the computation, of which there is one at a
time (`device`), so that results do not depend on how many tasks are in flight. Where memory runs
out, the worker goes on with one task at a time (`room`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dist import layout
from gkd_dist.errors import ManifestError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.infer import layerwise
from gkd_dist.infer.device import Device, make_device
from gkd_dist.infer.knowledge import Histogram, embedding_name, measured_scores, score_histogram, score_name
from gkd_dist.infer.packing import LOGITS, Packing, pack_knowledge
from gkd_dist.infer.plan import KNOWLEDGE, Task, Wants
from gkd_dist.infer.room import Room, is_out_of_memory
from gkd_dist.infer.taps import owned_rows, recording
from gkd_dist.infer.tiles import tiles
from gkd_dist.models.io import read_model, read_model_document
from gkd_dist.models.layered import as_layers
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_rows, read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

_HALO_READERS = 8  # range reads at a time, to hide the latency of object stores


@dataclass(frozen=True)
class Job:
    """What all tasks of one inference run share; small and picklable.

    ``depth`` layers are computed one by one, of which the first ``stored`` are stored; 0: the
    model runs on whole parts (k-hop mode).
    ``sends``: layers whose rows bordering parts read. ``tap_layers``: layer of each tap, KNOWLEDGE
    for those outside the layers. ``tmp`` holds the layer outputs, ``out`` the knowledge. ``features``:
    the named features that the model reads, None: ``x``.
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
    stored: int
    sends: frozenset[int]
    packing: Packing
    threads: int
    device: str
    tile_edges: int
    tap_layers: Mapping[str, int]
    features: str | None = None


@dataclass(frozen=True)
class Request:
    """One task and the stored layer outputs that it reads."""

    job: Job
    task: Task
    inputs: Mapping[Task, ObjectEntry]


@dataclass(frozen=True)
class Result:
    """What a task wrote; for knowledge tasks also the histogram of each score tensor.

    ``seconds`` says where the time went (``read``, ``wait`` for other tasks to compute, ``compute``,
    ``write``), ``warning`` what the driver should tell the user once; neither is kept with the
    task's record.
    """

    entry: ObjectEntry
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warning: str | None = None


class Worker:
    """Runs tasks; keeps the model and the graph manifest of the latest job."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._room = Room()
        self._devices: dict[str, Device] = {}
        self._models: dict[tuple[str, str, str], nn.Module] = {}
        self._graphs: dict[tuple[str, str], GraphStore] = {}
        self._readers = ThreadPoolExecutor(_HALO_READERS, "halo")

    def run(self, request: Request) -> Result:
        """Computes ``request.task`` and writes its object.

        Where memory runs out the task is repeated alone; `TeacherError` where that does not help.
        """
        with self._loading:
            model, store, device = self._model(request.job), self._graph(request.job), self._device(request.job)
        single = self._room.is_single
        warning = None
        for _ in range(1 if single else 2):
            work = _Work(request, model, store, device, self._readers)
            with self._room.place():
                try:
                    return replace(work.run(), warning=warning)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    reason = (str(error).strip() or "MemoryError").splitlines()[0]
            del work  # with what it had read
            self._room.shrink()
            device.release()
            warning = (
                f"{request.task} did not fit the memory ({reason}): the worker repeats it alone "
                "and goes on with one task at a time; lower infer.window or infer.tile_edges to begin like that"
            )
        counts = store.manifest.parts[request.task.part].counts
        num_nodes = counts["num_owned"] + counts["num_halo_1"]
        raise layerwise.out_of_memory(request.task, num_nodes, counts["num_owned_edges"], reason)

    def _device(self, job: Job) -> Device:
        if job.device not in self._devices:
            self._devices[job.device] = make_device(job.device)
        return self._devices[job.device]

    def _model(self, job: Job) -> nn.Module:
        key = (job.model.url, job.model_digest, job.device)
        if key not in self._models:
            device = self._device(job)
            model, _ = read_model(job.model, job.allow_code)
            if model_digest(read_model_document(job.model)) != job.model_digest:
                raise ModelError(
                    f"the model at {job.model.url} changed while it was in use; run the same command again"
                )
            self._models = {key: model.to(device.name)}
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
    """One task at work."""

    def __init__(
        self, request: Request, model: nn.Module, store: GraphStore, device: Device, readers: ThreadPoolExecutor
    ) -> None:
        self.request, self.model, self.store, self.device = request, model, store, device
        self.job, self.task = request.job, request.task
        self.counts = store.manifest.parts[self.task.part].counts
        self._readers = readers
        self._compute_s = self._wait_s = 0.0

    def run(self) -> Result:
        """Reads, computes, writes."""
        started = time.perf_counter()
        make = self._make_knowledge if self.task.layer == KNOWLEDGE else self._make_layer
        write = make()
        made = time.perf_counter()
        result = write()
        seconds = {
            "read": made - started - self._compute_s - self._wait_s,
            "wait": self._wait_s,
            "compute": self._compute_s,
            "write": time.perf_counter() - made,
        }
        return replace(result, seconds=seconds)

    def _make_layer(self) -> Callable[[], Result]:
        """Computes one layer of the owned nodes; returns what writes it."""
        layer, sends = self.task.layer, self.task.layer in self.job.sends
        part = self._part(*(layerwise.SENDS if sends else ()))
        z, tapped = self._compute_layer(layer, self._below(layer, part), layerwise.one_hop_graph(part, self.counts))
        layerwise.check_finite({"output": z, **tapped}, str(self.task))
        tensors = layerwise.layer_tensors(z, part, sends)
        tensors |= {layerwise.tap_name(tap): values for tap, values in tapped.items()}
        stem = f"layer-{layer}/{layout.part(self.task.part)}"
        return lambda: Result(write_shard(self.job.tmp, stem, tensors))

    def _compute_layer(self, layer: int, below: Tensor, graph: LocalGraph) -> tuple[Tensor, dict[str, Tensor]]:
        """``z_layer`` of the owned nodes and what taps in that layer have seen, tile by tile."""
        taps = self._taps(layer)
        pieces = []
        for nodes, tile in tiles(graph, self.job.tile_edges):
            with self.device.gathering():
                rows = self.device.upload(below if nodes is None else below[nodes])
                tile = self.device.upload_graph(tile)
                with self._computing(), recording(self.model, taps) as recorded:
                    z = layerwise.compute_layer(self.model, layer, rows, tile)
                    found = owned_rows(recorded, tile.num_rows, tile.num_nodes, str(self.task))
                del rows, tile, recorded
            pieces.append({"": self.device.download(z), **{k: self.device.download(v) for k, v in found.items()}})
        joined = pieces[0] if len(pieces) == 1 else {k: torch.cat([p[k] for p in pieces]) for k in pieces[0]}
        return joined.pop(""), joined

    def _below(self, layer: int, part: dict[str, Tensor]) -> Tensor:
        """What ``layer`` reads of owned and first-hop halo nodes: features, or the layer below it."""
        if layer == 1:
            return self.store.inputs(self.task.part, self.job.features)[
                : self.counts["num_owned"] + self.counts["num_halo_1"]
            ]
        return self._owned_and_halo(layer - 1, part)

    def _taps(self, layer: int) -> list[str]:
        return sorted(tap for tap, where in self.job.tap_layers.items() if where == layer)

    def _make_knowledge(self) -> Callable[[], Result]:
        """Gathers what is kept of the part; returns what writes it."""
        wants = self.job.wants
        part = self._part()
        outputs = {layer: self._owned_and_halo(layer, part) for layer in wants.layers}
        tensors = {embedding_name(layer): outputs[layer] for layer in sorted(wants.embeddings)}
        tensors |= self._last_layer(part, outputs)
        tensors |= self._logits_and_taps(part, outputs)
        histograms, measured = {}, measured_scores(wants, self.job.packing)
        if any(measured.values()):
            scores, graph = self._scores(part, outputs, measured)
            loops = graph.pattern.rows() == graph.pattern.indices
            histograms = {name: score_histogram(values, loops) for name, values in scores.items()}
            tensors |= {score_name(*score): scores[score_name(*score)] for score in wants.score_names()}
        layerwise.check_finite(tensors, str(self.task))
        indptr = part["indptr"][: self.counts["num_owned"] + 1]
        stored, meta = pack_knowledge(tensors, indptr, self.job.packing, f"part {self.task.part}")
        counts = {name: self.counts[name] for name in ("num_owned", "num_halo_1", "num_owned_edges")}
        stem = layout.part(self.task.part)
        return lambda: Result(write_shard(self.job.out, stem, stored, counts, meta), histograms)

    def _last_layer(self, part: dict[str, Tensor], outputs: dict[int, Tensor]) -> dict[str, Tensor]:
        """Computes the last layer where it is not stored, into ``outputs``; returns its taps."""
        layer = self.job.depth
        if layer == self.job.stored:
            return {}
        below = outputs[layer - 1] if layer - 1 in outputs else self._below(layer, part)
        outputs[layer], tapped = self._compute_layer(layer, below, layerwise.one_hop_graph(part, self.counts))
        layerwise.check_finite({"output": outputs[layer], **tapped}, str(Task(layer, self.task.part)))
        return {layerwise.tap_name(tap): values for tap, values in tapped.items()}

    def _logits_and_taps(self, part: dict[str, Tensor], outputs: dict[int, Tensor]) -> dict[str, Tensor]:
        """Logits [o, c] where they are wanted, and the taps; in k-hop mode by running the whole model."""
        found = {}
        for tap, layer in self.job.tap_layers.items():
            if KNOWLEDGE < layer <= self.job.stored:
                name = layerwise.tap_name(tap)
                found[name] = self._read(Task(layer, self.task.part), name)
        taps = self._taps(KNOWLEDGE)
        if not self.job.wants.logits and not taps:
            return found
        if self.job.depth == 0:
            logits, tapped = self._run_whole(part, taps)
        else:
            logits, tapped = self._read_out(outputs, taps)
        found |= {layerwise.tap_name(tap): values for tap, values in tapped.items()}
        return {LOGITS: logits, **found} if self.job.wants.logits else found

    def _run_whole(self, part: dict[str, Tensor], taps: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.device.upload(self.store.inputs(self.task.part, self.job.features))
        graph = self.device.upload_graph(layerwise.khop_graph(part))
        with self._computing(), recording(self.model, taps) as recorded:
            logits = layerwise.compute_khop(self.model, x, graph, self.counts["num_owned"])
            tapped = owned_rows(recorded, self.counts["num_owned"], graph.num_nodes, str(self.task))
        return self.device.download(logits), {tap: self.device.download(values) for tap, values in tapped.items()}

    def _read_out(self, outputs: dict[int, Tensor], taps: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits from the outputs of the layers that they are made of."""
        layers, num_owned = as_layers(self.model), self.counts["num_owned"]
        assert layers is not None
        rows = {
            layer: outputs[layer][:num_owned] if layer in outputs else self._read(Task(layer, self.task.part), "owned")
            for layer in layers.readout_layers
        }
        uploaded = {layer: self.device.upload(values) for layer, values in rows.items()}
        with self._computing(), recording(self.model, taps) as recorded:
            logits = layerwise.compute_readout(layers, uploaded)
            tapped = owned_rows(recorded, num_owned, num_owned, str(self.task))
        return self.device.download(logits), {tap: self.device.download(values) for tap, values in tapped.items()}

    def _scores(
        self, part: dict[str, Tensor], outputs: dict[int, Tensor], measured: Mapping[int, Collection[str]]
    ) -> tuple[dict[str, Tensor], LocalGraph]:
        graph = layerwise.one_hop_graph(part, self.counts)
        scores: dict[str, Tensor] = {}
        on_device = self.device.upload_graph(graph)
        for layer, metrics in sorted(measured.items()):
            z = self.device.upload(outputs[layer])
            with self._computing():
                found = layerwise.edge_scores(z, on_device, sorted(metrics))
            scores |= {score_name(layer, metric): self.device.download(values) for metric, values in found.items()}
        return scores, graph

    def _part(self, *names: str) -> dict[str, Tensor]:
        """Structure of the part, with its transpose where the model runs on the whole of it, and ``names``."""
        structure = layerwise.FORWARD if self.job.depth else layerwise.STRUCTURE
        return self.store.part(self.task.part, [*structure, *names])

    def _owned_and_halo(self, layer: int, part: dict[str, Tensor]) -> Tensor:
        """Stored output of ``layer`` on owned and first-hop halo nodes, [n, d_layer]."""
        sources = layerwise.halo_sources(part, self.counts)
        copies = layerwise.copy_name(self.task.part)
        reads = [(Task(layer, self.task.part), "owned"), *((Task(layer, source), copies) for source in sources)]
        shapes = [self._shape(*read) for read in reads]
        found, expected = sum(shape[0] for shape in shapes), self.counts["num_owned"] + self.counts["num_halo_1"]
        if found != expected:
            raise ManifestError(
                f"layer {layer} has {found} rows for part {self.task.part} and its halo, expected {expected}: "
                f"the layer outputs are of another cut; delete {self.job.tmp.url} and run again"
            )
        rows = torch.empty(expected, *shapes[0][1:])
        blocks = rows.split([shape[0] for shape in shapes])
        list(self._readers.map(self._read_block, reads, blocks))
        return rows

    def _shape(self, of: Task, name: str) -> tuple[int, ...]:
        tensor = self.request.inputs[of].tensor(name)
        return (0,) if tensor is None else tensor.shape

    def _read_block(self, read: tuple[Task, str], out: Tensor) -> None:
        of, name = read
        read_rows(self.job.tmp, self.request.inputs[of], [name], out)

    def _read(self, of: Task, name: str) -> Tensor:
        return read_shard(self.job.tmp, self.request.inputs[of], [name])[name]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The device for one computation, whose time is counted."""
        asked = time.perf_counter()
        with self.device.computing(self.job.threads) as clock:
            yield
        self._compute_s += clock.seconds
        self._wait_s += time.perf_counter() - asked - clock.seconds


def trim(entry: ObjectEntry, names: Sequence[str]) -> ObjectEntry:
    """``entry`` of a bordering part with the tensors ``names`` alone.

    A request would otherwise grow with the borders of the borders.
    """
    return replace(entry, tensors=tuple(tensor for tensor in entry.tensors if tensor.name in names))
