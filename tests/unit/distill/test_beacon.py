"""The heart of a rank and the store that carries its beats: one that stumbles, and one that is gone."""

from __future__ import annotations

import json
import threading
import time

import pytest
from torch.distributed import HashStore

from gkd_dist.distill import beacon
from gkd_dist.distill.beacon import Beacon
from gkd_dist.world import World


class Stumbling:
    """A store that refuses its first ``failures`` writes."""

    def __init__(self, failures: float) -> None:
        self.store, self.failures, self.writes = HashStore(), failures, 0
        self.store.set("gkd/beacon/1", "{}")

    def set(self, key: str, value: str) -> None:
        """Like torch's."""
        self.writes += 1
        if self.writes <= self.failures:
            raise RuntimeError("Connection reset by peer")
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        """Like torch's."""
        return self.store.get(key)


def beating(store: Stumbling) -> tuple[Beacon, threading.Thread]:
    one = Beacon(World(0, 2), 25.0)
    one._store = store
    thread = threading.Thread(target=one._beat, daemon=True)
    thread.start()
    return one, thread


def test_a_store_that_stumbles_does_not_stop_the_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacon, "_BEAT_S", 0.01)
    store = Stumbling(3)
    one, thread = beating(store)
    deadline = time.monotonic() + 20
    while store.writes < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread.is_alive()
    one._ended.set()
    thread.join(20)
    assert json.loads(store.get("gkd/beacon/0"))["count"] >= 8


def test_one_that_is_gone_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacon, "_BEAT_S", 0.001)
    _, thread = beating(Stumbling(float("inf")))
    thread.join(20)
    assert not thread.is_alive()
