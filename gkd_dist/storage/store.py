"""Where everything is stored: one small interface over files and object stores.

A `Storage` is a root URL and keys below it. Errors are `StorageError` and `ObjectNotFoundError`
with the full URL of the key; what may help is tried again (`errors`). ``file`` URLs are
served by `local`, all others by `remote`.

A `Storage` is cheap and picklable: a copy in another process opens its own connection. Reads are
safe from several threads. Nothing here relies on rename, exclusive creation or listing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from gkd_dist.config import StorageConfig
from gkd_dist.errors import ConfigError, JsonError, StorageError
from gkd_dist.storage.clients import credentials, secrets_in
from gkd_dist.storage.errors import Patience, UploadLostError, attempt, reason
from gkd_dist.storage.local import LocalBackend
from gkd_dist.storage.uploads import Upload, send

T = TypeVar("T")
Data = bytes | bytearray | memoryview
Pieces = Sequence[bytes | memoryview]
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Backend(Protocol):
    """What serves one protocol; paths are absolute, errors foreign and not yet translated."""

    batch_bytes: int
    takes_pieces: bool  # whether `write` takes data in pieces, too

    def read(self, path: str, start: int, stop: int | None) -> bytes: ...
    def read_into(self, path: str, view: memoryview, start: int) -> int: ...
    def write(self, path: str, data: Any) -> None: ...
    def begin_upload(self, path: str, num_bytes: int, part_bytes: int) -> Upload | None: ...
    def size(self, path: str) -> int: ...
    def is_file(self, path: str) -> bool: ...
    def delete(self, paths: list[str]) -> None: ...
    def list(self, root: str, leftovers: bool = False) -> list[str]: ...
    def tidy(self, root: str) -> None: ...


class Storage:
    """Objects under a root URL, by keys like ``graph/manifest.json``.

    Made by `Storage.open`. ``url`` is the root without a final slash; ``protocol`` is ``file``,
    ``s3``, ``memory`` or another one of `fsspec`.
    """

    def __init__(self, protocol: str, root: str, config: StorageConfig, backend: Backend | None = None) -> None:
        self.protocol = protocol
        self.config = config
        self.root = root
        self._backend = backend or _make_backend(protocol, config)

    @classmethod
    def open(cls, url: str, config: StorageConfig | None = None) -> Storage:
        """A store at ``url``; a plain path is a local folder. Touches neither disk nor network.

        Raises ConfigError for a URL that cannot name a store.
        """
        protocol, root = parse_url(url)
        return cls(protocol, root, config or StorageConfig())

    def __getstate__(self) -> tuple[str, str, StorageConfig]:
        return self.protocol, self.root, self.config

    def __setstate__(self, state: tuple[str, str, StorageConfig]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def url(self) -> str:
        """URL of the root."""
        return f"{self.protocol}://{self.root}"

    def child(self, prefix: str) -> Storage:
        """The store below ``prefix``, over the same connection."""
        return Storage(self.protocol, self._path(prefix), self.config, self._backend)

    # --- reading ---

    def read(self, key: str) -> bytes:
        """The whole object."""
        path = self._path(key)
        return self._try("read", key, lambda: self._backend.read(path, 0, None))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of the object; fewer where it is shorter, like a slice."""
        if not 0 <= start <= stop:
            raise ValueError(f"a byte range needs 0 <= start <= stop (got {start}, {stop})")
        path = self._path(key)
        return self._try("read", key, lambda: self._backend.read(path, start, stop))

    def read_into(self, key: str, buffer: bytearray | memoryview, start: int = 0) -> int:
        """Fills ``buffer`` from offset ``start`` of the object without a second copy in memory.

        Returns the number of bytes read: fewer than ``len(buffer)`` where the object ends.
        """
        path, view, step = self._path(key), memoryview(buffer), self._backend.batch_bytes
        done = 0
        while done < len(view):
            target, offset = view[done : done + step], start + done
            count = self._try("read", key, lambda t=target, o=offset: self._backend.read_into(path, t, o))  # type: ignore[misc]
            done += count
            if count < len(target):
                break
        return done

    def doubt(self, key: str) -> None:
        """What was read of ``key`` is not what it has to be; for stores that keep copies, which have none here."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object; a folder is none."""
        path = self._path(key)
        return self._try("look up", key, lambda: self._backend.is_file(path))

    def size(self, key: str) -> int:
        """Bytes of the object."""
        path = self._path(key)
        return self._try("look up", key, lambda: self._backend.size(path))

    def list(self, prefix: str = "", *, leftovers: bool = False) -> list[str]:
        """Keys below the folder ``prefix``, at any depth, sorted; for people and cleaning only.

        ``leftovers`` lists instead the temporary files of writers that were killed.
        """
        root = self._path(prefix)
        names = self._try("list", prefix, lambda: self._backend.list(root, leftovers))
        return [f"{prefix.rstrip('/')}/{name}" if prefix else name for name in names]

    # --- writing ---

    def write(self, key: str, data: Data | Pieces) -> None:
        """Stores the object, replacing the one of that key; readers see the old or the new one.

        ``data`` in pieces goes into a file as it is; other stores are sent a copy in one piece.
        """
        path = self._path(key)
        if path == self.root:
            raise ValueError("an object needs a key (got an empty one)")
        if not isinstance(data, bytes | bytearray | memoryview):
            if self._backend.takes_pieces:
                self._try("write", key, lambda: self._backend.write(path, data))
                return
            data = b"".join(data)
        view = memoryview(data).cast("B")
        if len(view) > self.config.upload_part_bytes and self._upload(path, key, view):
            return
        self._try("write", key, lambda: self._backend.write(path, data))

    def _upload(self, path: str, key: str, view: memoryview) -> bool:
        """Writes an object in parts; False where the store has no parts."""

        def tries(request: Callable[[], T]) -> T:
            return self._try("write", key, request)

        for _ in range(2):
            upload = tries(lambda: self._backend.begin_upload(path, len(view), self.config.upload_part_bytes))
            if upload is None:
                return False
            try:
                send(upload, view, self.config.uploads_at_once, tries)
                return True
            except UploadLostError as error:
                lost = error
        raise StorageError(
            f"cannot write {self.describe(key)}: the store forgot the upload twice ({reason(lost)}); "
            "check that nothing else aborts uploads to the bucket, and run again"
        )

    def delete(self, key: str) -> None:
        """Removes the object; no error where there is none."""
        path = self._path(key)
        self._try("delete", key, lambda: self._backend.delete([path]))

    def delete_tree(self, prefix: str) -> None:
        """Removes all objects below the folder ``prefix``."""
        root = self._path(prefix)

        def remove() -> None:
            for leftovers in (False, True):
                self._backend.delete([f"{root}/{name}" for name in self._backend.list(root, leftovers)])
            self._backend.tidy(root)

        self._try("delete", prefix, remove)

    # --- JSON ---

    def read_json(self, key: str) -> Any:
        """Value of a JSON object; JsonError where it is not JSON."""
        data = self.read(key)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise JsonError(
                f"{self.describe(key)} is not JSON ({error}); it was altered or cut short: "
                "run the stage that writes it again"
            ) from error

    def write_json(self, key: str, value: Any) -> None:
        """Stores ``value`` as JSON: UTF-8, sorted keys, one value per line."""
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        self.write(key, (text + "\n").encode())

    # --- whole store ---

    def local_path(self, key: str = "") -> Path | None:
        """Path of a key where the store is a local folder, else None."""
        return Path(self._path(key)) if self.protocol == "file" else None

    def check_writable(self) -> None:
        """Writes, reads and deletes a small object; StorageError says what keeps that from working.

        Patient for two attempts only, so that a wrong address is known before a run begins.
        """
        quick = self.config.model_copy(update={"retries": min(1, self.config.retries)})
        probe = Storage(self.protocol, self.root, quick, self._backend)
        key, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        probe.write(key, data)
        found = probe.read(key)
        probe.delete(key)
        if found != data:
            raise StorageError(
                f"{self.url} returned {len(found)} other bytes than the {len(data)} just written; "
                "use a store that reads what was written"
            )

    def describe(self, key: str) -> str:
        """Full URL of a key, for messages."""
        return f"{self.url}/{key}" if key else self.url

    def _try(self, doing: str, key: str, action: Callable[[], T]) -> T:
        patience = Patience(self.config.retries, self.config.timeout_s)
        return attempt(action, doing, self.describe(key), patience)

    def _path(self, key: str) -> str:
        """Absolute path of ``key``, which may not leave the root."""
        if not key:
            return self.root
        segments = key.rstrip("/").split("/")
        if any(segment in ("", ".", "..") for segment in segments) or any(c in key for c in "\\\0"):
            raise StorageError(f"{key!r} is no key of {self.url}; use names joined by single slashes, without `..`")
        return f"{self.root}/{'/'.join(segments)}" if self.root != "/" else f"/{'/'.join(segments)}"


