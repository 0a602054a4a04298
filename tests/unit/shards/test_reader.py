"""Writing and reading shards: keys by content, ranges, and every kind of damage."""

from __future__ import annotations

import hashlib
import uuid
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gkd_dist.errors import ShardError
from gkd_dist.shards.entries import ObjectEntry, TensorEntry
from gkd_dist.shards.reader import merge_ranges, read_object, read_rows, read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage


@pytest.fixture
def store() -> Storage:
    return Storage.open(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "n_id": torch.arange(10),
        "x": torch.randn(10, 4, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False] * 5),
    }


@pytest.fixture
def entry(store: Storage, tensors: dict[str, Tensor]) -> ObjectEntry:
    return write_shard(store, "part-00000", tensors, {"num_owned": 10}, {"note": "x"})


def alter(store: Storage, entry: ObjectEntry, index: int) -> None:
    data = bytearray(store.read(entry.key))
    data[index] ^= 1
    store.write(entry.key, data)


# --- writing ---------------------------------------------------------------------------------


def test_the_entry_describes_the_object(store: Storage, entry: ObjectEntry, tensors: dict[str, Tensor]) -> None:
    data = store.read(entry.key)
    digest = hashlib.sha256(data).hexdigest()
    assert entry.key == f"part-00000-{digest[:8]}.safetensors"
    assert (entry.num_bytes, entry.crc32, entry.sha256) == (len(data), zlib.crc32(data), digest)
    assert (entry.counts, entry.meta) == ({"num_owned": 10}, {"note": "x"})
    assert [(t.name, t.dtype, t.shape) for t in entry.tensors] == [
        ("n_id", "int64", (10,)),
        ("empty", "float32", (0, 3)),
        ("x", "bfloat16", (10, 4)),
        ("mask", "bool", (10,)),
    ]
    raw = tensors["n_id"].numpy().tobytes()
    assert data[entry.tensors[0].start : entry.tensors[0].stop] == raw
    assert entry.tensors[0].crc32 == zlib.crc32(raw)


def test_a_repeated_task_writes_the_same_object(store: Storage, entry: ObjectEntry, tensors: dict[str, Tensor]) -> None:
    assert write_shard(store, "part-00000", dict(reversed(tensors.items())), {"num_owned": 10}, {"note": "x"}) == entry
    assert store.list() == [entry.key]
    other = write_shard(store, "part-00000", tensors | {"n_id": torch.arange(1, 11)})
    assert store.list() == sorted([entry.key, other.key])


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["x"], ["mask", "n_id"], ["empty"], ["n_id", "x", "empty", "mask"], []])
def test_all_or_named_tensors(
    store: Storage, entry: ObjectEntry, tensors: dict[str, Tensor], names: list[str] | None
) -> None:
    found = read_shard(store, entry, names)
    assert found.keys() == set(tensors if names is None else names)
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name])


def test_tensors_may_be_written_to(store: Storage, entry: ObjectEntry) -> None:
    read_shard(store, entry)["n_id"].add_(1)
    read_shard(store, entry, ["n_id"])["n_id"].add_(1)
    assert read_shard(store, entry)["n_id"].tolist() == list(range(10))


def test_ranges_that_touch_become_one_request() -> None:
    entries = [TensorEntry(name, "uint8", (n,), start, start + n, 0) for name, start, n in
               [("a", 0, 10), ("b", 10, 10), ("c", 25, 5), ("d", 100, 1)]]  # fmt: skip
    names = [[e.name for e in group] for group in merge_ranges(entries[::-1], largest_gap=0)]
    assert names == [["a", "b"], ["c"], ["d"]]
    assert [len(group) for group in merge_ranges(entries, largest_gap=5)] == [3, 1]
    assert merge_ranges([]) == []


