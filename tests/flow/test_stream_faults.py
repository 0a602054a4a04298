"""Trainings whose stores and disks misbehave end with the weights of an undisturbed one, bit for bit.

Graph and knowledge lie on a real S3 server behind a proxy; every epoch reads them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from flow_runs import ON_RAY, Job, digests, flip_byte, gkd_process, process_env
from training import make_task, small_world

from gkd_dist.config import CacheConfig, StorageConfig, TrainConfig
from gkd_dist.distill.job import train_inline
from gkd_dist.distill.task import TrainTask
from gkd_dist.distill.watch import TrainProgress
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.storage import errors as storage_errors

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")

EPOCHS, NUM_PARTS = 4, 3
Report = Callable[[TrainProgress], None]


def settings(cache: str | None) -> TrainConfig:
    """Nothing stays in memory, so every epoch reads all parts twice: to train and to validate."""
    return TrainConfig(
        epochs=EPOCHS, units_per_step=2, checkpoint_every=100, resident_bytes=0, prefetch_bytes=1,
        cache=CacheConfig(folder=cache),
    )  # fmt: skip


def train(task: TrainTask, local: Storage, name: str, report: Report = lambda progress: None) -> str:
    """Digest of the weights after a training by this name."""
    task = replace(task, name=name, output=local.child(f"students/{name}"), fingerprint=name)
    train_inline(local, task, report)
    return hashlib.sha256(task.output.read("model.safetensors")).hexdigest()


@dataclass
class Far:
    """A world on S3 behind a proxy, and what an undisturbed training on files gives."""

    local: Storage
    proxy: FaultProxy
    undisturbed: str

    def task(self, cache: str | None = None, native: bool = False) -> TrainTask:
        """A training that reads through the proxy."""
        config = StorageConfig(
            options={"s3": {"endpoint_url": self.proxy.endpoint}}, retries=9, timeout_s=10, native_reads=native
        )
        remote = Storage.open("s3://bucket/run", config)
        graph, knowledge = remote.child("graph"), remote.child("knowledge")
        task = make_task(self.local, train=settings(cache))
        stored = (knowledge, Manifest.load(knowledge, "knowledge"))
        return replace(task, graph=GraphStore.open(graph), knowledge=stored)

    def train(self, name: str, cache: str | None = None, native: bool = False, report: Report | None = None) -> str:
        """Digest of the weights; what the proxy has seen before is forgotten."""
        task = self.task(cache, native)
        self.proxy.paths.clear()
        return train(task, self.local, name, report or (lambda progress: None))

    def reads(self) -> Counter[str]:
        """How often each shard was asked for."""
        return Counter(Path(path).name for path in self.proxy.paths if "/part-" in path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, str]:
    local = small_world(tmp_path_factory.mktemp("world"), NUM_PARTS)
    return local, train(make_task(local, train=settings(None)), local, "undisturbed")


@pytest.fixture
def far(world: tuple[Storage, str], s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    local, undisturbed = world
    direct = Storage.open("s3://bucket/run")
    for name in ("graph", "knowledge"):
        for key in local.list(name):
            direct.write(key, local.read(key))
    with fault_proxy(s3_server) as proxy:
        yield Far(local, proxy, undisturbed)


# --- the store -------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True], ids=["s3fs", "obstore"])
def test_a_store_that_fails_a_fifth_of_its_reads_costs_time_alone(far: Far, native: bool) -> None:
    if native:
        pytest.importorskip("obstore", reason="needs the extra: pip install 'gkd_dist[fast]'")
    faults = [Fault(kind, "GET", "part-", times=10**9, share=0.0725) for kind in ("503", "short", "reset")]
    far.proxy.plan = faults
    assert far.train(f"fifth-{native}", native=native) == far.undisturbed
    struck, asked = sum(fault.struck for fault in faults), sum(far.reads().values())
    assert struck > 0.1 * asked
    assert asked - struck >= 2 * 2 * EPOCHS * NUM_PARTS, "every epoch has to read everything, twice"


def test_a_byte_flipped_on_its_way_is_read_once_more(far: Far, caplog: pytest.LogCaptureFixture) -> None:
    far.proxy.plan = [Fault("flip", "GET", "part-00001", nth=3)]
    assert far.train("flipped-on-its-way") == far.undisturbed
    assert far.proxy.plan[0].struck == 1
    assert "reading it once more" in caplog.text


# --- the cache -------------------------------------------------------------------------------


def test_every_object_is_downloaded_once_and_used_by_later_runs(far: Far, tmp_path: Path) -> None:
    assert far.train("cached", str(tmp_path)) == far.undisturbed
    assert sorted(far.reads().values()) == [1] * 2 * NUM_PARTS
    assert far.train("cached-again", str(tmp_path)) == far.undisturbed
    assert far.reads() == {}


@pytest.mark.parametrize("when", ["before the run", "in the middle of it"])
@pytest.mark.parametrize("damage", [flip_byte, lambda file: os.truncate(file, 64)], ids=["flipped", "truncated"])
def test_a_damaged_copy_is_fetched_again(
    far: Far, tmp_path: Path, damage: Callable[[Path], None], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    objects, name = tmp_path / "objects", f"{when}-{len(os.listdir(far.local.local_path('students') or ''))}"

    def strike(progress: TrainProgress | None = None) -> None:
        if progress is None or progress.epoch == 2:
            for file in objects.iterdir():
                damage(file)

    far.train(f"fill-{name}", str(tmp_path))
    caplog.clear()
    if when == "before the run":
        strike()
    found = far.train(name, str(tmp_path), report=strike if when != "before the run" else None)
    assert found == far.undisturbed
    assert sorted(far.reads().values()) == [1] * 2 * NUM_PARTS, "all were damaged, and fetched once"
    assert caplog.text.count("in the cache is damaged; downloading") == 2 * NUM_PARTS


def test_a_folder_that_cannot_be_written_is_said_once(
    far: Far, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert far.train("unwritable", str(tmp_path / "file/cache")) == far.undisturbed
    assert caplog.text.count("cannot cache in") == 1
    assert "Not a directory" in caplog.text
    assert min(far.reads().values()) >= 2 * EPOCHS


@contextmanager
def tiny_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A disk of ``num_bytes`` of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_once_and_the_run_streams(
    far: Far, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny_disk(tmp_path / "disk", 24 << 10) as disk:
        (disk / "rest").write_bytes(bytes(12 << 10))  # of somebody else
        with caplog.at_level(logging.WARNING):
            assert far.train("full", str(disk / "cache")) == far.undisturbed
        assert caplog.text.count("cannot cache in") == 1
        assert f"No space left on device); reading from {far.task().graph.storage.url}" in caplog.text.replace(
            "knowledge", "graph"
        )
        assert "set cache.folder to a folder on another disk" in caplog.text
        assert not list((disk / "cache/objects").glob(".*")), "half of an object was left behind"
    assert min(far.reads().values()) >= 2 * EPOCHS


_LIMITED = """
import json, resource, signal, sys
sys.path.insert(0, {folder!r})
import test_stream_faults as here
from gkd_dist.storage import Storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
local = Storage.open(sys.argv[1])
task = here.make_task(local, train=here.settings(sys.argv[2]))
from gkd_dist.stream import cache
write = cache.NodeCache.keep
def limited(self, entry, data):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write(self, entry, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
cache.NodeCache.keep = limited
print(json.dumps(here.train(task, local, "limited")))
"""


def test_a_disk_that_refuses_in_the_middle_of_a_file_costs_the_cache_alone(
    world: tuple[Storage, str], tmp_path: Path
) -> None:
    """A real write that the system cuts short, by a limit on the size of files, where no disk can be mounted."""
    local, undisturbed = world
    program = _LIMITED.format(folder=str(Path(__file__).parent))
    command = [sys.executable, "-c", program, str(local.local_path()), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=process_env())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == undisturbed
    assert done.stderr.count("cannot cache in") == 1
    assert "File too large" in done.stderr
    assert list((tmp_path / "cache/objects").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_on_ray_say_in_the_terminal_that_they_cannot_cache(copied: Job, tmp_path: Path) -> None:
    """And the students are those of workers that never heard of a cache."""
    (tmp_path / "file").touch()
    weights = []
    for folder in ("null", str(tmp_path / "file/cache")):
        options = (*ON_RAY, "distill.epochs=3", "distill.resident_bytes=0", f"distill.cache.folder={folder}")
        done = gkd_process("distill", str(copied.config), *options)
        assert done.code == 0, done.err
        weights.append(digests(copied.run, "students/*/model.safetensors"))
        for file in copied.run.glob("students/*/model.json"):
            file.unlink()  # so that they are trained again
    assert weights[0] == weights[1]
    assert len(re.findall(r"rank [01]: cannot cache in .*file/cache \(Not a directory\); reading from", done.err)) == 1
    assert "each machine keeps what it reads from file://" in done.err


# --- many processes --------------------------------------------------------------------------


def test_eight_processes_ask_a_real_store_once_for_each_object(far: Far, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="needs the extra: pip install 'gkd_dist[fast]'")
    entries = far.task().graph.manifest.parts
    (tmp_path / "ready").mkdir()
    far.proxy.paths.clear()
    far.proxy.delay_s = 0.2  # long enough for all to find the cache empty
    script = str(Path(__file__).with_name("stream_process.py"))
    command = [sys.executable, script, "s3://bucket/run/graph", str(tmp_path / "cache"), str(tmp_path / "ready"), "8"]
    env: dict[str, Any] = process_env() | {"AWS_ENDPOINT_URL": far.proxy.endpoint}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(8)]
    try:
        found = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert found == [[[entry.num_bytes, entry.sha256] for entry in entries]] * 8
    assert far.reads() == {entry.key: 1 for entry in entries}
