"""Random bytes and random edits of everything that is read back: refused by name, or the same content.

Two kinds of edit. *Damage* changes bytes and leaves digests alone: what is read must be what was
written, or a `GkdError`. *Forgery* is what a wrong program would write, with digests that fit: what
is read must be well-formed, or a `GkdError`. Nothing else may be raised.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import uuid
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from flow_runs import Job
from forgery import signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkd_dist.config import ModelConfig
from gkd_dist.distill.checkpoint import TrainState, load_checkpoint, save_checkpoint
from gkd_dist.errors import GkdError, ShardError
from gkd_dist.infer.commits import Commits, record_key
from gkd_dist.infer.plan import KNOWLEDGE, Task
from gkd_dist.infer.worker import Result
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, read_checkpoint, read_model, save_model
from gkd_dist.owner import Owner, Ownership
from gkd_dist.shards import manifest_json
from gkd_dist.shards.codec import decode, encode, read_spans
from gkd_dist.shards.manifest import Manifest, TensorEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.seal import SEAL, sealed
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

Edit = Callable[[bytes], bytes]


def cases(number: int) -> Callable[[Any], Any]:
    """The same ``number`` of examples in every run."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=health)


@st.composite
def damage(draw: st.DrawFn) -> Edit:
    """A few bytes changed, cut off, put in or replaced by others."""
    kind = draw(st.sampled_from(["flip", "flip", "truncate", "insert", "random", "swap"]))
    place, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 9))
    other = draw(st.binary(min_size=size, max_size=size))

    def edit(data: bytes) -> bytes:
        at = int(place * len(data))
        if kind == "flip" and data:
            return data[:at] + bytes([data[at] ^ (other[0] or 1)]) + data[at + 1 :]
        if kind == "truncate":
            return data[:at]
        if kind == "insert":
            return data[:at] + other + data[at:]
        return other if kind == "random" else data[:at] + other + data[at + size :]

    return edit


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["", "..", "\ud800", "0" * 64, "part-00000-00000000.safetensors"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, inner in items for place in [(*path, name), *places(inner, (*path, name))]]


def edited(draw: st.DrawFn | Any, body: Any) -> Any:
    """``body`` with one value replaced, removed or added."""
    body = copy.deepcopy(body)
    place = draw(st.sampled_from(places(body)))
    target = body
    for name in place[:-1]:
        target = target[name]
    action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "remove":
        del target[place[-1]]
    elif action == "add" and isinstance(target, dict):
        target[draw(st.text(max_size=5))] = draw(JSON)
    else:
        target[place[-1]] = draw(JSON)
    return body


def text_of(body: Any) -> bytes:
    return json.dumps(body).encode()


def memory() -> Storage:
    return Storage.open(f"memory://{uuid.uuid4().hex}")


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or None where it refuses as it should."""
    try:
        return read()
    except GkdError:
        return None


# --- manifests and their pages ---------------------------------------------------------------


@cache
def stored_manifest(parts_per_page: int = 1000) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of real shards, and all objects of its store."""
    store = memory()
    tensors = {"logits": torch.arange(6.0).view(2, 3), "n_id": torch.arange(2)}
    parts = tuple(write_shard(store, f"part-{i:05d}", tensors, {"num_owned": 2}, {"k": [i]}) for i in range(5))
    manifest = Manifest("knowledge", "f" * 64, {"graph": "g"}, {"dtype": "fp16", "scores": {}}, parts)
    document = manifest_json.Document("knowledge", "f" * 64, manifest.inputs, manifest.meta, parts)
    store.write("manifest.json", manifest_json.dump(document, store.write, parts_per_page))
    return manifest, {key: store.read(key) for key in store.list()}


def load_manifest(objects: dict[str, bytes]) -> Manifest:
    def read_page(key: str) -> bytes:
        if key not in objects:
            raise ShardError("no such page; run the stage again")
        return objects[key]

    found = manifest_json.parse(objects["manifest.json"], "memory://store", "knowledge", read_page)
    return Manifest(found.kind, found.fingerprint, dict(found.inputs), dict(found.meta), tuple(found.parts))


