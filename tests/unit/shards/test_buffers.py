"""Buffers are used again, and never while anybody looks at them."""

from __future__ import annotations

import gc
import pickle
import threading
from pathlib import Path

import torch

from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.codec import decode, encode
from gkd_dist.shards.reader import read_object, read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_memory_that_nobody_uses_is_used_again() -> None:
    pool = BufferPool(1)
    view = pool.room(100)
    first = address(view)
    assert pool.free_bytes == 0
    del view
    assert pool.free_bytes == 100
    assert address(pool.room(60)) == first, "a little larger than needed serves"
    assert len(pool.room(60)) == 60


def test_memory_in_use_is_left_alone() -> None:
    """A view, a slice of it, and a tensor made of either each keep the buffer."""
    pool = BufferPool(4)
    view = pool.room(64)
    keep = {"slice": view[8:16], "tensor": torch.frombuffer(view, dtype=torch.float32)[2:4]}
    first = address(view)
    del view
    gc.collect()
    for name in list(keep):
        assert address(pool.room(64)) != first, name
        del keep[name]
        gc.collect()
    assert first in [address(view) for view in [pool.room(64) for _ in range(3)]]


def test_only_so_many_are_kept_and_none_that_do_not_fit() -> None:
    pool = BufferPool(2)
    views = [pool.room(10) for _ in range(3)]
    views.clear()
    assert pool.free_bytes == 20
    assert len(pool.room(1000)) == 1000
    assert pool.free_bytes <= 1000, "the small ones are gone"


def test_a_copy_in_another_process_has_none() -> None:
    pool = BufferPool(3)
    pool.room(10)
    copied = pickle.loads(pickle.dumps(pool))
    assert (copied.num_buffers, copied.free_bytes) == (3, 0)


def test_shards_read_one_after_the_other_share_memory_and_keep_their_values(tmp_path: Path) -> None:
    store, pool = Storage.open(str(tmp_path)), BufferPool(2)
    tensors = [{"x": torch.arange(500) * index, "m": torch.tensor([True, False])} for index in range(6)]
    entries = [write_shard(store, f"part-{index:05d}", value) for index, value in enumerate(tensors)]
    kept = read_shard(store, entries[5], ["x"], pool)["x"]
    places = set()
    for index in range(5):
        for names in (None, ["x", "m"]):
            found = read_shard(store, entries[index], names, pool)
            assert all(torch.equal(found[name], tensors[index][name]) for name in found)
            places.add(found["x"].data_ptr())
            del found
    assert len(places) <= 4, "two buffers, read whole or by names"
    assert torch.equal(kept, tensors[5]["x"]), "somebody still used this one"
    assert decode(bytes(read_object(store, entries[0], pool))).keys() == decode(encode(tensors[0])).keys()


def test_many_threads_never_get_the_same_memory() -> None:
    pool, failed = BufferPool(3), []

    def work(mark: int) -> None:
        for _ in range(300):
            view = pool.room(256)
            view[:] = bytes([mark]) * 256
            if bytes(view) != bytes([mark]) * 256:
                failed.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
