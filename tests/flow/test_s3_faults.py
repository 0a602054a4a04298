"""An S3 server that misbehaves: what is retried, how often, and what is not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy

from gkd_dist.config import StorageConfig
from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
from gkd_dist.storage import errors as storage_errors

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")

DATA = bytes(range(256)) * 64
MIB = 1 << 20


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    with fault_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy) -> Storage:
    options = {"s3": {"endpoint_url": proxy.endpoint}}
    config = StorageConfig(options=options, retries=3, timeout_s=5, upload_part_bytes=5 * MIB, native_reads=False)
    store = Storage.open("s3://bucket/run", config)
    store.write("key", DATA)
    proxy.requests.clear()
    return store


@pytest.mark.parametrize("fault", ["503", "500", "429", "short", "reset", "lost"])
def test_a_read_survives_two_faults(fault: str, store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault(fault, times=2)]
    assert store.read("key") == DATA
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("fault", ["503", "500", "lost"])
def test_a_write_survives_two_faults(fault: str, store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault(fault, times=2)]
    store.write("key", DATA[::-1])
    assert len(proxy.requests) == 3
    assert store.read("key") == DATA[::-1]


@pytest.mark.parametrize("fault", ["503", "short", "reset"])
def test_attempts_are_counted_and_end(fault: str, store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault(fault, times=10)]
    with pytest.raises(StorageError, match="cannot read s3://bucket/run/key after 4 attempts"):
        store.read("key")
    assert len(proxy.requests) == 4


def test_a_refusal_is_not_repeated(store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault("403", times=10)]
    with pytest.raises(StorageError, match=r"access denied .*check the credentials"):
        store.read("key")
    assert len(proxy.requests) == 1


def test_a_full_store_is_no_reason_to_try_again(store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault("507", times=10)]
    with pytest.raises(StorageError, match=r"the store is full .*free space and run the same command again"):
        store.write("key", b"x")
    assert proxy.requests == ["PUT"]


# --- objects in parts ------------------------------------------------------------------------


@pytest.fixture
def dangling(s3_server: str) -> Iterator[object]:
    """Uploads that the server still holds, and must not hold at the end."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")

    def uploads() -> list[str]:
        return [upload["Key"] for upload in client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])]

    yield uploads
    assert uploads() == []


BIG = os.urandom(1 * MIB) * 12  # three parts
PART = r"partNumber=2"


@pytest.mark.usefixtures("dangling")
@pytest.mark.parametrize("fault", ["503", "lost", "twice"])
def test_a_part_is_tried_again_by_itself(fault: str, store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault(fault, "PUT", PART, times=2)]
    store.write("big", BIG)
    assert proxy.requests.count("PUT") == (3 if fault == "twice" else 5)
    assert proxy.requests.count("POST") == 2  # begun and finished once
    assert store.read("big") == BIG


@pytest.mark.usefixtures("dangling")
@pytest.mark.parametrize("fault", ["503", "lost"])
def test_beginning_and_finishing_an_upload_are_tried_again(fault: str, store: Storage, proxy: FaultProxy) -> None:
    proxy.plan = [Fault("503", "POST", r"\?uploads"), Fault(fault, "POST", r"\?uploadId")]
    store.write("big", BIG)
    assert [fault.struck for fault in proxy.plan] == [1, 1]
    assert store.read("big") == BIG


@pytest.mark.parametrize("fault", ["503", "507", "lost"])
def test_a_failed_upload_leaves_no_parts_and_keeps_the_old_object(
    fault: str, store: Storage, proxy: FaultProxy, dangling: object
) -> None:
    store.write("big", b"old")
    proxy.plan = [Fault(fault, "PUT", PART, times=100)]
    with pytest.raises(StorageError, match="cannot write s3://bucket/run/big"):
        store.write("big", BIG)
    if fault != "lost":  # the HTTP client itself repeats a request whose connection broke before an answer
        assert proxy.plan[0].struck == (1 if fault == "507" else 4)
    assert store.read("big") == b"old"
    assert store.list() == ["big", "key"]
