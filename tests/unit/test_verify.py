"""`gkd verify`: what is damaged, what is left over, and what is never touched."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage
from gkd_dist.verify import Problem, orphans, prune, verify_store


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "graph"))


@pytest.fixture
def manifest(store: Storage) -> Manifest:
    parts = tuple(write_shard(store, f"part-{i:05d}", {"x": torch.arange(i, i + 50)}) for i in range(5))
    manifest = Manifest("graph", "f" * 64, parts=parts)
    manifest.save(store)
    return manifest


def test_a_sound_store_has_no_problems(store: Storage, manifest: Manifest) -> None:
    assert verify_store(store, manifest) == []
    assert verify_store(store, Manifest("graph", "f" * 64)) == []


def test_missing_truncated_altered_and_longer_objects(store: Storage, manifest: Manifest) -> None:
    keys = [entry.key for entry in manifest.parts]
    store.delete(keys[0])
    store.write(keys[1], store.read(keys[1])[:40])
    flipped = bytearray(store.read(keys[2]))
    flipped[-1] ^= 0x80
    store.write(keys[2], flipped)
    store.write(keys[4], store.read(keys[4]) + b"x")
    problems = verify_store(store, manifest)
    assert [(p.key, p.kind) for p in problems] == [
        (keys[0], "missing"),
        (keys[1], "truncated"),
        (keys[2], "altered"),
        (keys[4], "altered"),
    ]
    assert problems[1].detail == f"40 bytes, expected {manifest.parts[1].num_bytes}"
    assert str(problems[2]).startswith(f"{keys[2]} is altered: sha256 ")


def test_digests_of_the_manifest_are_checked_one_by_one(store: Storage, manifest: Manifest) -> None:
    entry = manifest.parts[0]
    wrong_crc = replace(entry, crc32=entry.crc32 ^ 1)
    wrong_tensor = replace(entry, tensors=(replace(entry.tensors[0], crc32=1),))
    for wrong, detail in ((wrong_crc, "crc32 "), (wrong_tensor, "crc32 of tensors x")):
        (problem,) = verify_store(store, replace(manifest, parts=(wrong,)))
        assert isinstance(problem, Problem)
        assert problem.kind == "altered"
        assert problem.detail.startswith(detail)


def test_orphans_are_found_and_pruned_and_nothing_else(store: Storage, manifest: Manifest, tmp_path: Path) -> None:
    late = write_shard(store, "part-00001", {"x": torch.zeros(3)})
    layer = write_shard(store, "tmp-0123abcd/layer-1/part-00000", {"x": torch.zeros(3)})
    store.write("tmp-0123abcd/started.json", b"{}")
    for key in ("notes.txt", "model.safetensors", "knowledge/teacher-01234567/part-00000-0123abcd.safetensors"):
        store.write(key, b"keep")
    young, old = tmp_path / "graph" / ".a.1-00.gkd-tmp", tmp_path / "graph" / ".b.1-00.gkd-tmp"
    for path in (young, old):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    expected = sorted([late.key, layer.key, "tmp-0123abcd/started.json", old.name])
    before = set(store.list())
    assert orphans(store, manifest) == expected
    assert prune(store, manifest) == expected
    assert orphans(store, manifest) == []
    assert set(store.list()) == before - set(expected)
    assert young.exists()
    assert not old.exists()
    assert verify_store(store, manifest) == []
