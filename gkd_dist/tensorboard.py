"""TensorBoard event files of a run: written by `MetricsWriter`, read back by `read_curves`.

Event files grow by appending, which object stores cannot do. So they are always written to a local
folder: the run's own where it is on a file system, else a temporary one that is mirrored to the
store file by file. TensorBoard is imported on first use.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd_dist.errors import StorageError

if TYPE_CHECKING:
    from gkd_dist.storage import Storage

log = logging.getLogger(__name__)
_EVENTS = "events.out.tfevents."


class MetricsWriter:
    """Scalars, texts and histograms of one model, for ``<run>/tensorboard/<model>``; rank 0 only.

    Steps are optimizer steps. The names, each there only where it is measured, are:

    ======================== ======================================================
    loss/<term>              mean of one term over its nodes, before its weight
    loss/total               weighted sum of the terms
    accuracy/<split>         accuracy or micro-F1 on train, val and test, from 0 to 1
    lr                       learning rate
    grad_norm                gradient norm before clipping
    lsp/kl                   LSP divergence from the teacher
    throughput/nodes_per_s   owned nodes per second, over all ranks
    stream/wait_s            seconds in which rank 0 waited for data
    stream/wait_fraction     the same as a share of the step
    memory/rss_bytes         peak resident memory of rank 0
    memory/device_bytes      peak allocated memory of the device of rank 0
    time/step_s              seconds of one optimizer step
    epoch                    epochs finished
    ======================== ======================================================

    ``prefix`` is the folder below ``storage``. ``purge_step`` is the first step that will be written:
    points of an interrupted run from there on are hidden. Points are on disk after ``flush_s``
    seconds at the latest; a mirror follows in the same rhythm. A store that cannot be reached costs
    a warning and no training: the next round tries again, and what `close` could not store stays in
    the local folder that the warning names. Raises StorageError where the local folder cannot be made.
    """

    def __init__(self, storage: Storage, prefix: str, flush_s: float = 10.0, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = storage.local_path(prefix)
        try:
            self._folder = folder if folder is not None else Path(tempfile.mkdtemp(prefix="gkd-tensorboard-"))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer: Any = SummaryWriter(str(self._folder), flush_secs=max(1, int(flush_s)), purge_step=purge_step)
        except OSError as error:
            raise StorageError(
                f"{storage.url}/{prefix}: cannot write event files: {error}; check the folder"
            ) from error
        self._mirror = (
            None if folder is not None else _Mirror(self._writer, self._folder, storage.child(prefix), flush_s)
        )

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Markdown."""
        self._writer.add_text(name, text, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Distribution of ``values``, a tensor or array of any shape; nothing where it is empty."""
        if len(values):
            self._writer.add_histogram(name, values, step)

    def flush(self) -> None:
        """Everything so far is in the store when this returns, unless the store warns."""
        self._writer.flush()
        if self._mirror is not None:
            self._mirror.sync()

    def close(self) -> None:
        """Flushes and ends the writer; a second call does nothing."""
        if self._writer is None:
            return
        if self._mirror is not None:
            self._mirror.stop()
        self._writer.close()
        self._writer = None
        if self._mirror is not None and self._mirror.finish():
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Mirror:
    """Copies the event files of a folder to a store every ``every_s`` seconds, on its own thread."""

    def __init__(self, writer: Any, folder: Path, storage: Storage, every_s: float) -> None:
        self._writer, self._folder, self._storage, self._every_s = writer, folder, storage, every_s
        self._stored: dict[str, int] = {}  # bytes of each file that the store has
        self._warned = False
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="gkd-tensorboard-mirror", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._writer.flush()
            self.sync()

    def sync(self) -> bool:
        """Stores what has grown; whether the store now has everything."""
        with self._lock:
            try:
                for file in sorted(self._folder.glob(f"{_EVENTS}*")):
                    data = file.read_bytes()
                    if self._stored.get(file.name) != len(data):
                        self._storage.write(file.name, data)
                        self._stored[file.name] = len(data)
            except StorageError as error:
                if not self._warned:
                    self._warned = True
                    log.warning("curves are not in the store yet, they are kept in %s: %s", self._folder, error)
                return False
            self._warned = False
            return True

    def stop(self) -> None:
        """Ends the thread, which may not touch the writer once it is closed."""
        self._stop.set()
        self._thread.join()

    def finish(self) -> bool:
        """Stores the rest, after the writer was closed; whether the store has everything."""
        complete = self.sync()
        if not complete:
            log.warning(
                "copy %s to %s once the store can be reached, to keep the curves", self._folder, self._storage.url
            )
        return complete


def read_curves(folder: Storage) -> dict[str, list[tuple[int, float]]]:
    """Scalars of the event files directly in ``folder``: (step, value) in order of steps, by name.

    Points that a resumed run wrote again are there once, values that are not finite are left out; a
    folder without event files gives {}.
    """
    local = folder.local_path()
    if local is not None:
        return _read_local(local)
    with tempfile.TemporaryDirectory(prefix="gkd-tensorboard-") as copy:
        for key in folder.list():
            if "/" not in key and key.startswith(_EVENTS):
                Path(copy, key).write_bytes(folder.read(key))
        return _read_local(Path(copy))


def _read_local(folder: Path) -> dict[str, list[tuple[int, float]]]:
    if not any(folder.glob(f"{_EVENTS}*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    # It warns of every resumed run, whose repeated points it rightly leaves out.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # 0 keeps every point; texts come as tensors and are not needed.
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 1})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name) if math.isfinite(event.value)]
        for name in sorted(events.Tags()[SCALARS])
    }
