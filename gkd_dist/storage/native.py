"""Range reads of S3 objects through obstore, where it is installed: several times as fast as in Python.

Only reads, and only where obstore finds the endpoint and the credentials in the places where s3fs
does: the environment, and ``endpoint_url``. Whatever goes wrong here is no error: the caller reads the
same range through s3fs, whose answer counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

_log = logging.getLogger(__name__)
_MOST_FAILURES = 3  # in a row, then this process asks s3fs alone


class NativeReader:
    """Reads of one set of options; safe from several threads, and of no use in a forked child."""

    def __init__(self, settings: dict[str, Any], timeout_s: float) -> None:
        self._settings, self._timeout_s = settings, timeout_s
        self._stores: dict[str, Any] = {}
        self._failures = 0
        self._pid = os.getpid()

    def read(self, path: str, start: int, end: int) -> Any | None:
        """Bytes ``[start, end)`` of ``bucket/key`` as a buffer, fewer at the end of the object; None: ask s3fs."""
        if self._failures >= _MOST_FAILURES or os.getpid() != self._pid:
            return None
        import obstore

        bucket, _, key = path.partition("/")
        try:
            found = obstore.get_range(self._store(bucket), key, start=start, end=end)
        except Exception as error:
            self._failures += 1
            _log.debug("obstore: %s: %s", path, error)
            return None
        self._failures = 0
        return found

    def _store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        if bucket not in self._stores:
            limit = timedelta(seconds=self._timeout_s)
            self._stores[bucket] = S3Store(
                bucket,
                **self._settings,
                client_options={"allow_http": True, "timeout": limit, "connect_timeout": limit},
                retry_config={"max_retries": 0, "retry_timeout": limit},
            )
        return self._stores[bucket]


def open_reader(protocol: str, options: Mapping[str, Any], timeout_s: float) -> NativeReader | None:
    """A reader, or None where obstore is not installed or could not know what s3fs knows."""
    settings = _settings(options, os.environ) if protocol in ("s3", "s3a") else None
    if settings is None:
        return None
    try:
        import obstore  # noqa: F401
    except ImportError:
        return None
    return NativeReader(settings, timeout_s)


def _settings(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Where the bucket is and who asks; None where that comes from elsewhere (profiles, roles, other options)."""
    if options.keys() - {"endpoint_url"} or environment.get("AWS_PROFILE"):
        return None
    named = (options.get("endpoint_url"), environment.get("AWS_ENDPOINT_URL_S3"), environment.get("AWS_ENDPOINT_URL"))
    settings = {
        "endpoint": next(filter(None, named), None),
        "region": environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
        "access_key_id": environment.get("AWS_ACCESS_KEY_ID"),
        "secret_access_key": environment.get("AWS_SECRET_ACCESS_KEY"),
        "session_token": environment.get("AWS_SESSION_TOKEN"),
    }
    if not (settings["access_key_id"] and settings["secret_access_key"]):
        return None
    if not (settings["endpoint"] or settings["region"]):  # s3fs finds the region of a bucket by itself
        return None
    settings["region"] = settings["region"] or "us-east-1"
    return {name: value for name, value in settings.items() if value}
