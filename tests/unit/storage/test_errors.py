"""Which errors are worth another attempt, and the sentences they become."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from gkd_dist.errors import ConfigError, ObjectNotFoundError, StorageError
from gkd_dist.storage import clients
from gkd_dist.storage import errors as storage_errors
from gkd_dist.storage.errors import Patience, attempt, is_retryable, pause_s, translate

botocore = pytest.importorskip("botocore.exceptions", reason="needs the extra: pip install 'gkd_dist[s3]'")
QUICK = Patience(retries=2, timeout_s=1)


def client_error(code: str, status: int) -> Exception:
    response: dict[str, Any] = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.ClientError(response, "GetObject")


class AnyHttpError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EBUSY, "SlowDown"),
        client_error("SlowDown", 503),
        client_error("InternalError", 500),
        caused_by(OSError(errno.EIO, "unknown"), client_error("Odd", 502)),
        botocore.EndpointConnectionError(endpoint_url="http://store"),
        botocore.ReadTimeoutError(endpoint_url="http://store"),
        botocore.FlexibleChecksumError(error_msg="flipped"),
        botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        AnyHttpError(429),
        client_error("BadDigest", 400),
    ],
    ids=repr,
)
def test_worth_another_attempt(error: Exception) -> None:
    assert is_retryable(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("key"),
        PermissionError("no"),
        OSError(errno.ENOSPC, "full"),
        client_error("AccessDenied", 403),
        client_error("NoSuchKey", 404),
        client_error("InvalidRange", 416),
        botocore.NoCredentialsError(),
        AnyHttpError(404),
        ValueError("no"),
        client_error("InsufficientStorage", 507),
        client_error("QuotaExceeded", 403),
        client_error("QuotaExceeded", 503),
        OSError("Forbidden: https://storage/b\nno"),
    ],
    ids=repr,
)
def test_not_worth_another_attempt(error: Exception) -> None:
    assert not is_retryable(error)


@pytest.mark.parametrize(
    ("error", "cls", "message"),
    [
        (FileNotFoundError("k"), ObjectNotFoundError, "cannot read s3://b/k: there is no such object; check the URL"),
        (client_error("NoSuchBucket", 404), StorageError, "the bucket does not exist; create it"),
        (caused_by(FileNotFoundError(), client_error("NoSuchBucket", 404)), StorageError, "the bucket does not exist"),
        (PermissionError("Forbidden"), StorageError, r"access denied \(Forbidden\); check the credentials"),
        (botocore.NoCredentialsError(), StorageError, "set the credentials in the environment"),
        (TimeoutError(), StorageError, r"did not answer in time .*storage\.timeout_s"),
        (ConnectionResetError("reset"), StorageError, r"cannot be reached or is overloaded .*storage\.retries"),
        (
            client_error("InsufficientStorage", 507),
            StorageError,
            r"is full .*free space and run the same command again",
        ),
        (client_error("QuotaExceeded", 403), StorageError, r"is full or its quota is used up .*free space"),
        (RuntimeError("odd\n thing"), StorageError, "RuntimeError: odd thing; check the store"),
    ],
)
def test_sentences(error: Exception, cls: type[StorageError], message: str) -> None:
    translated = translate(error, "read", "s3://b/k")
    assert type(translated) is cls
    with pytest.raises(cls, match=message):
        raise translated


def test_the_errors_of_the_azure_client() -> None:
    exceptions = pytest.importorskip("azure.core.exceptions", reason="needs the extra: pip install 'gkd_dist[azure]'")

    def azure(name: str, status: int | None = None, code: str | None = None) -> Exception:
        error: Exception = getattr(exceptions, name)("from the client")
        error.status_code, error.error_code = status, code  # type: ignore[attr-defined]
        return error

    for again in (
        azure("HttpResponseError", 503, "ServerBusy"),
        azure("HttpResponseError", 500, "OperationTimedOut"),
        azure("IncompleteReadError"),
        azure("ServiceRequestError"),
        azure("ServiceResponseTimeoutError"),
    ):
        assert is_retryable(again), again
    for final, message in (
        (azure("HttpResponseError", 403, "AuthorizationFailure"), "access denied .*check the cred.*AZURE_STORAGE_CONN"),
        (azure("ClientAuthenticationError", 401), r"set the credentials .*AZURE_STORAGE_CONN"),
        (azure("ResourceNotFoundError", 404, "ContainerNotFound"), "the bucket does not exist"),
        (azure("HttpResponseError", 507, "InsufficientStorage"), "the store is full"),
    ):
        assert not is_retryable(final), final
        with pytest.raises(StorageError, match=message):
            raise translate(final, "read", "abfs://b/k")


def test_the_errors_of_the_google_client() -> None:
    clients.prepare("gcs")
    pytest.importorskip("gcsfs", reason="needs the extra: pip install 'gkd_dist[gcs]'")
    from gcsfs.retry import ChecksumError, HttpError, validate_response
    from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError

    def answered(status: int, body: bytes = b"") -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is, is the question
            validate_response(status, body, "b/bucket/o/key")
        return caught.value

    busy = b'{"error": {"code": 503, "message": "backendError"}}'
    for again in (answered(503, busy), answered(429), answered(502), HttpError({"code": 408}), ChecksumError(),
                  TransportError("reset")):  # fmt: skip
        assert is_retryable(again), again
    for final, message in (
        (answered(403, b'{"error": {"message": "no"}}'), "access denied .*check the cred.*GOOGLE_APP"),
        (answered(401, b'{"error": {"message": "Invalid Credentials"}}'), "access denied .*check the cred.*GOOGLE"),
        (answered(404), "there is no such object"),
        (DefaultCredentialsError("none found"), "none found; set the cred.*GOOGLE_APP"),
        (RefreshError("expired"), "expired; set the cred.*GOOGLE_APP"),
    ):
        assert not is_retryable(final), final
        with pytest.raises(StorageError, match=message):
            raise translate(final, "read", "gs://b/k")
    with pytest.raises(StorageError, match="the bucket does not exist"):
        raise translate(answered(404), "write", "gs://b/k")


def test_pauses_double_up_to_a_limit_and_are_jittered() -> None:
    assert [pause_s(number, 1.0) for number in range(3)] == [0.2, 0.4, 0.8]
    assert pause_s(0, 0.0) == 0.1
    assert pause_s(1000, 1.0) == 10.0


def test_attempts_stop_at_the_first_success_or_after_the_last_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_errors.time, "sleep", pauses.append)
    failures: list[Exception] = [TimeoutError(), TimeoutError()]

    def action() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert attempt(action, "read", "url", QUICK) == "done"
    assert len(pauses) == 2
    failures += [TimeoutError() for _ in range(3)]
    with pytest.raises(StorageError, match="after 3 attempts") as caught:
        attempt(action, "read", "url", QUICK)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(pauses) == 4


def test_errors_of_our_own_pass_through() -> None:
    def action() -> None:
        raise ConfigError("no such package")

    with pytest.raises(ConfigError, match="no such package"):
        attempt(action, "read", "url", QUICK)
