"""C5: a training run on Ray whose workers and driver are killed at random ends with the bits of an undisturbed one.

Who is killed and when is drawn from a seed, in terms of the run's own progress: after so many more checkpoints, and
there at a random moment between two, or while one is on its way to the store.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from flow_runs import ON_RAY, Job, gkd_process, make_job
from paced import EACH_STEP
from processes import started

PACED = str(Path(__file__).parents[1] / "paced.py")
PACE_S = 0.2
_DEAF = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, which look for their parent for a while


@dataclass(frozen=True)
class Kill:
    """Of ``victim`` (driver, or a worker by number), when ``commits`` more checkpoints are there, at ``moment``."""

    victim: str
    commits: int
    moment: str  # anywhere | upload
    delay_s: float

    @classmethod
    def draw(cls, rng: random.Random) -> Kill:
        victim = rng.choice(["driver", "worker 0", "worker 0", "worker 1"])  # rank 0 is the one that writes
        return cls(victim, rng.randint(0, 3), rng.choice(["anywhere", "upload"]), rng.uniform(0, PACE_S))


class Watched:
    """What a test sees of a run from outside: its checkpoints and its processes."""

    def __init__(self, job: Job) -> None:
        self.checkpoints = job.run / "students/distilled/checkpoints"

    def newest(self) -> int:
        """Step of the newest commit."""
        found = [int(re.findall(r"\d+", path.parent.name)[0]) for path in self.checkpoints.glob("*/COMMIT.json")]
        return max(found, default=0)

    def is_uploading(self) -> bool:
        """Whether data lie there that no commit names yet."""
        folders = {path.parent for path in self.checkpoints.glob("step-*/state-*")}
        return any(not (folder / "COMMIT.json").exists() for folder in folders)

    def workers(self, driver: int) -> list[psutil.Process]:
        """Those that train now, by age; Ray Train starts them in the order of their ranks, mostly."""
        found = []
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())


def disturb(job: Job, command: tuple[str, ...], kills: list[Kill]) -> list[str]:
    """Runs ``command`` again and again until it has ended by itself, killing on the way; says what was done."""
    watched, left, journal = Watched(job), list(kills), []
    while True:
        with started(PACED, str(PACE_S), *command) as process:
            while left:
                kill = left[0]
                victim = await_moment(watched, process, kill)
                family = psutil.Process(process.pid).children(recursive=True)
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                left.pop(0)
                journal.append(f"{kill} at step {watched.newest()}")
                print(journal[-1], flush=True)
                if kill.victim == "driver":
                    process.wait(60)
                    ours = [one for one in family if one.is_running() and one.name() not in _DEAF]
                    psutil.wait_procs(ours, timeout=60)
                    break
            else:
                out, err = process.communicate(timeout=900)
                assert process.returncode == 0, "\n".join([*journal, out, err])
                return journal


def await_moment(watched: Watched, process: subprocess.Popen[str], kill: Kill) -> psutil.Process:
    """The victim, when its time has come."""
    goal, deadline = watched.newest() + kill.commits, time.monotonic() + 900
    while True:
        assert process.poll() is None, (kill, process.communicate())
        assert time.monotonic() < deadline, f"nothing happened until {kill}"
        workers = watched.workers(process.pid) if watched.newest() >= goal else []
        if len(workers) == 2 and (kill.moment == "anywhere" or watched.is_uploading()):
            time.sleep(kill.delay_s if kill.moment == "anywhere" else 0)
            return psutil.Process(process.pid) if kill.victim == "driver" else workers[int(kill.victim[-1])]
        time.sleep(0.005)


def train(finished: Job, folder: Path) -> Job:
    """A copy of a finished run without its students."""
    job = make_job(folder)
    shutil.copytree(finished.run, job.run)
    shutil.rmtree(job.run / "students")
    return job


@pytest.mark.parametrize(
    ("seed", "number", "epochs"),
    [
        pytest.param(1, 3, 30, marks=pytest.mark.timeout(1800)),
        pytest.param(2, 20, 160, marks=[pytest.mark.timeout(7200), pytest.mark.slow]),
    ],
)
def test_it_ends_with_the_same_bits(tmp_path: Path, finished: Job, seed: int, number: int, epochs: int) -> None:
    rng = random.Random(seed)
    kills = [Kill("driver", 2, "anywhere", 0.1), *(Kill.draw(rng) for _ in range(number - 1))]
    rng.shuffle(kills)
    job, calm = train(finished, tmp_path / "killed"), train(finished, tmp_path / "calm")
    options = (*ON_RAY, *EACH_STEP, f"distill.epochs={epochs}", "distill.max_failures=20")
    began = time.monotonic()
    journal = disturb(job, ("distill", str(job.config), *options), kills)
    print(f"seed {seed}: {len(journal)} kills in {time.monotonic() - began:.0f} s", *journal, sep="\n")
    assert len(journal) == number
    assert gkd_process("distill", str(calm.config), *options, "distill.checkpoint_every=20", timeout=600).code == 0
    for name in ("model.safetensors",):
        found, expected = (one.run / "students/distilled" / name for one in (job, calm))
        assert found.read_bytes() == expected.read_bytes(), journal
    left = [path for path in Watched(job).checkpoints.glob("step-*") if not (path / "COMMIT.json").exists()]
    assert left == [], journal
