"""What went wrong in a store: worth another attempt or not, and what to tell the user.

Each client library has its own exceptions, and `fsspec` passes most of them on. They are told
apart here by errno, by HTTP status, and by the name of their class, so that none of those
libraries has to be imported. `attempt` is the only loop that retries.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from gkd_dist.errors import GkdError, ObjectNotFoundError, StorageError
from gkd_dist.storage.clients import credentials

T = TypeVar("T")
_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT = (
    "EAGAIN",
    "EBUSY",
    "EINTR",
    "ETIMEDOUT",
    "ESTALE",
    "EREMOTEIO",
    "EPIPE",
    "ECONNRESET",
    "ECONNREFUSED",
    "ECONNABORTED",
    "EHOSTUNREACH",
    "EHOSTDOWN",
    "ENETUNREACH",
    "ENETDOWN",
    "ENETRESET",
)
_RETRYABLE_ERRNO = frozenset(getattr(errno, name) for name in _TRANSIENT if hasattr(errno, name))
_RETRYABLE_CLASSES = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "azure.IncompleteReadError",
        "azure.ServiceRequestError",
        "azure.ServiceResponseError",
        "botocore.ConnectionError",
        "botocore.FlexibleChecksumError",
        "botocore.HTTPClientError",
        "botocore.IncompleteReadError",
        "botocore.ResponseParserError",
        "fsspec.FSTimeoutError",
        "gcsfs.ChecksumError",
        "google.TransportError",
        "requests.ConnectionError",
        "requests.Timeout",
        "urllib3.IncompleteRead",
        "urllib3.ProtocolError",
    }
)
_CREDENTIAL_CLASSES = frozenset(
    {
        "azure.ClientAuthenticationError",
        "botocore.CredentialRetrievalError",
        "botocore.NoCredentialsError",
        "botocore.PartialCredentialsError",
        "google.DefaultCredentialsError",
        "google.RefreshError",
    }
)
# what S3 and Azure say with a status that elsewhere is final: a body that was damaged on its way, an overload
_RETRYABLE_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "Md5Mismatch",
        "OperationTimedOut",
        "RequestTimeout",
        "ServerBusy",
        "SlowDown",
        "Throttling",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_FULL_CODES = frozenset({"InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioStorageFull"})
_FULL_STATUS = 507
_GO_ON = "free space and run the same command again, which goes on from what is stored"
_LOCAL_ACTIONS = {
    errno.ENOSPC: ("the disk is full", _GO_ON),
    errno.EDQUOT: ("the disk quota is used up", _GO_ON),
    errno.EFBIG: ("the file is larger than is allowed", "raise the limit (ulimit -f) or use another folder"),
    errno.EROFS: ("the file system is read-only", "use a folder on a writable one"),
    errno.EACCES: ("permission denied", "change the permissions of the folder or use another one"),
    errno.EPERM: ("operation not permitted", "change the permissions of the folder or use another one"),
    errno.ENAMETOOLONG: ("the name is too long", "use a shorter path"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "remove that file or use another folder"),
    errno.EISDIR: ("a folder stands where a file is needed", "remove that folder or use another one"),
    errno.EEXIST: ("a file stands where a folder is needed", "remove that file or use another folder"),
}


class UploadLostError(Exception):
    """The store does not know an upload any more: finished by a request whose answer was lost, or thrown away."""


@dataclass(frozen=True)
class Patience:
    """How long a request may take and how often it is repeated.

    ``timeout_s`` bounds one request; ``retries`` are attempts after the first one.
    """

    retries: int
    timeout_s: float


def attempt(action: Callable[[], T], doing: str, url: str, patience: Patience) -> T:
    """Result of ``action``, tried again with growing, jittered pauses where that can help.

    ``doing`` and ``url`` name the request in messages, e.g. ``read`` and ``s3://b/k``. Raises
    ObjectNotFoundError or StorageError.
    """
    for number in range(patience.retries + 1):
        try:
            return action()
        except (GkdError, UploadLostError):
            raise
        except Exception as error:
            if not is_retryable(error) or number == patience.retries:
                raise translate(error, doing, url, attempts=number + 1) from error
            pause = pause_s(number, random.random())
            _log.warning("cannot %s %s: %s; trying again in %.1f s", doing, url, reason(error), pause)
            time.sleep(pause)
    raise AssertionError("the loop above returns or raises")


def pause_s(number: int, jitter: float) -> float:
    """Seconds to wait after attempt ``number`` (from 0); ``jitter`` in [0, 1) spreads out many clients."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**number) * (0.5 + 0.5 * jitter)


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    if is_not_found(error) or is_denied(error) or is_full(error):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    for link in _causes(error):
        if _class_names(link) & _RETRYABLE_CLASSES or http_status(link) in _RETRYABLE_STATUS:
            return True
        if service_code(link) in _RETRYABLE_CODES:
            return True
    return isinstance(error, OSError) and error.errno in _RETRYABLE_ERRNO


