"""A manifest as JSON and back, every field checked.

The text has one line per part, so that it can be read, searched and compared by line. ``sha256``
is that of the same JSON without this field, as ``json.dumps(body, sort_keys=True)`` writes it.
Parts are handled one by one: with thousands of them the driver's memory would show a copy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import ManifestError, NewerSchemaError
from gkd_dist.shards import codec
from gkd_dist.shards.entries import ObjectEntry, TensorEntry, check_complete, rerun

SCHEMA_VERSION = 1
_FIELDS = ("schema_version", "kind", "fingerprint", "inputs", "meta", "num_parts", "parts", "sha256")
_PART_FIELDS = ("key", "num_bytes", "crc32", "sha256", "counts", "meta", "tensors")
_TENSOR_FIELDS = ("name", "dtype", "shape", "start", "stop", "crc32")


def dump(
    kind: str, fingerprint: str, inputs: Mapping[str, str], meta: Mapping[str, Any], parts: Sequence[ObjectEntry]
) -> bytes:
    """A manifest as UTF-8 JSON; ManifestError where a value is not plain JSON."""
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "fingerprint": fingerprint,
        "inputs": dict(inputs),
        "meta": dict(meta),
        "num_parts": len(parts),
    }
    try:
        # read back, as a reader will see it: keys are text, tuples are lists
        body = json.loads(json.dumps(body, allow_nan=False))
        lines = [_sorted(json.loads(json.dumps(_part_fields(part), allow_nan=False))) for part in parts]
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"the manifest of a {kind} store holds a value that is not JSON ({error}); "
            "keep to text, integers, finite floats, lists and dicts"
        ) from error
    body["sha256"] = _digest(body, lines)
    head = json.dumps(body, indent=1, sort_keys=True)
    listed = ",\n".join(f"  {line}" for line in lines)
    return f'{head[:-2]},\n "parts": [\n{listed}\n ]\n}}\n'.encode()


def parse(data: bytes, url: str, kind: str) -> dict[str, Any]:
    """Fields of the manifest in ``data``; ManifestError for anything but a complete one of ``kind``.

    ``url`` is that of the store. Returns fingerprint, inputs, meta and parts.
    """
    reader = _Reader(f"{url}/{layout.MANIFEST}", kind)
    body = reader.json(data)
    version = body.get("schema_version")
    if type(version) is not int or version < 1:
        raise reader.error(f"its schema_version is {_shorten(version)}, expected {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{reader.where} has schema version {version}, this gkd_dist reads up to {SCHEMA_VERSION}; upgrade gkd_dist"
        )
    reader.fields(body, _FIELDS, "the manifest")
    listed = reader.list(body.pop("parts"), "parts")
    if _digest(body, map(_sorted, listed)) != body["sha256"]:
        raise reader.error("its content does not match its sha256: it was altered")
    found = reader.text(body["kind"], "kind")
    if found != kind:
        raise ManifestError(
            f"{reader.where} is of a {found} store, expected a {kind} store; check the URL of the store"
        )
    parts = tuple(reader.part(part, f"parts[{i}]") for i, part in enumerate(_consume(listed)))
    check_complete(parts, reader.count(body["num_parts"], "num_parts", largest=10**8), url, kind)
    return {
        "fingerprint": reader.text(body["fingerprint"], "fingerprint"),
        "inputs": reader.mapping(body["inputs"], "inputs", reader.text),
        "meta": reader.mapping(body["meta"], "meta"),
        "parts": parts,
    }


def entry_from_json(value: Any, where: str, kind: str) -> ObjectEntry:
    """One object's entry from its JSON (``dataclasses.asdict``), checked like those of a manifest of ``kind``."""
    return _Reader(where, kind).part(value, "entry")


def _consume(items: list[Any]) -> Iterator[Any]:
    """The items in order; each is given up when the next one is taken."""
    items.reverse()
    while items:
        yield items.pop()


def _part_fields(part: ObjectEntry) -> dict[str, Any]:
    fields = {name: getattr(part, name) for name in _PART_FIELDS}
    return fields | {"tensors": [{name: getattr(t, name) for name in _TENSOR_FIELDS} for t in part.tensors]}


