"""The list of objects that counts: what a store holds, and how each byte of it is checked.

A manifest is written after everything it names; an object that no manifest names does not exist.
Its JSON holds its own sha256, so that an altered count or digest is noticed too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import ManifestError, ObjectNotFoundError
from gkd_dist.fingerprints import FORMAT
from gkd_dist.shards import manifest_json
from gkd_dist.shards.entries import ObjectEntry, TensorEntry, check_complete, rerun
from gkd_dist.shards.manifest_upgrade import SCHEMA_VERSION
from gkd_dist.storage import Storage

__all__ = ["SCHEMA_VERSION", "Manifest", "ObjectEntry", "TensorEntry"]


@dataclass(frozen=True)
class Manifest:
    """All objects of a store.

    ``kind`` is ``graph`` or ``knowledge``; ``fingerprint`` identifies content and settings;
    ``inputs`` are fingerprints of what it was made from; ``meta`` holds JSON values; ``parts[i]``
    is the object of part i. ``format_version`` is that of the kind's content as it is stored,
    None for a manifest that is not stored yet.
    """

    kind: str
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    parts: tuple[ObjectEntry, ...] = ()
    format_version: int | None = field(default=None, compare=False)

    def save(self, storage: Storage) -> None:
        """Publishes the store: call it after every object is written.

        ManifestError where parts are missing or a value is not JSON.
        """
        check_complete(self.parts, len(self.parts), storage.url, self.kind)
        document = manifest_json.Document(
            self.kind, self.fingerprint, self.inputs, self.meta, self.parts, self.format_version
        )
        storage.write(layout.MANIFEST, manifest_json.dump(document, storage.write))

    @classmethod
    def load(cls, storage: Storage, kind: str, fingerprint: str | None = None) -> Manifest:
        """Reads and checks the manifest of a store.

        ManifestError where there is none, and for one that is altered, of a newer schema, of
        another kind, incomplete, or has not the given ``fingerprint``.
        """
        data = _read(storage, kind)
        found = manifest_json.parse(data, storage.url, kind, lambda key: _read_page(storage, key, kind))
        parts = tuple(found.parts)
        manifest = cls(kind, found.fingerprint, dict(found.inputs), dict(found.meta), parts, found.format_version)
        if fingerprint is not None:
            manifest.require_fingerprint(fingerprint, storage.url)
        return manifest

    def require_fingerprint(self, fingerprint: str, where: str) -> None:
        """ManifestError unless the store has that fingerprint; ``where`` is its URL."""
        if self.fingerprint == fingerprint:
            return
        today = FORMAT.get(self.kind, 1)
        older = self.format_version is not None and self.format_version < today
        why = (
            f"it has format {self.format_version}, today's is {today}"
            if older
            else "it was made with other settings or inputs"
        )
        raise ManifestError(
            f"the {self.kind} store at {where} has fingerprint {self.fingerprint[:8]}, expected "
            f"{fingerprint[:8]}: {why}; {rerun(self.kind)} again"
        )

    def require_parts(self, num_parts: int, where: str) -> None:
        """ManifestError unless the parts are 0 to ``num_parts`` - 1; ``where`` names the store."""
        check_complete(self.parts, num_parts, where, self.kind)

    def require_input(self, name: str, fingerprint: str, where: str) -> None:
        """ManifestError unless the store was made from the input with that fingerprint."""
        found = self.inputs.get(name)
        if found != fingerprint:
            raise ManifestError(
                f"the {self.kind} store at {where} was made from {name} {(found or 'nothing')[:8]}, expected "
                f"{fingerprint[:8]}; {rerun(self.kind)} again"
            )


def page_keys(storage: Storage, kind: str) -> set[str]:
    """Keys of the objects that belong to the stored manifest itself: its pages, if it has any."""
    return {page.key for page in manifest_json.pages(_read(storage, kind), storage.url, kind)}


def stored_kind(storage: Storage) -> str:
    """Kind of the store at ``storage``; ManifestError where there is none."""
    return manifest_json.kind_of(_read(storage, "graph or knowledge"), storage.url)


def _read(storage: Storage, kind: str) -> bytes:
    try:
        return storage.read(layout.MANIFEST)
    except ObjectNotFoundError as error:
        raise ManifestError(f"there is no {kind} store at {storage.url}; {rerun(kind)} first") from error


def _read_page(storage: Storage, key: str, kind: str) -> bytes:
    try:
        return storage.read(key)
    except ObjectNotFoundError as error:
        raise ManifestError(
            f"{storage.describe(key)} is missing, the manifest lists parts in it; {rerun(kind)} again"
        ) from error
