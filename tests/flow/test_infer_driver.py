"""The driver of an inference killed, interrupted or frozen in every layer goes on, and redoes what was not committed.

Signals come at writes of its own records (`struck.py`), never by a clock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from flow_runs import BASE, Job, digests, gkd_process, make_job
from processes import STRUCK, ended, is_stopped, started, wait_for

from gkd_dist import layout
from gkd_dist.storage import Storage

pytestmark = pytest.mark.timeout(300)
DEEP = BASE.replace("{{kind: sage, hidden: 16,", "{{kind: sage, hidden: 16, layers: 4,")
NUM_TASKS = 12  # three layers and the knowledge, which computes the last layer, of three parts
ACTORS = "infer.num_actors=2"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Inference that nobody disturbs, in this process."""
    job = make_job(tmp_path_factory.mktemp("calm"), DEEP)
    for stage in ("partition", "teach", "infer"):
        outcome = job.gkd(stage)
        assert outcome.code == 0, outcome.err
    return job


@pytest.fixture
def job(calm: Job, tmp_path: Path) -> Job:
    """The same run before its inference."""
    job = make_job(tmp_path, DEEP)
    shutil.copytree(calm.run, job.run)
    shutil.rmtree(job.run / "knowledge")
    return job


def records(job: Job) -> dict[str, str]:
    """Object of every committed task, by the key of its record."""
    found = {}
    for folder in job.run.glob("knowledge/*/tmp-*"):
        for file in [*folder.glob("layer-*/*.json"), *folder.glob("knowledge/*.json")]:
            found[file.relative_to(folder).as_posix()] = json.loads(file.read_text())["entry"]["key"]
    return found


def committed_objects(job: Job) -> dict[str, tuple[int, int]]:
    """Inode and time of the objects that committed tasks have written, as far as somebody still reads them."""
    keys = {Path(key).name for key in records(job).values()}
    files = [file for file in job.run.glob("knowledge/**/*.safetensors") if file.name in keys]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def uncommitted_objects(job: Job) -> list[Path]:
    """Objects that no record names."""
    keys = {Path(key).name for key in records(job).values()}
    return [file for file in job.run.glob("knowledge/**/*.safetensors") if file.name not in keys]


def knowledge(job: Job) -> dict[str, str]:
    """Digests of all that inference leaves."""
    return digests(job.run, "knowledge/**/*")


def resumed_at(err: str) -> int:
    """How many tasks the driver found done."""
    found = re.findall(rf"resuming: (\d+) of {NUM_TASKS} tasks were done before", err)
    return int(found[-1]) if found else 0


EVERYWHERE = [
    ("before", "layer-1/part-*.json", 2),
    ("after", "layer-2/part-*.json", 1),
    ("before", "layer-3/part-*.json", 1),
    ("before", "knowledge/part-*.json", 2),
    ("after", "knowledge/part-*.json", 1),
    ("before", "manifest.json", 1),
    ("after", "manifest.json", 1),
]


