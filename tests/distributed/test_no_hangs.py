"""C7: waits are bounded and say who waited; a late rank is waited for."""

from __future__ import annotations

import re

from tests.distributed.groups import start_group, stop_group


def run(how: str) -> str:
    """What rank 0 printed, rank 1 being late or stopped."""
    ranks = start_group(2, "stopped_rank.py", how)
    try:
        return ranks[0].communicate(timeout=40)[0]
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
    assert "error rank 0 of 2 waited in vain for its peers" in output
    assert "run the same command again" in output
    assert seconds(output) < 15
