"""C7: waits are bounded and say who waited, where, and for whom; a late rank is waited for."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from gkd_dist.distill.beacon import Pulse
from tests.distributed.groups import start_group, stop_group
from tests.distributed.training_rank import PEER_TIMEOUT_S
from tests.training import small_world

pytestmark = pytest.mark.timeout(240)

# --- a collective by itself ------------------------------------------------------------------


def run(how: str) -> str:
    """What rank 0 printed, rank 1 being late or stopped."""
    ranks = start_group(2, "stopped_rank.py", how)
    try:
        return ranks[0].communicate(timeout=60)[0]
    finally:
        stop_group(ranks)


def seconds(output: str) -> float:
    found = re.search(r"after ([\d.]+) s", output)
    assert found, output
    return float(found[1])


def test_a_late_rank_is_waited_for():
    output = run("late")
    assert "sum 2.0" in output
    assert 1.5 < seconds(output) < 4


def test_a_stopped_rank_ends_the_wait_with_a_sentence():
    output = run("stopped")
    assert "error rank 0 of 2 waited in vain for its peers (counting, step 7): " in output
    assert re.search(r"; rank 1: last seen .*\(process \d+ on .*\); look at the logs", output)
    assert "run the same command again" in output
    assert seconds(output) < 15


def test_a_rank_that_sleeps_longer_than_a_dead_one_is_silent_is_waited_for():
    output = run("asleep")
    assert "sum 2.0" in output
    assert 4.5 < seconds(output) < 9


def test_an_error_that_is_not_of_the_peers_stays_what_it_is():
    output = run("type")
    assert "other error Invalid scalar type" in output, output
    assert "in vain" not in output


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small_world(folder, num_parts=5)
    return folder


def strike(world, world_size: int, stage: int, how: str, rank: int) -> tuple[list[int | None], list[str], float]:
    """Exit codes and outputs of the other ranks, and how long after the strike the last of them ended."""
    name = f"{how}-{world_size}-{stage}-{rank}".replace("=", "")
    ranks = start_group(world_size, "training_rank.py", str(world), name, str(stage), how, "5", str(rank))
    others = [process for index, process in enumerate(ranks) if index != rank]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in others]
        ended_at = time.time()
        return [process.returncode for process in others], outputs, ended_at - struck_at(ranks[rank])
    finally:
        stop_group(ranks)


def struck_at(victim: subprocess.Popen[str]) -> float:
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.startswith("struck at "):
            return float(line.split()[2])
    raise AssertionError("the rank was not struck")


@pytest.mark.parametrize(
    ("world_size", "stage", "rank"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 1), (2, 3, 0), (3, 2, 1)]],
)
def test_a_killed_rank_ends_the_others_with_a_sentence(world, world_size, stage, rank):
    codes, outputs, after_s = strike(world, world_size, stage, "kill", rank)
    assert codes == [4] * (world_size - 1), outputs
    assert after_s < 30
    for output in outputs:
        assert re.search(rf"gkd: error: rank \d of {world_size} (waited in vain for its peers|gives up rank)", output)
        assert "step 5" in output


@pytest.mark.parametrize(
    ("world_size", "stage", "rank"),
    [(2, 1, 1), pytest.param(2, 3, 0, marks=pytest.mark.slow), pytest.param(3, 2, 1, marks=pytest.mark.slow)],
)
def test_a_stopped_rank_ends_the_others_who_say_where_it_was(world, world_size, stage, rank):
    """Long before the bound of the collective, which is 60 s here; rank 0 also keeps the store of the signs."""
    codes, outputs, after_s = strike(world, world_size, stage, "stop", rank)
    assert codes == [4] * (world_size - 1), outputs
    assert after_s < PEER_TIMEOUT_S + 20
    said = "\n".join(outputs)
    assert re.search(
        rf"gkd: error: rank {(rank - 1) % world_size} of {world_size} \(training .*step 5.*\) gives up", said
    )
    assert re.search(rf"gives up rank {rank}, which has been silent for \d+ s: last seen \w+.* \(process \d+ on ", said)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [11, 30])
def test_a_late_rank_that_lives_is_waited_for(world, delay_s):
    """Longer than the silence that ends a run: it is asleep, but not silent."""
    assert delay_s > PEER_TIMEOUT_S + 2
    codes, outputs, after_s = strike(world, 2, 1, f"sleep={delay_s}", 1)
    assert codes == [0], outputs
    assert after_s > delay_s


# --- who counts as silent --------------------------------------------------------------------


def test_only_a_new_sign_is_a_sign_of_life():
    pulse = Pulse(timeout_s=5, heard_at=0.0)
    pulse.hear(b"1", 3.0)
    pulse.hear(b"1", 7.0)
    for now in (4.0, 7.0, 8.0):
        assert pulse.silent_s(now) is None
    assert pulse.silent_s(8.1) == pytest.approx(5.1)


def test_a_watcher_that_was_away_begins_anew():
    pulse = Pulse(timeout_s=5, heard_at=0.0)
    assert pulse.silent_s(1.0) is None
    assert pulse.silent_s(101.0) is None  # it was stopped itself
    assert pulse.silent_s(105.0) is None
    assert pulse.silent_s(106.5) is not None


def test_one_that_said_farewell_is_not_missed():
    pulse = Pulse(timeout_s=5, heard_at=0.0)
    pulse.hear(b'{"count": 3, "ended": true}', 1.0)
    for now in range(2, 60):
        assert pulse.silent_s(float(now)) is None