def test_only_the_named_bytes_are_fetched(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_shard(store, "part-00000", {"a": torch.zeros(100_000), "b": torch.zeros(100_000), "c": torch.ones(3)})
    fetched: list[tuple[int, int]] = []
    real = Storage.read_into

    def read_into(self: Storage, key: str, buffer: bytearray, start: int = 0) -> int:
        fetched.append((start, len(buffer)))
        return real(self, key, buffer, start)

    monkeypatch.setattr(Storage, "read_into", read_into)
    a, b, c = entry.tensors
    read_shard(store, entry, ["c", "a"])
    assert fetched == [(a.start, 400_000), (c.start, 12)]
    fetched.clear()
    read_shard(store, entry, ["c", "b"])
    assert fetched == [(b.start, 400_012)]


def test_rows_are_read_in_place_with_one_request_for_neighbours(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.rand(4, 3), "b": torch.rand(2, 3), "c": torch.rand(1), "d": torch.rand(5, 3)}
    entry = write_shard(store, "part-00000", tensors)
    fetched: list[int] = []
    real = Storage.read_into

    def read_into(self: Storage, key: str, buffer: memoryview, start: int = 0) -> int:
        fetched.append(start)
        return real(self, key, buffer, start)

    monkeypatch.setattr(Storage, "read_into", read_into)
    out = torch.empty(13, 3)
    read_rows(store, entry, ["a", "b", "d"], out[:11])
    assert torch.equal(out[:11], torch.cat([tensors["a"], tensors["b"], tensors["d"]]))
    assert fetched == [entry.tensors[0].start, entry.tensors[3].start]
    read_rows(store, entry, ["b", "a"], out[7:])
    assert torch.equal(out[7:], torch.cat([tensors["b"], tensors["a"]]))


@pytest.mark.parametrize("out", [torch.empty(3, 3), torch.empty(4, 2), torch.empty(4, 3, dtype=torch.int32)], ids=str)
def test_rows_that_do_not_fit_are_refused_before_anything_is_read(store: Storage, out: Tensor) -> None:
    entry = write_shard(store, "part-00000", {"a": torch.rand(4, 3), "b": torch.tensor(1.0)})
    with pytest.raises(ShardError, match=rf"{entry.key} has a float32 \[4, 3\], expected .* in all; run `gkd verify`"):
        read_rows(store, entry, ["a"], out)
    with pytest.raises(ShardError, match="has b float32"):
        read_rows(store, entry, ["b"], torch.empty(1))


@pytest.mark.parametrize("num_bad", [1, 2])
def test_rows_damaged_on_their_way_are_read_once_more(
    store: Storage, entry: ObjectEntry, tensors: dict[str, Tensor], num_bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = Storage.read_into, 0

    def read_into(self: Storage, key: str, buffer: memoryview, start: int = 0) -> int:
        nonlocal reads
        reads += 1
        count = real(self, key, buffer, start)
        buffer[3] ^= reads <= num_bad
        return count

    monkeypatch.setattr(Storage, "read_into", read_into)
    out = torch.empty_like(tensors["x"])
    if num_bad == 1:
        read_rows(store, entry, ["x"], out)
        assert torch.equal(out, tensors["x"])
    else:
        with pytest.raises(ShardError, match=f"tensor x of .*{entry.key} was altered: got crc32 .*in two reads"):
            read_rows(store, entry, ["x"], out)


def test_an_unknown_name_says_what_there_is(store: Storage, entry: ObjectEntry) -> None:
    for names in (["logits"], ["n_id", "x", "empty", "mask", "logits"]):
        with pytest.raises(ShardError, match=f"{entry.key} has no tensor logits; it has n_id, empty, x, mask"):
            read_shard(store, entry, names)


# --- damage ----------------------------------------------------------------------------------


def test_every_single_flipped_byte_is_noticed(store: Storage, entry: ObjectEntry) -> None:
    for index in range(0, entry.num_bytes, 7):
        alter(store, entry, index)
        with pytest.raises(ShardError, match=f"{entry.key} was altered: got crc32 .*, expected {entry.crc32:08x}"):
            read_shard(store, entry)
        alter(store, entry, index)
    read_shard(store, entry)


@pytest.mark.parametrize("names", [None, ["x"]], ids=["whole", "named"])
@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_what_was_damaged_on_its_way_is_read_once_more(
    store: Storage, entry: ObjectEntry, tensors: dict[str, Tensor], names: list[str] | None, damage: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real, reads = Storage.read_into, 0

    def read_into(self: Storage, key: str, buffer: bytearray, start: int = 0) -> int:
        nonlocal reads
        reads += 1
        count = real(self, key, buffer, start)
        if reads <= num_bad:
            buffer[3] ^= damage == "flipped"
        return count - 2 * (reads <= num_bad and damage == "short")

    monkeypatch.setattr(Storage, "read_into", read_into)
    num_bad = 1
    assert torch.equal(read_shard(store, entry, names)["x"], tensors["x"])
    assert reads == 2
    assert f"{entry.key} " in caplog.text
    assert "reading it once more" in caplog.text
    reads, num_bad = 0, 2
    with pytest.raises(ShardError, match=r"(altered|truncated): .*in two reads; run `gkd verify`"):
        read_shard(store, entry, names)
    assert reads == 2


def test_a_flipped_byte_is_noticed_by_the_tensor_that_has_it(store: Storage, entry: ObjectEntry) -> None:
    x = entry.tensor("x")
    assert x is not None
    alter(store, entry, x.start)
    assert read_shard(store, entry, ["n_id"])["n_id"].tolist() == list(range(10))
    with pytest.raises(ShardError, match=f"tensor x of .*{entry.key} was altered: got crc32"):
        read_shard(store, entry, ["n_id", "x"])


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_objects(store: Storage, entry: ObjectEntry, length: int) -> None:
    data = store.read(entry.key)[:length]
    store.write(entry.key, data)
    for names in (None, ["mask"]):  # mask comes last
        with pytest.raises(ShardError, match=f"{entry.key} is truncated: got .* bytes, expected {entry.num_bytes}"):
            read_shard(store, entry, names)


def test_objects_that_grew(store: Storage, entry: ObjectEntry) -> None:
    store.write(entry.key, store.read(entry.key) + b"x")
    with pytest.raises(ShardError, match="was altered: longer than the expected"):
        read_shard(store, entry)


def test_missing_objects(store: Storage, entry: ObjectEntry) -> None:
    store.delete(entry.key)
    for names in (None, ["x"]):
        with pytest.raises(ShardError, match=f"{store.url}/{entry.key} is missing, the manifest names it; run `gkd"):
            read_shard(store, entry, names)


def test_a_manifest_that_describes_other_tensors(store: Storage, entry: ObjectEntry) -> None:
    first = replace(entry.tensors[0], dtype="float64")  # as wide as int64: the numbers would be wrong
    wrong = replace(entry, tensors=(first, *entry.tensors[1:]))
    with pytest.raises(ShardError, match=f"{entry.key}: it holds .*, the manifest describes other tensors"):
        read_shard(store, wrong)


def test_an_entry_that_lists_only_some_tensors_serves_named_reads(store: Storage, entry: ObjectEntry) -> None:
    trimmed = replace(entry, tensors=entry.tensors[:1])
    assert read_shard(store, trimmed, ["n_id"])["n_id"].tolist() == list(range(10))


def test_the_bytes_of_an_object_are_checked_too(store: Storage, entry: ObjectEntry) -> None:
    assert bytes(read_object(store, entry)) == store.read(entry.key)
    alter(store, entry, 0)
    with pytest.raises(ShardError, match="was altered"):
        read_object(store, entry)


def test_nothing_stored_can_run_code(store: Storage, entry: ObjectEntry) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, ("raise SystemExit('ran')",)

    data = pickle.dumps(Bomb())
    store.write(entry.key, data)
    forged = replace(entry, num_bytes=len(data), crc32=zlib.crc32(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ShardError, match="not a safetensors object"):
        read_shard(store, forged)