def _sorted(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(body: dict[str, Any], part_lines: Iterable[str]) -> str:
    """sha256 of ``body`` with these parts; built in pieces that spell ``_sorted(whole)``."""
    fields = {name: _sorted(value) for name, value in body.items() if name not in ("sha256", "parts")}
    digest = hashlib.sha256()
    for index, name in enumerate(sorted([*fields, "parts"])):
        digest.update(f"{', ' if index else '{'}{_sorted(name)}: {fields.get(name, '[')}".encode())
        if name == "parts":
            for number, line in enumerate(part_lines):
                digest.update((f", {line}" if number else line).encode())
            digest.update(b"]")
    digest.update(b"}")
    return digest.hexdigest()


class _Reader:
    """Checks of JSON values; every failure is a ManifestError that names the place."""

    def __init__(self, where: str, kind: str) -> None:
        self.where = where
        self._kind = kind

    def error(self, what: str) -> ManifestError:
        return ManifestError(f"{self.where} is no usable manifest: {what}; {rerun(self._kind)} again")

    def json(self, data: bytes) -> dict[str, Any]:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.error(f"it is not JSON ({error})") from error
        if not isinstance(body, dict):
            raise self.error(f"it is a JSON {type(body).__name__}, expected an object")
        return body

    def fields(self, value: Any, fields: tuple[str, ...], place: str) -> None:
        if not isinstance(value, dict):
            raise self.error(f"{place} is {_shorten(value)}, expected an object")
        if value.keys() != set(fields):
            wrong = sorted(value.keys() ^ set(fields))
            raise self.error(f"{place} lacks or does not know {', '.join(map(repr, wrong))}")

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{place} is {_shorten(value)}, expected text")
        return value

    def count(self, value: Any, place: str, largest: int = (1 << 63) - 1) -> int:
        if type(value) is not int or not 0 <= value <= largest:
            raise self.error(f"{place} is {_shorten(value)}, expected an integer from 0 to {largest}")
        return value

    def list(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(f"{place} is {_shorten(value)}, expected a list")
        return value

    def mapping(self, value: Any, place: str, check: Callable[[Any, str], Any] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{place} is {_shorten(value)}, expected an object")
        return {name: check(item, f"{place}.{name}") if check else item for name, item in value.items()}

    def part(self, value: Any, place: str) -> ObjectEntry:
        self.fields(value, _PART_FIELDS, place)
        key, sha256 = self.text(value["key"], f"{place}.key"), self.text(value["sha256"], f"{place}.sha256")
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise self.error(f"{place}.key is {_shorten(key)}, expected a key inside the store")
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise self.error(f"{place}.sha256 is {_shorten(sha256)}, expected 64 hexadecimal digits")
        size = self.count(value["num_bytes"], f"{place}.num_bytes")
        tensors = self.list(value["tensors"], f"{place}.tensors")
        return ObjectEntry(
            key=key,
            num_bytes=size,
            crc32=self.count(value["crc32"], f"{place}.crc32", 0xFFFFFFFF),
            sha256=sha256,
            tensors=tuple(self.tensor(t, f"{place}.tensors[{i}]", size) for i, t in enumerate(tensors)),
            counts=self.mapping(value["counts"], f"{place}.counts", self.count),
            meta=self.mapping(value["meta"], f"{place}.meta"),
        )

    def tensor(self, value: Any, place: str, size: int) -> TensorEntry:
        self.fields(value, _TENSOR_FIELDS, place)
        name, dtype = self.text(value["name"], f"{place}.name"), codec.dtype_from_name(value["dtype"])
        if dtype is None:
            raise self.error(f"{place}.dtype is {_shorten(value['dtype'])}, which a shard cannot hold")
        if not codec.is_sizes(value["shape"]):
            raise self.error(f"{place}.shape is {_shorten(value['shape'])}, expected a list of sizes")
        start, stop = self.count(value["start"], f"{place}.start"), self.count(value["stop"], f"{place}.stop")
        if stop > size or stop - start != codec.num_bytes(dtype, value["shape"]):
            raise self.error(f"{place} has bytes {start} to {stop}, which do not fit its shape and the object")
        crc = self.count(value["crc32"], f"{place}.crc32", 0xFFFFFFFF)
        # interned: thousands of parts repeat the same few names
        return TensorEntry(sys.intern(name), codec.dtype_name(dtype), tuple(value["shape"]), start, stop, crc)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
