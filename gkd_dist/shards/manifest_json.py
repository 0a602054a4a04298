"""A manifest as JSON and back, every field checked.

The text has one line per part, so that it can be read, searched and compared by line. ``sha256``
is that of the same JSON without this field, as ``json.dumps(body, sort_keys=True)`` writes it.
Above `PARTS_PER_PAGE` parts these lines are in *pages*, objects named by their content, which the
manifest lists with their digests. Parts are handled one by one, and pages a few at a time: with
thousands of parts the driver's memory would show a copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import ManifestError, NewerSchemaError
from gkd_dist.fingerprints import FORMAT
from gkd_dist.shards.entries import ObjectEntry, check_complete
from gkd_dist.shards.manifest_fields import PAGE_FIELDS, PART_FIELDS, TENSOR_FIELDS, FieldReader, PageEntry, shorten
from gkd_dist.shards.manifest_upgrade import FIELDS, SCHEMA_VERSION, upgrade

PARTS_PER_PAGE = 1000
_PAGES_AT_A_TIME = 4
_LARGEST_COUNT = 10**8
ReadPage = Callable[[str], bytes]


@dataclass(frozen=True)
class Document:
    """What a manifest says; see `Manifest` for the fields."""

    kind: str
    fingerprint: str
    inputs: Mapping[str, str]
    meta: Mapping[str, Any]
    parts: Sequence[ObjectEntry]
    format_version: int | None = None


def dump(document: Document, write_page: Callable[[str, bytes], None], parts_per_page: int = PARTS_PER_PAGE) -> bytes:
    """A manifest as UTF-8 JSON; its pages, if it has any, are given to ``write_page`` (key, bytes) first.

    ManifestError where a value is not plain JSON.
    """
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": document.kind,
        "format_version": document.format_version or FORMAT.get(document.kind, 1),
        "fingerprint": document.fingerprint,
        "inputs": dict(document.inputs),
        "meta": dict(document.meta),
        "num_parts": len(document.parts),
    }
    try:
        # read back, as a reader will see it: keys are text, tuples are lists
        body = json.loads(json.dumps(body, allow_nan=False))
        if len(document.parts) <= parts_per_page:
            pages, lines = [], _lines(document.parts)
        else:
            pages, lines = _write_pages(document.parts, write_page, parts_per_page), []
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"the manifest of a {document.kind} store holds a value that is not JSON ({error}); "
            "keep to text, integers, finite floats, lists and dicts"
        ) from error
    body["pages"] = [{name: getattr(page, name) for name in PAGE_FIELDS} for page in pages]
    body["sha256"] = _digest(body, lines)
    return _with_parts(body, lines)


def _write_pages(
    parts: Sequence[ObjectEntry], write_page: Callable[[str, bytes], None], parts_per_page: int
) -> list[PageEntry]:
    pages = []
    for number, first in enumerate(range(0, len(parts), parts_per_page)):
        listed = parts[first : first + parts_per_page]
        data = _with_parts({"page": number}, _lines(listed))
        digest = hashlib.sha256(data).hexdigest()
        pages.append(PageEntry(layout.manifest_page(number, digest), len(data), digest, len(listed)))
        write_page(pages[-1].key, data)
    return pages


def _lines(parts: Sequence[ObjectEntry]) -> list[str]:
    return [_sorted(json.loads(json.dumps(_part_fields(part), allow_nan=False))) for part in parts]


def _with_parts(body: dict[str, Any], lines: list[str]) -> bytes:
    head = json.dumps(body, indent=1, sort_keys=True)
    listed = ",\n".join(f"  {line}" for line in lines)
    return f'{head[:-2]},\n "parts": [\n{listed}\n ]\n}}\n'.encode()


def parse(data: bytes, url: str, kind: str, read_page: ReadPage) -> Document:
    """The manifest in ``data``; ManifestError for anything but a complete one of ``kind``.

    ``url`` is that of the store, ``read_page`` gives the bytes of a page.
    """
    reader = FieldReader(f"{url}/{layout.MANIFEST}", kind)
    body = _checked_body(reader, data)
    found = reader.text(body["kind"], "kind")
    if found != kind:
        raise ManifestError(
            f"{reader.where} is of a {found} store, expected a {kind} store; check the URL of the store"
        )
    version = reader.count(body["format_version"], "format_version")
    if version > FORMAT.get(kind, 1):
        raise NewerSchemaError(
            f"the {kind} store at {url} has format {version}, this gkd_dist reads up to {FORMAT.get(kind, 1)}; "
            "upgrade gkd_dist"
        )
    parts = tuple(_parts(reader, body, url, kind, read_page))
    check_complete(parts, reader.count(body["num_parts"], "num_parts", largest=_LARGEST_COUNT), url, kind)
    return Document(
        kind,
        reader.text(body["fingerprint"], "fingerprint"),
        reader.mapping(body["inputs"], "inputs", reader.text),
        reader.mapping(body["meta"], "meta"),
        parts,
        version,
    )


def pages(data: bytes, url: str, kind: str) -> list[PageEntry]:
    """The pages that the manifest in ``data`` lists; ManifestError as in `parse`."""
    reader = FieldReader(f"{url}/{layout.MANIFEST}", kind)
    return _pages(reader, _checked_body(reader, data))


def kind_of(data: bytes, url: str) -> str:
    """The kind of store that the manifest in ``data`` is of; ManifestError for none."""
    reader = FieldReader(f"{url}/{layout.MANIFEST}", "")
    return reader.text(reader.json(data).get("kind"), "kind")


def entry_from_json(value: Any, where: str, kind: str) -> ObjectEntry:
    """One object's entry from its JSON (``dataclasses.asdict``), checked like those of a manifest of ``kind``."""
    return FieldReader(where, kind).part(value, "entry")


