"""What each client library of an object store is told, so that all of them behave alike.

One request is one attempt: `errors.attempt` repeats requests, and it alone. Time-outs are those of
the config. Nothing here imports a client library.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

# protocol -> the extra of this project that installs its client
FAMILIES = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "azure"),
}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_SECRET_OPTIONS = frozenset(
    {
        "account_key",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "client_secret",
        "connection_string",
        "credential",
        "key",
        "password",
        "private_key",
        "sas_token",
        "secret",
    }
)


def credentials(protocol: str) -> str:
    """Where the credentials of ``protocol`` belong, for messages."""
    names = _CREDENTIALS.get(FAMILIES.get(protocol, ""))
    return f"the credentials in the environment ({names})" if names else "the credentials in the environment"


def secrets_in(protocol: str, options: dict[str, Any]) -> list[str]:
    """Names of options that hold credentials, at any depth."""
    found = {name for name in options if name in _SECRET_OPTIONS}
    for name, value in options.items():
        if isinstance(value, dict):
            found.update(f"{name}.{inner}" for inner in secrets_in(protocol, value))
    if isinstance(options.get("token"), str) and FAMILIES.get(protocol) != "gcs":
        found.add("token")  # of gcsfs, a string is a way to log in or a file; of s3fs it is a secret
    return sorted(found)


def options(protocol: str, chosen: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Options of the `fsspec` class: ours, and the user's on top."""
    merged: dict[str, Any] = {"use_listings_cache": False}
    family = FAMILIES.get(protocol)
    if family == "azure":
        merged |= {"connection_timeout": timeout_s, "read_timeout": timeout_s}
    merged |= chosen
    if family == "s3":
        bounds = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
        merged["config_kwargs"] = {**bounds, **chosen.get("config_kwargs", {})}
    return merged


def prepare(family: str) -> None:
    """What has to be set before a client library is imported."""
    if family == "gcs":  # its support of zonal buckets asks a second service about every bucket it meets
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def without_retries(family: str, fs: Any) -> None:
    """Makes one request of ``fs`` one attempt."""
    if family == "s3":
        fs.retries = 1
    elif family == "gcs":
        fs._request = MethodType(type(fs)._request.__wrapped__, fs)  # inside the decorator that repeats it
    elif family == "azure":
        fs.service_client._config.retry_policy.total_retries = 0
