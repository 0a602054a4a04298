"""Records of finished tasks: first one counts, and they are found again by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_dist.errors import ManifestError, TeacherError
from gkd_dist.infer.commits import Commits, record_key
from gkd_dist.infer.plan import KNOWLEDGE, Task
from gkd_dist.infer.worker import Result
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

TASKS = [Task(1, 0), Task(1, 1), Task(KNOWLEDGE, 0)]


@pytest.fixture
def tmp(tmp_path) -> Storage:  # type: ignore[no-untyped-def]
    return Storage.open(str(tmp_path))


def result_of(tmp: Storage, value: float = 1.0) -> Result:
    entry = write_shard(tmp, "layer-1/part-00000", {"owned": torch.full((2, 3), value)}, {"n": 2}, {"floats": {}})
    return Result(entry, {"scores.1.dot": {40000: 3, 40001: 1}})


def test_names_of_records() -> None:
    assert [record_key(task) for task in TASKS] == [
        "layer-1/part-00000.json",
        "layer-1/part-00001.json",
        "knowledge/part-00000.json",
    ]


def test_a_restarted_driver_finds_what_was_committed(tmp: Storage) -> None:
    first = Commits(tmp, "a")
    assert first.resume(TASKS) == {}
    result = result_of(tmp)
    assert first.add(TASKS[2], result)
    assert Commits(tmp, "a").resume(TASKS) == {TASKS[2]: result}


def test_records_of_another_run_do_not_count(tmp: Storage) -> None:
    first = Commits(tmp, "a")
    first.resume(TASKS)
    first.add(TASKS[0], result_of(tmp))
    assert Commits(tmp, "b").resume(TASKS) == {}
    assert tmp.list() == ["started.json"]


def test_the_first_result_counts_and_a_different_second_is_an_alarm(tmp: Storage) -> None:
    commits = Commits(tmp, "a")
    commits.resume(TASKS)
    assert commits.add(TASKS[0], result_of(tmp))
    assert not commits.add(TASKS[0], result_of(tmp))
    with pytest.raises(TeacherError, match="layer 1 of part 0 was computed twice with different bytes"):
        commits.add(TASKS[0], result_of(tmp, 2.0))


def test_the_alarm_knows_records_of_an_earlier_driver(tmp: Storage) -> None:
    earlier = Commits(tmp, "a")
    earlier.resume(TASKS)
    earlier.add(TASKS[0], result_of(tmp))
    commits = Commits(tmp, "a")
    commits.resume(TASKS)
    with pytest.raises(TeacherError, match="not deterministic"):
        commits.add(TASKS[0], result_of(tmp, 2.0))


@pytest.mark.parametrize(
    "garbage", [b"", b"[]", b"{}", b'{"entry": {}, "histograms": {}}', b'{"entry": 1, "histograms": 2}', b"\xff"]
)
def test_a_garbled_record_names_itself_and_the_way_out(tmp: Storage, garbage: bytes) -> None:
    Commits(tmp, "a").resume(TASKS)
    tmp.write(record_key(TASKS[1]), garbage)
    with pytest.raises(ManifestError, match=r"layer-1/part-00001.json is no record .* delete"):
        Commits(tmp, "a").resume(TASKS)


def test_a_record_may_not_point_outside_the_store(tmp: Storage) -> None:
    first = Commits(tmp, "a")
    first.resume(TASKS)
    result = result_of(tmp)
    first.add(TASKS[0], replace(result, entry=replace(result.entry, key="../../secret")))
    with pytest.raises(ManifestError, match="expected a key inside the store"):
        Commits(tmp, "a").resume(TASKS)