@cases(300)
@given(damage(), st.sampled_from([2, 1000]), st.data())
def test_damaged_manifests_and_pages(edit: Edit, parts_per_page: int, data: st.DataObject) -> None:
    manifest, objects = stored_manifest(parts_per_page)
    key = data.draw(st.sampled_from(sorted(key for key in objects if key.endswith(".json"))))
    found = read_or_refused(lambda: load_manifest(objects | {key: edit(objects[key])}))
    assert found in (None, manifest)


@cases(350)
@given(st.data(), st.sampled_from([2, 1000]), st.booleans())
def test_forged_manifests(data: st.DataObject, parts_per_page: int, fitting: bool) -> None:
    manifest, objects = stored_manifest(parts_per_page)
    body = edited(data.draw, json.loads(objects["manifest.json"]))
    found = read_or_refused(
        lambda: load_manifest(objects | {"manifest.json": signed(body) if fitting else text_of(body)})
    )
    if found is not None:
        assert fitting or found == manifest
        again: dict[str, bytes] = {}
        document = manifest_json.Document(found.kind, found.fingerprint, found.inputs, found.meta, found.parts)
        again["manifest.json"] = manifest_json.dump(document, again.__setitem__)
        assert load_manifest(again) == found


@cases(150)
@given(st.data())
def test_forged_pages(data: st.DataObject) -> None:
    _, objects = stored_manifest(2)
    body = json.loads(objects["manifest.json"])
    number = data.draw(st.integers(0, len(body["pages"]) - 1))
    page = body["pages"][number]
    text = text_of(edited(data.draw, json.loads(objects[page["key"]])))
    page |= {"num_bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    found = read_or_refused(lambda: load_manifest(objects | {page["key"]: text, "manifest.json": signed(body)}))
    assert found is None or [part.key[:10] for part in found.parts] == [f"part-{i:05d}" for i in range(5)]


# --- shards ----------------------------------------------------------------------------------

TENSORS = {
    "x": torch.arange(12.0).view(4, 3),
    "half": torch.arange(5.0).half(),
    "ids": torch.arange(7),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


@cases(300)
@given(damage(), st.sampled_from([None, ["x"], ["ids", "mask"], ["none", "half"]]))
def test_damaged_shards_whole_and_by_range(edit: Edit, names: list[str] | None) -> None:
    store = memory()
    entry = write_shard(store, "part-00000", TENSORS)
    store.write(entry.key, edit(store.read(entry.key)))
    found = read_or_refused(lambda: read_shard(store, entry, names))
    assert found is None or same(found, {name: TENSORS[name] for name in names or TENSORS})


@cases(250)
@given(st.data())
def test_forged_shards(data: st.DataObject) -> None:
    """A header that a wrong program wrote, under digests that fit."""
    whole = encode(TENSORS)
    length = int.from_bytes(whole[:8], "little")
    header = text_of(edited(data.draw, json.loads(whole[8 : 8 + length])))
    forged = data.draw(st.sampled_from([length, len(header), (1 << 64) - 1])).to_bytes(8, "little") + header
    forged += whole[8 + length :]
    spans = read_or_refused(lambda: read_spans(forged))
    found = read_or_refused(lambda: decode(forged))
    if found is not None:
        assert spans is not None
        assert [(span.name, span.dtype, span.shape) for span in spans] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
        ]
    store = memory()
    entry = write_shard(store, "part-00000", TENSORS)
    store.write(entry.key, forged)
    entry = replace(entry, num_bytes=len(forged), crc32=zlib.crc32(forged), sha256=hashlib.sha256(forged).hexdigest())
    read = read_or_refused(lambda: read_shard(store, entry))
    assert read is None or same(read, TENSORS)


@cases(100)
@given(st.binary(max_size=300))
def test_random_bytes_as_shards(data: bytes) -> None:
    found = read_or_refused(lambda: decode(data))
    assert found is None or encode(found) is not None


@cases(100)
@given(st.data())
def test_entries_that_do_not_fit_their_object(data: st.DataObject) -> None:
    store = memory()
    entry = write_shard(store, "part-00000", TENSORS)
    where = data.draw(st.integers(0, len(entry.tensors) - 1))
    change = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "start": st.integers(0, 400),
                "stop": st.integers(0, 400),
                "shape": st.lists(st.integers(0, 9), max_size=3).map(tuple),
                "dtype": st.sampled_from(["float32", "int64", "bool", "bfloat16"]),
                "name": st.text(max_size=3),
            },
        ).filter(bool)
    )
    wrong = replace(entry.tensors[where], **change)
    broken = replace(entry, tensors=(*entry.tensors[:where], wrong, *entry.tensors[where + 1 :]))
    parsed = read_or_refused(
        lambda: manifest_json.entry_from_json(json.loads(text_of(asdict(broken))), "s3://b", "graph")
    )
    if parsed is None:
        return
    if parsed != entry:
        assert read_or_refused(lambda: read_shard(store, parsed)) is None
    one = read_or_refused(lambda: read_shard(store, parsed, [wrong.name]))
    expected = TensorEntry(wrong.name, wrong.dtype, wrong.shape, wrong.start, wrong.stop, wrong.crc32)
    assert one is None or tuple(one[wrong.name].shape) == expected.shape


