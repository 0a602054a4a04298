"""Manifests in pages: published last, read whole or not at all, and small in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from flow_runs import Job, digests, make_job, results
from forgery import signed

from gkd_dist.errors import ManifestError
from gkd_dist.shards import manifest_json
from gkd_dist.shards.manifest import Manifest, ObjectEntry, TensorEntry, page_keys, stored_kind
from gkd_dist.storage import Storage
from gkd_dist.verify import orphans, prune


def part(number: int) -> ObjectEntry:
    tensors = tuple(TensorEntry(name, "float16", (2, 3), 80, 92, number) for name in ("logits", "scores.1.sqeuclidean"))
    return ObjectEntry(f"part-{number:05d}-abcdef01.safetensors", 104, 5, "ab" * 32, tensors, {"num_owned": number})


def knowledge(num_parts: int, **changes: Any) -> Manifest:
    parts = tuple(part(number) for number in range(num_parts))
    return Manifest("knowledge", "f" * 64, {"graph": "g"}, {"dtype": "fp16", **changes}, parts)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(manifest_json.dump, "__defaults__", (10,))
    return Storage.open(f"memory://{uuid.uuid4().hex}")


def test_up_to_the_threshold_there_is_one_object(store: Storage) -> None:
    knowledge(10).save(store)
    assert store.list() == ["manifest.json"]
    assert page_keys(store, "knowledge") == set()
    assert json.loads(store.read("manifest.json"))["pages"] == []


@pytest.mark.parametrize(("num_parts", "pages"), [(11, 2), (20, 2), (95, 10)])
def test_above_it_there_are_pages(store: Storage, num_parts: int, pages: int) -> None:
    knowledge(num_parts).save(store)
    assert Manifest.load(store, "knowledge") == knowledge(num_parts)
    assert stored_kind(store) == "knowledge"
    body = json.loads(store.read("manifest.json"))
    assert body["parts"] == []
    assert sum(page["num_parts"] for page in body["pages"]) == num_parts
    assert [page["key"][:14] for page in body["pages"]] == [f"manifest-{number:04d}-" for number in range(pages)]
    assert {page["key"] for page in body["pages"]} | {"manifest.json"} == set(store.list())


def test_the_manifest_is_written_after_its_pages(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, key, data: (written.append(key), write(self, key, data))[1])
    knowledge(25).save(store)
    assert written[-1] == "manifest.json"
    assert len(written) == 4


def test_equal_content_gives_equal_pages(store: Storage) -> None:
    knowledge(25).save(store)
    before = {key: store.read(key) for key in store.list()}
    knowledge(25).save(store)
    assert {key: store.read(key) for key in store.list()} == before


def test_pages_of_an_earlier_manifest_are_orphans(store: Storage) -> None:
    knowledge(25).save(store)
    for entry in knowledge(25).parts:
        store.write(entry.key, b"")
    old = page_keys(store, "knowledge")
    shorter = Manifest("knowledge", "f" * 64, parts=knowledge(25).parts[:24])
    shorter.save(store)
    new = page_keys(store, "knowledge")
    assert orphans(store, shorter) == sorted({*(old - new), knowledge(25).parts[24].key})
    prune(store, shorter)
    assert Manifest.load(store, "knowledge") == shorter
    assert orphans(store, shorter) == []


@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_damaged_or_missing_page_is_named(store: Storage, page: int) -> None:
    knowledge(25).save(store)
    key = sorted(page_keys(store, "knowledge"))[page]
    data = store.read(key)
    for damaged in (data[:-1], data + b" ", data.replace(b'"crc32": 5', b'"crc32": 6', 1), b""):
        store.write(key, damaged)
        with pytest.raises(ManifestError, match=rf"{key} is no usable manifest: .*altered; run `gkd infer` again"):
            Manifest.load(store, "knowledge")
    store.delete(key)
    with pytest.raises(
        ManifestError, match=rf"{key} is missing, the manifest lists parts in it; run `gkd infer` again"
    ):
        Manifest.load(store, "knowledge")


def test_pages_that_do_not_fit_their_manifest(store: Storage) -> None:
    """What a wrong program could write: every digest is right, the content is not."""
    knowledge(25).save(store)
    whole = json.loads(store.read("manifest.json"))

    def refused(match: str, **changes: Any) -> None:
        store.write("manifest.json", signed({**whole, **changes}))
        with pytest.raises(ManifestError, match=match):
            Manifest.load(store, "knowledge")

    first, second, third = whole["pages"]
    refused("it is page 1 with 10 parts, expected 0 with 10", pages=[second, first, third])
    refused("lacks part-00020, .* of 25 parts", pages=[first, second])
    refused("it is page 0 with 10 parts, expected 0 with 9", pages=[first | {"num_parts": 9}, second, third])
    refused("both parts and pages", parts=[1])
    refused("expected a name like manifest-0000", pages=[first | {"key": "manifest.json"}])
    refused("expected 64 hexadecimal digits", pages=[first | {"sha256": "0"}])


_MEASURE = """
import sys, time
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
def memory(): return dict(line.split(":") for line in open("/proc/self/status"))
def kilobytes(name): return int(memory()[name].split()[0])
storage, before, started = Storage.open(sys.argv[1]), kilobytes("VmRSS"), time.process_time()
manifest = Manifest.load(storage, "knowledge")
seconds = time.process_time() - started
print(len(manifest.parts), kilobytes("VmRSS") - before, kilobytes("VmHWM") - before, seconds)
"""


def test_ten_thousand_parts_stay_small_in_memory(tmp_path: Any) -> None:
    tensors = tuple(
        TensorEntry(name, "float16", (1000, 3), 80 + 6000 * i, 6080 + 6000 * i, 7 * i)
        for i, name in enumerate(("embeddings.1", "logits", "scores.1.sqeuclidean", "scores.2.dot"))
    )
    floats = {tensor.name: {"scale": 0.0625, "bound": 0.0123456789} for tensor in tensors}
    counts = {"num_owned": 1000, "num_halo_1": 777, "num_owned_edges": 14123}
    parts = tuple(
        ObjectEntry(f"part-{i:05d}-{i:08x}.safetensors", 30000, i, f"{i:064x}", tensors, counts, {"floats": floats})
        for i in range(10_000)
    )
    Manifest("knowledge", "f" * 64, parts=parts).save(Storage.open(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    num_parts, kept, peak, seconds = map(float, done.stdout.split())
    assert num_parts == 10_000
    assert kept < 120_000, f"{kept / 1000:.0f} MB"
    assert peak < 200_000, f"{peak / 1000:.0f} MB"
    assert seconds < 30, f"{seconds:.1f} s of processor time"


def test_nobody_else_knows_of_pages(tmp_path: Path, finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run whose manifests are in pages has the results of one whose manifests are not."""
    monkeypatch.setattr(manifest_json.dump, "__defaults__", (2,))
    job = make_job(tmp_path)
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    for pattern in ("graph", "knowledge/*", "students/*/predictions"):
        assert all(len(list(folder.glob("manifest-*.json"))) == 2 for folder in job.run.glob(pattern))
    assert job.gkd("run").done == []
    assert results(job.run)["metrics"] == results(finished.run)["metrics"]
    patterns = ("**/part-*", "students/*/*.safetensors")
    assert digests(job.run, *patterns) == digests(finished.run, *patterns)
    verified = job.gkd("verify", "--orphans", "--json")
    assert (verified.json["problems"], verified.json["orphans"]) == ([], [])
