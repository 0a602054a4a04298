"""A store that is slower than all bounds only slows a group down; what it refuses ends all ranks with a sentence."""

from __future__ import annotations

import pytest

from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.storage import Storage
from tests.distributed.groups import start_group, stop_group
from tests.training import small_world

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small_world(folder, num_parts=5)
    return folder


def run(world, how: str) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of two ranks."""
    ranks = start_group(2, "slow_store_rank.py", str(world), how, how)
    try:
        outputs = [rank.communicate(timeout=150)[0] for rank in reversed(ranks)][::-1]
        return [rank.returncode for rank in ranks], outputs
    finally:
        stop_group(ranks)


def test_after_sigterm_nobody_leaves_before_the_checkpoint_is_there(world):
    """The checkpoint of the step before is on its way when that of the last one is due: two waits, each in vain for
    a collective, and the second one longer than a rank that has left may be silent."""
    codes, outputs = run(world, "term")
    assert codes == [143, 143], outputs
    steps = committed_steps(Storage.open(str(world)).child("students/term"))
    for output in outputs:
        assert f"did so after step {steps[-1]}, which is kept" in output


def test_a_store_that_refuses_ends_all_ranks(world):
    codes, (main, other) = run(world, "fail")
    assert codes == [4, 4], (main, other)
    assert "gkd: error: cannot write" in main
    assert "no space; make room" in main
    assert "gkd: error: rank 0 could not write what there was of fail up to step" in other
