"""Stores of earlier schema versions, as they were written then: they stay readable, value for value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gkd_dist.partition.store import GraphStore
from gkd_dist.shards import manifest_upgrade
from gkd_dist.shards.manifest import SCHEMA_VERSION, Manifest
from gkd_dist.shards.quantise import unpack_float
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage
from gkd_dist.verify import verify_store

V1 = Path(__file__).parent / "fixtures" / "v1"
FOLDERS = {"graph": "graph", "knowledge": "knowledge/teacher-bbbbbbbb"}


def open_v1(kind: str) -> tuple[Storage, Manifest]:
    storage = Storage.open(str(V1 / FOLDERS[kind]))
    assert json.loads(storage.read("manifest.json"))["schema_version"] == 1
    return storage, Manifest.load(storage, kind)


@pytest.mark.parametrize("kind", ["graph", "knowledge"])
def test_version_1_gives_the_values_it_was_written_with(kind: str) -> None:
    storage, manifest = open_v1(kind)
    known = json.loads((V1 / "values.json").read_text())[kind]
    assert len(manifest.parts) == len(known) == 2
    assert manifest.format_version == 1
    assert verify_store(storage, manifest) == []
    for entry, values in zip(manifest.parts, known, strict=True):
        tensors = read_shard(storage, entry)
        assert tensors.keys() == values.keys()
        for name, tensor in tensors.items():
            value = unpack_float(tensor, entry.meta["floats"][name]) if kind == "knowledge" else tensor
            assert torch.equal(value, torch.tensor(values[name], dtype=value.dtype)), name


def test_version_1_of_a_graph_opens_as_a_graph_store() -> None:
    store = GraphStore.open(Storage.open(str(V1 / "graph")), "a" * 64)
    assert store.num_parts == 2
    assert store.num_features == 5
    assert (
        store.part(1, ["n_id"])["n_id"].numel()
        == store.manifest.parts[1].counts["num_owned"] + (store.manifest.parts[1].counts["num_halo"])
    )


@pytest.mark.parametrize("kind", ["graph", "knowledge"])
def test_the_same_content_in_the_newest_version_is_equal(kind: str, tmp_path: Path) -> None:
    _, old = open_v1(kind)
    newest = Storage.open(str(tmp_path))
    old.save(newest)
    assert json.loads(newest.read("manifest.json"))["schema_version"] == SCHEMA_VERSION
    assert Manifest.load(newest, kind) == old
    assert Manifest.load(newest, kind).format_version == old.format_version


def test_reading_rewrites_nothing(tmp_path: Path) -> None:
    shutil.copytree(V1, tmp_path / "v1")
    before = {path: path.read_bytes() for path in (tmp_path / "v1").rglob("*") if path.is_file()}
    Manifest.load(Storage.open(str(tmp_path / "v1" / "graph")), "graph")
    assert {path: path.read_bytes() for path in (tmp_path / "v1").rglob("*") if path.is_file()} == before


def test_every_version_has_its_fields_and_a_way_up() -> None:
    assert manifest_upgrade.FIELDS.keys() == set(range(1, SCHEMA_VERSION + 1))
    for version, names in manifest_upgrade.FIELDS.items():
        body = {**dict.fromkeys(names), "schema_version": version}
        assert manifest_upgrade.upgrade(body).keys() == set(manifest_upgrade.FIELDS[SCHEMA_VERSION])