def _checked_body(reader: FieldReader, data: bytes) -> dict[str, Any]:
    """The JSON of a manifest with today's fields, after a check of version, fields and digest."""
    body = reader.json(data)
    version = body.get("schema_version")
    if type(version) is not int or version < 1:
        raise reader.error(f"its schema_version is {shorten(version)}, expected {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{reader.where} has schema version {version}, this gkd_dist reads up to {SCHEMA_VERSION}; upgrade gkd_dist"
        )
    reader.fields(body, FIELDS[version], "the manifest")
    if _digest(body, map(_sorted, reader.list(body["parts"], "parts"))) != body["sha256"]:
        raise reader.error("its content does not match its sha256: it was altered")
    return upgrade(body)


def _pages(reader: FieldReader, body: dict[str, Any]) -> list[PageEntry]:
    listed = reader.list(body["pages"], "pages")
    return [reader.page(page, f"pages[{i}]") for i, page in enumerate(listed)]


def _parts(
    reader: FieldReader, body: dict[str, Any], url: str, kind: str, read_page: ReadPage
) -> Iterator[ObjectEntry]:
    entries, listed = _pages(reader, body), body.pop("parts")
    if entries and listed:
        raise reader.error("it has both parts and pages")
    yield from (reader.part(part, f"parts[{i}]") for i, part in enumerate(_consume(listed)))
    with ThreadPoolExecutor(_PAGES_AT_A_TIME, "pages") as readers:
        for first in range(0, len(entries), _PAGES_AT_A_TIME):
            some = entries[first : first + _PAGES_AT_A_TIME]
            texts = list(readers.map(lambda page: read_page(page.key), some))
            for number, page in enumerate(some, first):
                yield from _page_parts(page, number, texts.pop(0), url, kind)


def _page_parts(page: PageEntry, number: int, data: bytes, url: str, kind: str) -> Iterator[ObjectEntry]:
    reader = FieldReader(f"{url}/{page.key}", kind)
    if len(data) != page.num_bytes or hashlib.sha256(data).hexdigest() != page.sha256:
        raise reader.error(f"its {len(data)} bytes are not the {page.num_bytes} of the manifest: it was altered")
    body = reader.json(data)
    reader.fields(body, ("page", "parts"), "the page")
    listed = reader.list(body["parts"], "parts")
    if reader.count(body["page"], "page") != number or len(listed) != page.num_parts:
        raise reader.error(
            f"it is page {body['page']} with {len(listed)} parts, expected {number} with {page.num_parts}"
        )
    yield from (reader.part(part, f"parts[{i}]") for i, part in enumerate(_consume(listed)))


def _consume(items: list[Any]) -> Iterator[Any]:
    """The items in order; each is given up when the next one is taken."""
    items.reverse()
    while items:
        yield items.pop()


def _part_fields(part: ObjectEntry) -> dict[str, Any]:
    fields = {name: getattr(part, name) for name in PART_FIELDS}
    return fields | {"tensors": [{name: getattr(t, name) for name in TENSOR_FIELDS} for t in part.tensors]}


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