# --- models, checkpoints, records ------------------------------------------------------------


@cache
def stored_model() -> dict[str, bytes]:
    store = memory()
    config = ModelConfig(kind="sage", hidden=4, layers=2)
    save_model(store, build_model(config, 3, 2), ModelSpec(config, 3, 2, "multiclass", {"n": 1}), "f" * 64)
    return {key: store.read(key) for key in store.list()}


def open_model(objects: dict[str, bytes]) -> tuple[Any, Any]:
    store = memory()
    for key, data in objects.items():
        store.write(key, data)
    model, spec = read_model(store)
    return {name: value.tolist() for name, value in model.state_dict().items()}, spec


@cases(150)
@given(damage(), st.sampled_from(["model.json", "model.safetensors"]))
def test_damaged_models(edit: Edit, key: str) -> None:
    objects = stored_model()
    found = read_or_refused(lambda: open_model(objects | {key: edit(objects[key])}))
    assert found is None or found == open_model(objects)


@cases(150)
@given(st.data(), st.booleans())
def test_forged_models(data: st.DataObject, fitting: bool) -> None:
    objects = stored_model()
    body = json.loads(objects["model.json"])
    if fitting:
        del body[SEAL]
    body = edited(data.draw, body)
    try:
        text = text_of(sealed(body) if fitting else body)
    except ValueError:  # NaN: nobody can seal it
        return
    found = read_or_refused(lambda: open_model(objects | {"model.json": text}))
    assert found is None or fitting or found == open_model(objects)


@cache
def stored_checkpoint() -> dict[str, bytes]:
    store = memory()
    state = TrainState((3, 1), 7, 0.5, 2, 1, {"lsp": 2.5}, False)
    state.model, state.best = {"w": torch.arange(4.0)}, {"w": torch.ones(4)}
    state.optimizer = {"w/step": torch.tensor(7.0)}
    save_checkpoint(store, state, "f" * 64, keep=2)
    return {key: store.read(key) for key in store.list()}


def open_checkpoint(objects: dict[str, bytes]) -> Any:
    store = memory()
    for key, data in objects.items():
        store.write(key, data)
    found = load_checkpoint(store, "f" * 64)
    return None if found is None else json.loads(json.dumps(asdict(found), default=lambda tensor: tensor.tolist()))


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gkd_dist")


@cases(150)
@given(damage(), st.sampled_from(sorted(stored_checkpoint())))
def test_damaged_training_checkpoints(edit: Edit, key: str) -> None:
    objects = stored_checkpoint()
    found = open_checkpoint(objects | {key: edit(objects[key])})
    assert found is None or found == open_checkpoint(objects)


@cases(150)
@given(st.data(), st.booleans())
def test_forged_training_checkpoints(data: st.DataObject, fitting: bool) -> None:
    objects = stored_checkpoint()
    key = next(key for key in objects if key.endswith("COMMIT.json"))
    body = json.loads(objects[key])
    if fitting:
        del body[SEAL]
    body = edited(data.draw, body)
    try:
        text = text_of(sealed(body) if fitting else body)
    except ValueError:
        return
    found = read_or_refused(lambda: open_checkpoint(objects | {key: text}))
    assert found is None or fitting or found == open_checkpoint(objects)


