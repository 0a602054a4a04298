"""Manifests: the JSON a person reads, and every way in which one can be unusable."""

from __future__ import annotations

import contextlib
import copy
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from forgery import signed
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ManifestError, NewerSchemaError
from gkd_dist.fingerprints import FORMAT
from gkd_dist.shards import manifest_json
from gkd_dist.shards.manifest import Manifest, ObjectEntry, TensorEntry
from gkd_dist.storage import Storage

FINGERPRINT = "0123456789abcdef" * 4


def part(number: int, **changes: Any) -> ObjectEntry:
    tensor = TensorEntry("x", "float32", (2, 3), 80, 104, 7)
    fields: dict[str, Any] = {
        "key": f"part-{number:05d}-abcdef01.safetensors",
        "num_bytes": 104,
        "crc32": 5,
        "sha256": "ab" * 32,
        "tensors": (tensor,),
        "counts": {"num_owned": 2},
        "meta": {"floats": {"x": {"scale": 1.0, "bound": 0.25}}},
    }
    return ObjectEntry(**(fields | changes))


def graph(num_parts: int = 2, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "graph",
        "fingerprint": FINGERPRINT,
        "inputs": {"data": "dd"},
        "meta": {"num_nodes": 4, "cut": 0.1},
        "parts": tuple(part(number) for number in range(num_parts)),
    }
    return Manifest(**(fields | changes))


def document(manifest: Manifest) -> manifest_json.Document:
    return manifest_json.Document(
        manifest.kind, manifest.fingerprint, manifest.inputs, manifest.meta, manifest.parts, manifest.format_version
    )


def no_page(*args: Any) -> bytes:
    raise AssertionError(f"a small manifest has no pages: {args}")


def dump(manifest: Manifest) -> bytes:
    return manifest_json.dump(document(manifest), no_page)


def parse(data: bytes) -> Manifest:
    found = manifest_json.parse(data, "memory://store", "graph", no_page)
    return Manifest(**{**vars(found), "parts": tuple(found.parts)})


@pytest.fixture
def store() -> Storage:
    return Storage.open(f"memory://{uuid.uuid4().hex}")


def test_round_trip(store: Storage) -> None:
    graph().save(store)
    assert Manifest.load(store, "graph", FINGERPRINT) == graph()
    assert graph().parts[0].tensor("x") == TensorEntry("x", "float32", (2, 3), 80, 104, 7)
    assert graph().parts[0].tensor("y") is None


def test_the_text_has_one_line_per_part() -> None:
    lines = dump(graph(3)).decode().splitlines()
    assert sum('"key": "part-' in line for line in lines) == 3
    assert lines[-6] == ' "parts": ['


def test_no_parts_are_a_store_too(store: Storage) -> None:
    graph(0).save(store)
    assert Manifest.load(store, "graph").parts == ()


def test_meta_is_read_as_json_writes_it(store: Storage) -> None:
    graph(meta={"layers": (1, 2), 10: "ten", 9: "nine"}).save(store)
    assert Manifest.load(store, "graph").meta == {"layers": [1, 2], "10": "ten", "9": "nine"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_meta_that_is_not_json_is_refused_at_saving(store: Storage, value: object) -> None:
    with pytest.raises(ManifestError, match=r"not JSON .*finite floats"):
        graph(meta={"value": value}).save(store)
    assert not store.exists("manifest.json")


# --- the wrong store -------------------------------------------------------------------------


def test_no_manifest(store: Storage) -> None:
    with pytest.raises(ManifestError, match=r"there is no knowledge store at memory://.*run `gkd infer` first"):
        Manifest.load(store, "knowledge")


def test_another_kind(store: Storage) -> None:
    graph().save(store)
    with pytest.raises(ManifestError, match="is of a graph store, expected a knowledge store; check the URL"):
        Manifest.load(store, "knowledge")


def test_another_fingerprint_names_the_stage(store: Storage) -> None:
    graph().save(store)
    with pytest.raises(ManifestError, match=r"fingerprint 01234567, expected ffffffff.*run `gkd partition` again"):
        Manifest.load(store, "graph", "f" * 64)


def test_another_input() -> None:
    knowledge = graph(kind="knowledge", inputs={"graph": "a" * 64})
    knowledge.require_input("graph", "a" * 64, "s3://b/knowledge")
    with pytest.raises(ManifestError, match="made from graph aaaaaaaa, expected bbbbbbbb; run `gkd infer` again"):
        knowledge.require_input("graph", "b" * 64, "s3://b/knowledge")
    with pytest.raises(ManifestError, match="made from model nothing, expected bbbbbbbb"):
        knowledge.require_input("model", "b" * 64, "s3://b/knowledge")


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    body = json.loads(dump(graph())) | {"schema_version": 3, "shape_of_things_to_come": 1}
    with pytest.raises(NewerSchemaError, match="has schema version 3, this gkd_dist reads up to 2; upgrade gkd_dist"):
        parse(json.dumps(body).encode())


def test_a_newer_format_asks_for_an_upgrade() -> None:
    newer = FORMAT["graph"] + 1
    with pytest.raises(NewerSchemaError, match=f"has format {newer}, .* up to {newer - 1}; upgrade gkd_dist"):
        parse(edit(lambda body: body.update(format_version=newer)))


def test_an_older_format_is_named_where_the_fingerprint_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse(dump(graph()))
    found.require_fingerprint(FINGERPRINT, "s3://b/graph")
    monkeypatch.setitem(FORMAT, "graph", FORMAT["graph"] + 1)
    with pytest.raises(ManifestError, match=r"it has format \d, today's is \d; run `gkd partition` again"):
        found.require_fingerprint("f" * 64, "s3://b/graph")


# --- incomplete ------------------------------------------------------------------------------


def test_missing_parts_are_named() -> None:
    body = json.loads(dump(graph(4)))
    del body["parts"][1:3]
    with pytest.raises(ManifestError, match="lacks part-00001, part-00002 of 4 parts; run `gkd partition` again"):
        parse(signed(body))


def test_many_missing_parts_are_counted() -> None:
    with pytest.raises(ManifestError, match=r"lacks part-00002, .*, part-00006 and 3 more of 10 parts"):
        graph(2).require_parts(10, "s3://b/graph")
    graph(2).require_parts(2, "s3://b/graph")


@pytest.mark.parametrize(
    "parts",
    [
        (part(1), part(0)),
        (part(0), part(0), part(1)),
        (part(0), part(1, key="something.safetensors")),
    ],
)
def test_parts_out_of_order_are_not_saved(store: Storage, parts: tuple[ObjectEntry, ...]) -> None:
    with pytest.raises(ManifestError, match=r"expected its \d parts in order|lacks part-"):
        graph(parts=parts).save(store)


# --- altered ---------------------------------------------------------------------------------


def test_one_altered_digit_is_noticed(store: Storage) -> None:
    store.write("manifest.json", dump(graph()).replace(b'"num_nodes": 4', b'"num_nodes": 5'))
    with pytest.raises(ManifestError, match=r"manifest\.json .*does not match its sha256: it was altered"):
        Manifest.load(store, "graph")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, dump(graph())[:-10]])
