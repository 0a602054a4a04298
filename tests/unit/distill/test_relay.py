"""Warnings of workers reach the driver, each once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gkd_dist.distill.relay import FOLDER, WarningReader, warnings_to_store
from gkd_dist.storage import Storage

worker_log = logging.getLogger("gkd_dist.somewhere")


def test_every_line_is_said_once_with_the_rank_that_met_it_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Storage.open(str(tmp_path))
    reader = WarningReader(folder, 3)
    for rank in (1, 2):
        with warnings_to_store(folder, rank):
            worker_log.info("nothing to worry about")
            for _ in range(2):
                worker_log.warning("disk %s is full", "/scratch")
        worker_log.warning("after the end")
    caplog.clear()
    for _ in range(2):
        reader.say()
    assert [record.getMessage() for record in caplog.records] == ["rank 1: disk /scratch is full"]
    reader.clear()
    assert folder.list(FOLDER) == []


def test_ranks_take_turns_and_the_end_asks_them_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Storage.open(str(tmp_path))
    for rank in range(20):
        with warnings_to_store(folder, rank):
            worker_log.warning("line %d", rank)
    reader = WarningReader(folder, 20)

    def said(everyone: bool = False) -> list[str]:
        caplog.clear()
        reader.say(everyone)
        return [record.getMessage() for record in caplog.records]

    assert [len(said()) for _ in range(4)] == [8, 8, 4, 0]
    with warnings_to_store(folder, 19):
        worker_log.warning("the last")
    assert said(everyone=True) == ["rank 19: the last"]


def test_a_store_that_does_not_answer_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    folder = Storage.open(str(tmp_path))
    with warnings_to_store(folder, 0):
        worker_log.warning("lost")
    WarningReader(folder, 1).say()
