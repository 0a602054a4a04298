"""What a command says while it works: log lines, progress, time and memory of this process.

Imports no torch. Curves for TensorBoard are in `tensorboard.py`.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    import rich.progress

log = logging.getLogger(__name__)

# --- logging ---------------------------------------------------------------------------------


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to whatever ``sys.stderr`` is at the time, so that a progress bar can stand below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


class _LineFormatter(logging.Formatter):
    """``12:03:04 partition: finished in 1.2 s``; the level is named from warning on."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno < logging.WARNING:
            return line
        stamp, _, rest = line.partition(" ")
        return f"{stamp} {record.levelname.lower()}: {rest}"


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message and, where there is one, error."""

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def setup_logging(verbose: bool = False, json_lines: bool = False) -> None:
    """Log lines of this package to stderr: from INFO on, from DEBUG on where ``verbose``.

    Other packages are heard from WARNING on. A second call replaces what the first one set up.
    """
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if json_lines else _LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("gkd_dist").setLevel(logging.DEBUG if verbose else logging.INFO)


# --- progress --------------------------------------------------------------------------------


class Task(Protocol):
    """One piece of work whose progress is shown."""

    def advance(self, count: int = 1, text: str | None = None, total: int | None = None) -> None:
        """``count`` more items are done; ``text`` and ``total`` replace what was known, None keeps it."""


class Progress:
    """Bars on a terminal; elsewhere a log line every ``every_s`` seconds and one at the end.

    ::

        with progress.task("teach", total=200) as task:
            task.advance(1, text="val 0.81")

    ``total`` may be None and become known later. Tasks may overlap. ``interactive`` is whether
    stderr is a terminal unless it is said here.
    """

    def __init__(
        self,
        interactive: bool | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interactive = interactive
        self._every_s, self._clock = every_s, clock
        self._bars: rich.progress.Progress | None = None
        self._num_open = 0

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Task]:
        """Shows ``name`` while the ``with`` block runs."""
        if not (sys.stderr.isatty() if self._interactive is None else self._interactive):
            lines = _LineTask(name, total, self._every_s, self._clock)
            yield lines
            lines.finish()
            return
        bars = self._open_bars()
        try:
            yield _BarTask(bars, bars.add_task(name, total=total, text=""))
        finally:
            self._close_bars()

    def _open_bars(self) -> rich.progress.Progress:
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        self._num_open += 1
        return self._bars

    def _close_bars(self) -> None:
        self._num_open -= 1
        if self._num_open == 0 and self._bars is not None:
            self._bars.stop()  # leaves the bars as they stand: where work stopped is worth seeing
            self._bars = None


def _make_bars() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        console=Console(stderr=True),
        refresh_per_second=4,
    )


class _BarTask:
    def __init__(self, bars: rich.progress.Progress, bar: rich.progress.TaskID) -> None:
        self._bars, self._bar = bars, bar

    def advance(self, count: int = 1, text: str | None = None, total: int | None = None) -> None:
        fields = {} if text is None else {"text": text}
        self._bars.update(self._bar, advance=count, total=total, **fields)  # type: ignore[arg-type]


class _LineTask:
    def __init__(self, name: str, total: int | None, every_s: float, clock: Callable[[], float]) -> None:
        self._name, self._total, self._every_s, self._clock = name, total, every_s, clock
        self._done, self._text = 0, ""
        self._started = self._last = clock()
        self._shown: int | None = None

    def advance(self, count: int = 1, text: str | None = None, total: int | None = None) -> None:
        self._done += count
        self._text = self._text if text is None else text
        self._total = self._total if total is None else total
        if self._clock() - self._last >= self._every_s:
            self._show()

    def finish(self) -> None:
        """The last line, unless it was already shown."""
        if self._shown != self._done:
            self._show()

    def _show(self) -> None:
        now = self._clock()
        self._last, self._shown = now, self._done
        line = progress_line(self._name, self._done, self._total, now - self._started, self._text)
        log.info("%s", line)


def progress_line(name: str, done: int, total: int | None, elapsed_s: float, text: str = "") -> str:
    """``teach: 50/200 (25 %), 10 s, 30 s left, val 0.81``."""
    parts = [f"{done}" if total is None else f"{done}/{total}" + (f" ({done / total:.0%})" if total else "")]
    parts.append(duration(elapsed_s))
    if total is not None and 0 < done < total:
        parts.append(f"{duration(elapsed_s * (total - done) / done)} left")
    if text:
        parts.append(text)
    return f"{name}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """``0.25 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# --- time and memory -------------------------------------------------------------------------


class Timer:
    """Seconds spent inside its ``with`` blocks: ``total_s`` over all, ``last_s`` in the last one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total_s = self.last_s = 0.0
        self._clock = clock
        self._started: list[float] = []

    def __enter__(self) -> Timer:
        self._started.append(self._clock())
        return self

    def __exit__(self, *error: object) -> None:
        self.last_s = self._clock() - self._started.pop()
        if not self._started:  # an inner block is part of the outer one
            self.total_s += self.last_s


def peak_rss_bytes() -> int:
    """Largest resident memory that this process has had, in bytes."""
    try:
        # getrusage would count what a process had before exec, so a worker would show the peak of its parent.
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