def test_text_that_is_no_json(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"it is not JSON .*run `gkd partition` again"):
        parse(data)


def edit(change: Callable[[dict[str, Any]], Any]) -> bytes:
    body = json.loads(dump(graph()))
    change(body)
    return signed(body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(schema_version=True), "schema_version is True"),
        (lambda b: b.update(more=1), "'more'"),
        (lambda b: b.pop("inputs"), "'inputs'"),
        (lambda b: b.update(fingerprint=3), "fingerprint is 3, expected text"),
        (lambda b: b.update(inputs={"a": 1}), "inputs.a is 1, expected text"),
        (lambda b: b.update(meta=[]), r"meta is \[\], expected an object"),
        (lambda b: b.update(parts={}), r"parts is \{\}, expected a list"),
        (lambda b: b.update(num_parts=-1), "num_parts is -1"),
        (lambda b: b.update(format_version=None), "format_version is None"),
        (lambda b: b.update(pages=3), "pages is 3, expected a list"),
        (lambda b: b.update(pages=[3]), r"pages\[0\] is 3, expected an object"),
        (lambda b: b["parts"].append(3), r"parts\[2\] is 3, expected an object"),
        (lambda b: b["parts"][0].update(key="../x"), "expected a key inside the store"),
        (lambda b: b["parts"][0].update(sha256="xyz"), "expected 64 hexadecimal digits"),
        (lambda b: b["parts"][0].update(num_bytes=1.5), r"parts\[0\].num_bytes is 1.5, expected an integer"),
        (lambda b: b["parts"][0].update(crc32=1 << 32), "crc32 is 4294967296"),
        (lambda b: b["parts"][0].update(counts={"n": True}), "counts.n is True"),
        (lambda b: b["parts"][0]["tensors"][0].update(dtype="complex64"), "dtype is 'complex64'"),
        (lambda b: b["parts"][0]["tensors"][0].update(shape=[2, -3]), "expected a list of sizes"),
        (lambda b: b["parts"][0]["tensors"][0].update(shape=[2, 4]), "do not fit its shape"),
        (lambda b: b["parts"][0]["tensors"][0].update(start=104, stop=128), "do not fit its shape and the object"),
    ],
)
def test_every_field_is_checked(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse(edit(change))


def test_one_entry_is_checked_like_those_of_a_manifest() -> None:
    value = json.loads(json.dumps(asdict(part(3))))
    assert manifest_json.entry_from_json(value, "s3://b/record.json", "knowledge") == part(3)
    with pytest.raises(ManifestError, match=r"s3://b/record\.json .*crc32 is -1.*run `gkd infer` again"):
        manifest_json.entry_from_json(value | {"crc32": -1}, "s3://b/record.json", "knowledge")


# --- any edit --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, inner in items for place in [(*path, name), *places(inner, (*path, name))]]


BODY = json.loads(dump(graph()))
PLACES = [place for place in places(BODY) if place[0] != "sha256"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), JSON)
def test_any_value_in_any_place_is_read_or_refused_by_name(place: tuple[Any, ...], value: Any) -> None:
    body = copy.deepcopy(BODY)
    target = body
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    with contextlib.suppress(ManifestError):
        read = parse(signed(body))
        assert parse(dump(read)) == read


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damaged_byte_is_noticed(data: st.DataObject) -> None:
    whole = bytearray(dump(graph()))
    index = data.draw(st.integers(0, len(whole) - 1))
    whole[index] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ManifestError):
        assert parse(bytes(whole)) == graph()  # white space, or another spelling of the same JSON
