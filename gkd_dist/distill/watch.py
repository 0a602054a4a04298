"""Tells TensorBoard and the driver how a training run goes; lives on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gkd_dist import layout
from gkd_dist.distill.checkpoint import TrainState
from gkd_dist.distill.step import StepReport
from gkd_dist.distill.validation import Metrics
from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
from gkd_dist.telemetry import peak_rss_bytes
from gkd_dist.tensorboard import MetricsWriter

PROGRESS = "progress.json"
_EVERY_S = 1.0


@dataclass(frozen=True)
class TrainProgress:
    """Where a training run is."""

    name: str
    epoch: int  # epochs finished
    epochs: int
    val: float | None = None
    best_val: float | None = None

    def __str__(self) -> str:
        return f"val {self.val:.4f}" if self.val is not None else ""


Report = Callable[[TrainProgress], None]


def report_to_store(folder: Storage) -> Report:
    """Leaves the progress in the model's folder, for a driver on another machine; best effort."""
    last = [0.0]

    def report(progress: TrainProgress) -> None:
        now = time.monotonic()
        if now - last[0] < _EVERY_S and progress.epoch < progress.epochs:
            return
        last[0] = now
        try:
            folder.write_json(PROGRESS, asdict(progress))
        except StorageError:
            return  # only the progress bar is poorer for it

    return report


class RunWatcher:
    """Writes the metrics of one model and passes its progress on."""

    def __init__(self, run: Storage, name: str, epochs: int, first_step: int, report: Report) -> None:
        self._writer = MetricsWriter(run, f"{layout.TENSORBOARD}/{name}", purge_step=first_step + 1)
        self._name, self._epochs, self._report = name, epochs, report

    def step(self, step: int, report: StepReport, names: list[str], extra: Mapping[str, float]) -> None:
        """One point per term, the total, and what else the loop measured."""
        for name, value, count in zip(names, report.means.tolist(), report.counts.tolist(), strict=True):
            if count:
                self._writer.scalar(f"loss/{name}", value, step)
                if name == "lsp":
                    self._writer.scalar("lsp/kl", value, step)
        self._writer.scalar("loss/total", report.total, step)
        for key, number in extra.items():
            self._writer.scalar(key, number, step)
        self._writer.scalar("memory/rss_bytes", peak_rss_bytes(), step)
        if torch.cuda.is_available():
            self._writer.scalar("memory/device_bytes", torch.cuda.max_memory_allocated(), step)

    def evaluation(self, step: int, epoch: int, metrics: Metrics, state: TrainState) -> None:
        """Metrics per split, and a line of progress."""
        for split, value in metrics.items():
            if value is not None:
                self._writer.scalar(f"accuracy/{split}", value, step)
        self._writer.scalar("epoch", epoch + 1, step)
        best = None if state.best_metric < 0 else state.best_metric
        self._report(TrainProgress(self._name, epoch + 1, self._epochs, metrics.get("val"), best))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Text of the finished run."""
        lines = [f"| {key} | {value} |" for key, value in values.items()]
        self._writer.text("summary", "\n".join(["| key | value |", "| --- | --- |", *lines]), 0)

    def close(self) -> None:
        """Writes what is still buffered."""
        self._writer.close()