TASK = Task(KNOWLEDGE, 0)


@cache
def stored_record() -> tuple[Result, bytes, bytes]:
    store = memory()
    entry = write_shard(store, "part-00000", TENSORS, {"num_owned": 4}, {"floats": {"x": {"scale": 1.0, "bound": 0.0}}})
    commits, result = Commits(store, "f" * 64), Result(entry, {"scores.1.dot": {40000: 3, 40001: 1}})
    commits.resume([TASK])
    commits.add(TASK, result)
    return result, store.read(record_key(TASK)), store.read("started.json")


def resumed(record: bytes, started: bytes) -> Result | None:
    store = memory()
    store.write(record_key(TASK), record)
    store.write("started.json", started)
    return Commits(store, "f" * 64).resume([TASK]).get(TASK)


@cases(100)
@given(damage(), st.booleans())
def test_damaged_records_of_inference(edit: Edit, of_record: bool) -> None:
    result, record, started = stored_record()
    found = read_or_refused(
        lambda: resumed(edit(record) if of_record else record, started if of_record else edit(started))
    )
    assert found in (None, result)


@cases(100)
@given(st.data(), st.booleans())
def test_forged_records_of_inference(data: st.DataObject, fitting: bool) -> None:
    result, record, started = stored_record()
    body = json.loads(record)
    if fitting:
        del body[SEAL]
    body = edited(data.draw, body)
    try:
        text = text_of(sealed(body) if fitting else body)
    except ValueError:
        return
    found = read_or_refused(lambda: resumed(text, started))
    assert found is None or fitting or found == result


@cases(100)
@given(st.data(), damage(), st.booleans())
def test_owner_records(data: st.DataObject, edit: Edit, bytewise: bool) -> None:
    """Whatever stands there: the run is free, or held, or that cannot be read; each in one sentence."""
    body = asdict(Owner("elsewhere", 12, "0" * 32, 1e9, 1e9))
    store = memory()
    store.write("owner.json", edit(text_of(body)) if bytewise else text_of(edited(data.draw, body)))
    owner = Ownership(store)
    read_or_refused(lambda: owner._refuse_if_held(1e9))
    read_or_refused(owner.check)


# --- the user's own checkpoints: no digest, so only form can be checked -----------------------


@cases(100)
@given(damage(), st.sampled_from(["teacher.safetensors", "teacher.pt"]))
def test_teacher_checkpoints(edit: Edit, name: str) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    state = {"convs.0.weight": torch.arange(6.0).view(2, 3), "convs.0.bias": torch.zeros(2)}
    sink = io.BytesIO()
    torch.save(state, sink)
    data = encode(state) if name.endswith(".safetensors") else sink.getvalue()
    Storage.open(url).write(name, edit(data))
    found = read_or_refused(lambda: read_checkpoint(f"{url}/{name}"))
    assert found is None or all(isinstance(value, torch.Tensor) for value in found.values())


# --- through the command ---------------------------------------------------------------------

FILES = ["graph/manifest.json", "graph/part-00001-*", "knowledge/*/manifest.json", "knowledge/*/part-00000-*",
         "teacher/model.json", "students/distilled/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("pattern", FILES)
def test_through_the_command(copied: Job, pattern: str) -> None:
    (file,) = copied.run.glob(pattern)
    whole = file.read_bytes()

    @cases(8)
    @given(damage())
    def verified(edit: Edit) -> None:
        file.write_bytes(edit(whole))
        outcome = copied.gkd("verify")
        assert "Traceback" not in outcome.err
        assert "unexpected" not in outcome.err
        assert outcome.code in (0, 3)
        if outcome.code == 0:  # the same JSON in other words
            assert file.suffix == ".json"
            body, before = json.loads(file.read_bytes()), json.loads(whole)
            assert body == before
        if file.name == "manifest.json":
            looked = copied.gkd("inspect")
            assert "Traceback" not in looked.err
            assert looked.code in (0, 3)

    verified()
