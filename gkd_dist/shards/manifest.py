"""The list of objects that counts: what a store holds, and how each byte of it is checked.

A manifest is written after everything it names; an object that no manifest names does not exist.
Its JSON holds its own sha256, so that an altered count or digest is noticed too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import ManifestError, ObjectNotFoundError
from gkd_dist.shards import manifest_json
from gkd_dist.shards.entries import ObjectEntry, TensorEntry, check_complete, rerun
from gkd_dist.shards.manifest_json import SCHEMA_VERSION
from gkd_dist.storage import Storage

__all__ = ["SCHEMA_VERSION", "Manifest", "ObjectEntry", "TensorEntry"]


@dataclass(frozen=True)
class Manifest:
    """All objects of a store.

    ``kind`` is ``graph`` or ``knowledge``; ``fingerprint`` identifies content and settings;
    ``inputs`` are fingerprints of what it was made from; ``meta`` holds JSON values; ``parts[i]``
    is the object of part i.
    """

    kind: str
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    parts: tuple[ObjectEntry, ...] = ()

    def save(self, storage: Storage) -> None:
        """Publishes the store: call it after every object is written.

        ManifestError where parts are missing or a value is not JSON.
        """
        check_complete(self.parts, len(self.parts), storage.url, self.kind)
        text = manifest_json.dump(self.kind, self.fingerprint, self.inputs, self.meta, self.parts)
        storage.write(layout.MANIFEST, text)

    @classmethod
    def load(cls, storage: Storage, kind: str, fingerprint: str | None = None) -> Manifest:
        """Reads and checks the manifest of a store.

        ManifestError where there is none, and for one that is altered, of a newer schema, of
        another kind, incomplete, or has not the given ``fingerprint``.
        """
        try:
            data = storage.read(layout.MANIFEST)
        except ObjectNotFoundError as error:
            raise ManifestError(f"there is no {kind} store at {storage.url}; {rerun(kind)} first") from error
        manifest = cls(kind, **manifest_json.parse(data, storage.url, kind))
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise ManifestError(
                f"the {kind} store at {storage.url} has fingerprint {manifest.fingerprint[:8]}, expected "
                f"{fingerprint[:8]}: it was made with other settings or inputs; {rerun(kind)} again"
            )
        return manifest

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
