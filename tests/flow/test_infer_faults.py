"""Whole inference runs over an S3 store that misbehaves, or has no room left: the same bytes as undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from store_runs import Run, Undisturbed

from gkd_dist.config import InferConfig, RayConfig, StorageConfig
from gkd_dist.errors import ShardError, StorageError
from gkd_dist.storage import Storage
from gkd_dist.storage import errors as storage_errors

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")

SHARD = r"\.safetensors$"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    with fault_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def run(undisturbed: Undisturbed, proxy: FaultProxy) -> Run:
    options = {"s3": {"endpoint_url": proxy.endpoint}}
    return Run.copy(
        undisturbed, Storage.open("s3://bucket/run", StorageConfig(options=options, retries=3, timeout_s=1.5))
    )


FAULTS = {
    "bursts of SlowDown": [Fault("503", nth=n, times=3) for n in range(5, 60, 20)],
    "resets in mid-body": [Fault("reset", "GET", SHARD, nth=n, times=2) for n in (2, 9)],
    "truncated bodies": [Fault("short", "GET", nth=n, times=2) for n in (3, 12, 30)],
    "stalls": [Fault("stall", "GET", SHARD, nth=4), Fault("stall", "PUT", SHARD, nth=2)],
    "flipped bytes": [Fault("flip", "GET", f"knowledge/.*{SHARD}", nth=n) for n in (1, 5, 10)],
    "a flipped byte of the graph": [Fault("flip", "GET", f"graph/.*{SHARD}", nth=2)],
    "duplicate requests": [Fault("twice", "PUT", times=1000), Fault("twice", "DELETE", times=1000)],
    "lost answers": [Fault("lost", method, nth=n) for method in ("PUT", "DELETE", "GET") for n in (1, 3)],
    "jitter": [Fault("late", times=25)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_store_that_misbehaves_changes_nothing(
    faults: list[Fault], run: Run, undisturbed: Undisturbed, proxy: FaultProxy
) -> None:
    proxy.plan = [Fault(fault.kind, fault.method, fault.key, fault.nth, fault.times) for fault in faults]
    found = run.infer()
    assert all(fault.struck for fault in proxy.plan)
    proxy.plan = []
    run.check(undisturbed, found)


def test_a_byte_that_is_flipped_in_the_store_is_an_error_that_names_the_object(
    run: Run, undisturbed: Undisturbed, proxy: FaultProxy
) -> None:
    proxy.plan = [Fault("flip", "GET", f"graph/part-00001-.*{SHARD}", times=1000)]
    with pytest.raises(ShardError, match=r"s3://bucket/run/graph/part-00001-.* was altered: .* in two reads; run `gkd"):
        run.infer()
    assert not run.out.exists("manifest.json")
    proxy.plan = []
    run.check(undisturbed, run.infer())


def test_a_store_that_fills_up_stops_the_run_which_goes_on_when_there_is_room(
    run: Run, undisturbed: Undisturbed, proxy: FaultProxy
) -> None:
    for nth in (1, 3, 5):  # the first object; the record of a shard; a shard
        proxy.plan = [Fault("507", "PUT", nth=nth, times=1000)]
        with pytest.raises(
            StorageError, match=r"the store is full .*free space and run the same command again"
        ) as full:
            run.infer()
        assert full.value.exit_code == 4
        assert not run.out.exists("manifest.json")
    proxy.plan = []
    steps: list[int] = []
    found = run.infer(progress=lambda done, total: steps.append(done))
    assert steps[0] == 2  # what the last attempt had done counts
    run.check(undisturbed, found)


_FILL_A_DISK = """
import dataclasses, json, subprocess, sys
sys.path[:0] = json.loads(sys.argv[3])
from store_runs import Run
from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
disk, source = sys.argv[1:3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], check=True)
run = Run(Storage.open(source))
object.__setattr__(run, "knowledge", Storage.open(disk))
Run.out = property(lambda self: self.knowledge)
stops = []
for pages in range(1, 400, 4):
    subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", disk], check=True)
    try:
        found = run.infer()
        break
    except StorageError as error:
        stops.append(str(error))
print(json.dumps([stops, dataclasses.asdict(found), run.out.list()]))
"""


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_when_there_is_room(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    (tmp_path / "disk").mkdir()
    probe = [*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path / "disk")]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    Run.copy(undisturbed, Storage.open(str(tmp_path / "run")))
    command = [*unshare, sys.executable, "-c", _FILL_A_DISK, str(tmp_path / "disk"), str(tmp_path / "run")]
    done = subprocess.run([*command, json.dumps(sys.path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    stops, found, keys = json.loads(done.stdout)
    assert len(stops) >= 3
    assert all("the disk is full; free space and run the same command again" in stop for stop in stops)
    assert found == json.loads(json.dumps(asdict(undisturbed.manifest)))
    assert keys == sorted(["manifest.json", *(entry.key for entry in undisturbed.manifest.parts)])


@pytest.mark.timeout(240)
def test_two_actors_over_a_store_that_misbehaves(
    run: Run, undisturbed: Undisturbed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gkd_dist.infer.actor import ActorPool
    from gkd_dist.infer.cluster import start_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    settings = InferConfig(num_actors=2, cpus_per_actor=0.5, dtype="fp16")
    proxy.plan = [
        Fault("stall", "GET", f"knowledge/.*{SHARD}", nth=3),
        *(Fault(kind, "GET", SHARD, nth=nth) for nth, kind in enumerate(("reset", "flip", "short", "lost"), 5)),
        *(Fault(kind, "PUT", nth=nth, times=2) for nth, kind in ((2, "503"), (6, "lost"), (9, "twice"))),
        Fault("late", times=1000),
    ]
    with start_ray(RayConfig(num_cpus=2), needed_cpus=2, needed_gpus=0), ActorPool(settings) as pool:
        found = run.infer(pool=pool, settings=settings)
    assert all(fault.struck for fault in proxy.plan)
    proxy.plan = []
    run.check(undisturbed, found)
