"""Small runs for tests of the command and of the whole flow: in one process, seconds each."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_dist import cli
from gkd_dist.config import Config
from gkd_dist.config_file import load_config
from gkd_dist.driver import Session
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.telemetry import Progress

STAGES = ["partition", "teach", "infer", "distill", "evaluate", "export", "report"]
BASE = """
run: {run}
graph:
  source: {{kind: synthetic, num_nodes: 400, num_classes: 3, average_degree: 6, num_features: 8}}
partition: {{method: random, num_parts: 3}}
teacher:
  model: {{kind: sage, hidden: 16, norm: none, dropout: 0.2}}
  train: {{epochs: 8, patience: 0, checkpoint_every: 3, threads: 1}}
infer: {{num_actors: 0, dtype: fp32}}
student:
  model: {{kind: gcn, hidden: 8, norm: none, dropout: 0.1}}
losses:
  - {{kind: label}}
  - {{kind: kd}}
  - {{kind: lsp, weight: 0.3, outer_softmax: false, sigma: 1.0, teacher_sigma: median}}
distill: {{launcher: inline, num_workers: 1, epochs: 6, patience: 0, lr: 0.02, checkpoint_every: 4}}
"""
ON_RAY = ("infer.num_actors=2", "distill.launcher=ray", "distill.num_workers=2")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What ``--json`` printed."""
        return json.loads(self.out)

    @property
    def done(self) -> list[str]:
        """Stages that ran to their end, in order."""
        return re.findall(r" (\w+): finished in ", self.err)

    @property
    def complaint(self) -> str:
        """The error a user reads: what follows ``gkd: error:``, which has to be all that follows."""
        assert "Traceback" not in self.err, self.err
        _, found, text = self.err.partition("gkd: error: ")
        assert found, self.err
        lines = text.strip().splitlines()
        assert len(lines) <= 2, self.err
        return " ".join(lines)


@dataclass(frozen=True)
class Job:
    """A configuration file and the run it names."""

    config: Path
    run: Path

    def load(self, *overrides: str) -> Config:
        """The configuration."""
        return load_config(self.config, overrides)

    def session(self, *overrides: str) -> Session:
        """A session that drives nothing."""
        return Session.open(self.load(*overrides), Progress(interactive=False))

    def gkd(self, verb: str, *args: str) -> Outcome:
        """A verb of this run, in this process."""
        return gkd(verb, str(self.config), *args)


def make_job(folder: Path, text: str = BASE) -> Job:
    """A configuration in ``folder`` whose run is the folder beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder / "config.yaml", folder / "run")
    job.config.write_text(text.format(run=job.run))
    return job


def gkd(*args: str) -> Outcome:
    """``gkd`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with _restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(args)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Handlers of signals and logs as they were: a command has its process for itself, a test has not."""
    root, ours, handler = logging.getLogger(), logging.getLogger("gkd_dist"), signal.getsignal(signal.SIGTERM)
    handlers, levels = list(root.handlers), (root.level, ours.level)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def gkd_process(*args: str, timeout: float = 240, program: tuple[str, ...] = ("-m", "gkd_dist")) -> Outcome:
    """``gkd`` in a fresh process of one thread."""
    done = subprocess.run(
        [sys.executable, *program, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=process_env(),
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def process_env() -> dict[str, str]:
    """Environment of a subprocess: this checkout, one thread, no foreign Ray."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.pop("RAY_ADDRESS", None)
    return env


def digests(run: Path, *patterns: str) -> dict[str, str]:
    """sha256 of the files of a run that match one of the patterns, by key."""
    files = {file for pattern in patterns for file in run.glob(pattern) if file.is_file()}
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


RESULTS = ("graph/*", "teacher/model.safetensors", "knowledge/**/*", "students/*/*.safetensors", "export/*.safetensors")


def results(run: Path) -> dict[str, Any]:
    """What must not depend on how often a run was interrupted: all stores and weights, and the measured quality."""
    models = json.loads((run / "metrics.json").read_text())["models"]
    for row in models.values():
        del row["inference_s"]
    found: dict[str, Any] = digests(run, *RESULTS, "students/*/predictions/*")
    return {**found, "metrics": models}


def flip_byte(file: Path, at: int | None = None) -> None:
    """Changes one byte, in the middle unless ``at`` says where."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0x40
    file.write_bytes(data)


def flip_in_tensor(file: Path, kind: str, tensor: str) -> None:
    """The same in the middle of one tensor of a shard: tensors that nobody asks for are not looked at."""
    entries = Manifest.load(Storage.open(str(file.parent)), kind).parts
    entry = next(entry for entry in entries if entry.key == file.name).tensor(tensor)
    assert entry is not None
    flip_byte(file, (entry.start + entry.stop) // 2)
