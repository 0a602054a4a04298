"""Values of a manifest's JSON, each checked: a failure is one sentence that names the place."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gkd_dist.errors import ManifestError
from gkd_dist.shards import codec
from gkd_dist.shards.entries import ObjectEntry, TensorEntry, rerun

PART_FIELDS = ("key", "num_bytes", "crc32", "sha256", "counts", "meta", "tensors")
TENSOR_FIELDS = ("name", "dtype", "shape", "start", "stop", "crc32")
PAGE_FIELDS = ("key", "num_bytes", "sha256", "num_parts")
_PAGE_KEY = re.compile(r"manifest-\d{4,}-[0-9a-f]{8}\.json")


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A page of a manifest: its key, size and digest, and how many parts it lists."""

    key: str
    num_bytes: int
    sha256: str
    num_parts: int


class FieldReader:
    """Checks of JSON values; every failure is a ManifestError that names the place."""

    def __init__(self, where: str, kind: str) -> None:
        self.where = where
        self._kind = kind

    def error(self, what: str) -> ManifestError:
        return ManifestError(f"{self.where} is no usable manifest: {what}; {rerun(self._kind)} again")

    def json(self, data: bytes) -> dict[str, Any]:
        try:
            body = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise self.error(f"it is not JSON ({error})") from error
        if not isinstance(body, dict):
            raise self.error(f"it is a JSON {type(body).__name__}, expected an object")
        return body

    def fields(self, value: Any, fields: tuple[str, ...], place: str) -> None:
        if not isinstance(value, dict):
            raise self.error(f"{place} is {shorten(value)}, expected an object")
        if value.keys() != set(fields):
            wrong = sorted(value.keys() ^ set(fields))
            raise self.error(f"{place} lacks or does not know {', '.join(map(repr, wrong))}")

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{place} is {shorten(value)}, expected text")
        return value

    def sha256(self, value: Any, place: str) -> str:
        digest = self.text(value, place)
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise self.error(f"{place} is {shorten(digest)}, expected 64 hexadecimal digits")
        return digest

    def count(self, value: Any, place: str, largest: int = (1 << 63) - 1) -> int:
        if type(value) is not int or not 0 <= value <= largest:
            raise self.error(f"{place} is {shorten(value)}, expected an integer from 0 to {largest}")
        return value

    def list(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(f"{place} is {shorten(value)}, expected a list")
        return value

    def mapping(self, value: Any, place: str, check: Callable[[Any, str], Any] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{place} is {shorten(value)}, expected an object")
        return {name: check(item, f"{place}.{name}") if check else item for name, item in value.items()}

    def part(self, value: Any, place: str) -> ObjectEntry:
        self.fields(value, PART_FIELDS, place)
        key, sha256 = self.text(value["key"], f"{place}.key"), self.sha256(value["sha256"], f"{place}.sha256")
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise self.error(f"{place}.key is {shorten(key)}, expected a key inside the store")
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

    def page(self, value: Any, place: str) -> PageEntry:
        self.fields(value, PAGE_FIELDS, place)
        key, sha256 = self.text(value["key"], f"{place}.key"), self.sha256(value["sha256"], f"{place}.sha256")
        if not _PAGE_KEY.fullmatch(key):
            raise self.error(f"{place}.key is {shorten(key)}, expected a name like manifest-0000-0123abcd.json")
        size = self.count(value["num_bytes"], f"{place}.num_bytes")
        return PageEntry(key, size, sha256, self.count(value["num_parts"], f"{place}.num_parts"))

    def tensor(self, value: Any, place: str, size: int) -> TensorEntry:
        self.fields(value, TENSOR_FIELDS, place)
        name, dtype = self.text(value["name"], f"{place}.name"), codec.dtype_from_name(value["dtype"])
        if dtype is None:
            raise self.error(f"{place}.dtype is {shorten(value['dtype'])}, which a shard cannot hold")
        if not codec.is_sizes(value["shape"]):
            raise self.error(f"{place}.shape is {shorten(value['shape'])}, expected a list of sizes")
        start, stop = self.count(value["start"], f"{place}.start"), self.count(value["stop"], f"{place}.stop")
        if stop > size or stop - start != codec.num_bytes(dtype, value["shape"]):
            raise self.error(f"{place} has bytes {start} to {stop}, which do not fit its shape and the object")
        crc = self.count(value["crc32"], f"{place}.crc32", 0xFFFFFFFF)
        # interned: thousands of parts repeat the same few names
        return TensorEntry(sys.intern(name), codec.dtype_name(dtype), tuple(value["shape"]), start, stop, crc)


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