@pytest.mark.parametrize("actors", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_driver_killed_in_every_layer_goes_on_each_time(job: Job, calm: Job, actors: int) -> None:
    """One run is killed in layers 1, 2 and 3, in the knowledge, and on both sides of the manifest."""
    command = ("infer", str(job.config), f"infer.num_actors={actors}")
    for when, key, number in EVERYWHERE:
        done, written = len(records(job)), committed_objects(job)
        pattern = f"knowledge/*/{key}" if key == layout.MANIFEST else f"knowledge/*/tmp-*/{key}"
        killed = gkd_process("SIGKILL", when, pattern, str(number), *command, program=(STRUCK,))
        assert killed.code == -signal.SIGKILL, killed.err
        assert resumed_at(killed.err) == done
        still = committed_objects(job)
        assert {path: still[path] for path in written if path in still} == {
            path: stamp for path, stamp in written.items() if path in still
        }  # nothing that was committed has been written again
        if when == "before" and key != layout.MANIFEST:
            assert uncommitted_objects(job)  # the object is there, its record is not
            damage(uncommitted_objects(job))
        assert bool(list(job.run.glob("knowledge/*/manifest.json"))) == ((when, key) == ("after", layout.MANIFEST))
    assert len(records(job)) == NUM_TASKS
    outcome = gkd_process(*command)
    assert outcome.code == 0, outcome.err
    assert "infer: finished before, skipped" in outcome.err
    assert any(orphan.endswith("/layer-3/part-00000.json") for orphan in pruned(job))  # it had no time to clean up
    assert knowledge(job) == knowledge(calm)


def pruned(job: Job) -> list[str]:
    """What no manifest names, which is deleted; all that is named is well."""
    for half in job.run.glob("knowledge/**/.*.gkd-tmp"):
        os.utime(half, (time.time() - 7200,) * 2)  # the writer of a fresh one may be alive
    found = job.gkd("verify", "--prune", "--json").json
    assert found["problems"] == []
    return found["orphans"]


def damage(files: list[Path]) -> None:
    """Whoever trusted these would give wrong numbers or an error."""
    for file in files:
        file.write_bytes(b"\0" * file.stat().st_size)


def test_a_driver_killed_while_it_writes_leaves_halves_that_nobody_reads(job: Job, calm: Job) -> None:
    """In this process the driver writes the objects too."""
    for key in ("layer-2/part-00001-*", "layer-2/part-00001.json"):
        outcome = gkd_process(
            "SIGKILL", "half", f"knowledge/*/tmp-*/{key}", "1", "infer", str(job.config), program=(STRUCK,)
        )
        assert outcome.code == -signal.SIGKILL, outcome.err
    assert len(list(job.run.glob("knowledge/*/tmp-*/layer-2/.*"))) == 2
    assert job.gkd("infer").code == 0
    assert len(pruned(job)) == 2
    assert knowledge(job) == knowledge(calm)


@pytest.mark.parametrize(("how", "layer", "code"), [("SIGINT", 1, 130), ("SIGTERM", 2, 143)])
def test_a_cancelled_inference_ends_its_actors_and_can_go_on(
    job: Job, calm: Job, how: str, layer: int, code: int
) -> None:
    command = ("infer", str(job.config), ACTORS)
    with started(STRUCK, "SIGSTOP", "before", f"knowledge/*/tmp-*/layer-{layer}/*.json", "2", *command) as process:
        wait_for(lambda: is_stopped(process), process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("TeacherActor" in " ".join(one.cmdline()) for one in family)  # the second may still be starting
        process.send_signal(getattr(signal, how))
        process.send_signal(signal.SIGCONT)
        outcome = ended(process)
        assert outcome.code == code, outcome.err
        assert outcome.err.rstrip().endswith(f"nothing is lost, go on with: gkd {' '.join(command)}")
        assert "Traceback" not in outcome.err
        assert psutil.wait_procs(family, timeout=10)[1] == []
    assert not (job.run / layout.OWNER).exists()
    done = len(records(job))
    assert 1 <= done < NUM_TASKS
    again = job.gkd("infer")  # where it runs makes no difference
    assert again.code == 0
    assert resumed_at(again.err) == done
    assert knowledge(job) == knowledge(calm)


def test_a_driver_frozen_longer_than_its_heartbeat_loses_the_run_and_commits_nothing_more(job: Job, calm: Job) -> None:
    command = (STRUCK, "SIGSTOP", "before", "knowledge/*/tmp-*/layer-2/*.json", "2", "infer", str(job.config))
    with started(*command) as first:
        wait_for(lambda: is_stopped(first), first)
        held = job.gkd("infer")
        assert held.code == 4
        assert f"is driven by process {first.pid} on " in held.complaint
        owner = json.loads((job.run / layout.OWNER).read_text())
        owner["heartbeat_at"] -= 121
        Storage.open(str(job.run)).write_json(layout.OWNER, owner)
        second = job.gkd("infer")  # no --take-over is needed
        assert second.code == 0, second.err
        assert "taking over" in second.err
        assert resumed_at(second.err) >= 4
        first.send_signal(signal.SIGCONT)
        outcome = ended(first)
    assert outcome.code == 4
    assert "no longer owns" in outcome.complaint
    assert len(pruned(job)) <= 2  # the record it was about to write, and the object of its next task
    assert knowledge(job) == knowledge(calm)


@pytest.mark.slow
def test_the_ray_of_a_killed_driver_ends_and_does_not_hinder_the_next(job: Job, calm: Job) -> None:
    command = ("infer", str(job.config), ACTORS)
    with started(STRUCK, "SIGSTOP", "before", "knowledge/*/tmp-*/layer-2/*.json", "1", *command) as process:
        wait_for(lambda: is_stopped(process), process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        began = time.monotonic()
        assert gkd_process(*command).code == 0  # at once, while the old Ray is still ending
        assert knowledge(job) == knowledge(calm)
        assert psutil.wait_procs(family, timeout=max(1.0, 120 - (time.monotonic() - began)))[1] == []