def parse_url(url: str) -> tuple[str, str]:
    """Protocol and root path of a URL: ``s3://b/p/`` gives ``s3`` and ``b/p``; ConfigError if it is none."""
    if not url.strip() or "\0" in url or "::" in url:
        raise ConfigError(f"{url!r} names no store; use a folder, file:///…, s3://bucket/path or another fsspec URL")
    match = _URL.fullmatch(url)
    if match is None:
        return "file", os.path.abspath(os.path.expanduser(url))
    protocol, rest = match.group(1).lower(), match.group(2)
    if protocol in ("file", "local"):
        if not rest.startswith("/"):
            raise ConfigError(f"{url} has no absolute path; use file:///absolute/path or a plain relative path")
        return "file", os.path.abspath(unquote(rest))
    root = rest.strip("/")
    if not root and protocol != "memory":
        raise ConfigError(f"{url} names no bucket; use {protocol}://bucket/path")
    if any(segment in ("", ".", "..") for segment in root.split("/")) and root:
        raise ConfigError(f"{url} has an empty or dotted part; use names joined by single slashes")
    if any(character in root for character in "*?[]\\"):
        raise ConfigError(f"{url} contains one of * ? [ ] \\, which object stores treat as patterns; use other names")
    return protocol, root


def _make_backend(protocol: str, config: StorageConfig) -> Backend:
    if protocol == "file":
        return LocalBackend()
    options = config.options.get(protocol, {})
    if secret := secrets_in(protocol, options):
        raise ConfigError(
            f"storage.options.{protocol} holds credentials ({', '.join(secret)}), but the config is stored with "
            f"the run; leave that to {credentials(protocol)}"
        )
    from gkd_dist.storage.remote import RemoteBackend  # only here: a local run needs no fsspec

    return RemoteBackend(protocol, options, config.timeout_s, config.native_reads)