def is_not_found(error: BaseException) -> bool:
    """Whether the error says that there is no such object (or no such bucket)."""
    return isinstance(error, FileNotFoundError) or any(http_status(link) == 404 for link in _causes(error))


def is_missing_bucket(error: BaseException) -> bool:
    """Whether it is the bucket (or container) that does not exist."""
    return any(service_code(link) in ("NoSuchBucket", "ContainerNotFound") for link in _causes(error))


def is_denied(error: BaseException) -> bool:
    """Whether the store refuses these credentials, or refuses to serve without any."""
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return True  # the second is how Google's client says it
    return any(http_status(link) in (401, 403) for link in _causes(error))


def is_full(error: BaseException) -> bool:
    """Whether the store has no room left, or the quota is used up."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(http_status(link) == _FULL_STATUS or service_code(link) in _FULL_CODES for link in _causes(error))


def http_status(error: BaseException) -> int | None:
    """HTTP status carried by an exception of any of the client libraries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def translate(error: BaseException, doing: str, url: str, attempts: int = 1) -> StorageError:
    """The error of `gkd_dist.errors` that says the same, with what to do next."""
    # Google's client tells of a missing bucket and of a missing object in one way, but an object need not be there
    # to be written
    if is_missing_bucket(error) or (doing == "write" and is_not_found(error) and not url.startswith("file:")):
        return StorageError(f"cannot {doing} {url}: the bucket does not exist; create it or change the URL")
    if is_not_found(error):
        return ObjectNotFoundError(f"cannot {doing} {url}: there is no such object; check the URL and the key")
    why, action = _explain(error, url.partition(":")[0])
    tries = f" after {attempts} attempts" if attempts > 1 else ""
    return StorageError(f"cannot {doing} {url}{tries}: {why}; {action}")


def reason(error: BaseException) -> str:
    """One line about a foreign exception."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if not text:
        return "no answer in time" if is_timeout(error) else name
    return text if len(text) <= 300 else text[:297] + "..."


def is_timeout(error: BaseException) -> bool:
    """Whether the request got no answer in time."""
    return isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower()


def _explain(error: BaseException, protocol: str) -> tuple[str, str]:
    """Why it failed and the next action."""
    number = error.errno if isinstance(error, OSError) else None
    if any(_class_names(link) & _CREDENTIAL_CLASSES for link in _causes(error)):
        return reason(error), f"set {credentials(protocol)}"
    if number in _LOCAL_ACTIONS and protocol in ("", "file"):
        return _LOCAL_ACTIONS[number]
    if is_full(error):
        return f"the store is full or its quota is used up ({reason(error)})", _GO_ON
    if is_denied(error):
        return f"access denied ({reason(error)})", f"check {credentials(protocol)} and the bucket's policy"
    if is_timeout(error):
        return (
            f"the store did not answer in time ({reason(error)})",
            "check the endpoint and the network, or raise storage.timeout_s",
        )
    if is_retryable(error):
        return (
            f"the store cannot be reached or is overloaded ({reason(error)})",
            "check the endpoint and the network, or raise storage.retries",
        )
    return f"{type(error).__name__}: {reason(error)}", "check the store, its address and the permissions"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    for _ in range(8):  # bounded: a chain may be circular
        if error is None:
            return
        yield error
        error = error.__cause__


def _class_names(error: BaseException) -> set[str]:
    """``package.Class`` of the exception and of its base classes."""
    return {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}


def service_code(error: BaseException) -> str | None:
    """What S3 or Azure call the error, e.g. ``SlowDown``."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        return response["Error"].get("Code")
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code)) if code is not None else None
