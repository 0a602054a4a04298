"""Big objects in parts: bounded memory, every part tried again by itself, nothing left behind on failure.

The object appears when the last part is there and the upload is finished, and not before. Each
family of stores has its own requests for it; `send` is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from gkd_dist.storage.errors import UploadLostError, is_not_found, is_retryable

Run = Callable[..., Any]  # (coroutine function, bytes it moves, *arguments) -> its result
_MOST_PARTS = 10_000  # of S3; Azure allows 50,000
_GRAIN_BYTES = 256 << 10  # sizes of parts on Google Cloud Storage are multiples of it
_INCOMPLETE = 308  # a resumable upload that is under way
_TYPE = "application/octet-stream"


class Upload(Protocol):
    """An upload that has begun. Putting a part twice is harmless."""

    part_bytes: int
    in_order: bool  # parts go one after the other

    def put(self, index: int, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...


def send(upload: Upload, view: memoryview, at_once: int, tries: Callable[[Callable[[], Any]], Any]) -> None:
    """Sends ``view`` in parts, ``at_once`` at a time, and finishes; aborts the upload on any failure.

    Holds ``at_once`` copies of a part. ``tries`` runs a request, again where that can help.
    """
    step = upload.part_bytes

    def put(index: int) -> None:
        data = bytes(view[index * step : (index + 1) * step])
        tries(lambda: upload.put(index, data))

    try:
        with ThreadPoolExecutor(1 if upload.in_order else at_once, "upload") as pool:
            parts = [pool.submit(put, index) for index in range(-(-len(view) // step))]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)  # the abort must be the last request
                raise
        tries(upload.finish)
    except BaseException:
        with suppress(Exception):
            tries(upload.abort)
        raise


class S3Upload:
    """A multipart upload: parts carry an ETag each, which the last request lists."""

    in_order = False

    def __init__(self, fs: Any, run: Run, path: str, num_bytes: int, part_bytes: int) -> None:
        self.part_bytes = _grown(num_bytes, part_bytes)
        self._fs, self._run = fs, run
        bucket, key, _ = fs.split_path(path)
        self._target = {"Bucket": bucket, "Key": key}
        begun = self._call("create_multipart_upload", 0)
        self._target["UploadId"] = begun["UploadId"]
        self._tags: dict[int, str] = {}

    def put(self, index: int, data: bytes) -> None:
        """Stores one part."""
        answer = self._call("upload_part", len(data), PartNumber=index + 1, Body=data)
        self._tags[index] = answer["ETag"]

    def finish(self) -> None:
        """Makes the object of the parts."""
        parts = [{"PartNumber": index + 1, "ETag": tag} for index, tag in sorted(self._tags.items())]
        self._call("complete_multipart_upload", 0, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        """Deletes the parts."""
        self._call("abort_multipart_upload", 0)

    def _call(self, method: str, num_bytes: int, **arguments: Any) -> Any:
        try:
            return self._run(self._fs._call_s3, num_bytes, method, **self._target, **arguments)
        except Exception as error:
            if "UploadId" in self._target and is_not_found(error):
                raise UploadLostError(str(error)) from error
            raise


class GcsUpload:
    """A resumable upload: parts in order; before one is sent again, the store says how much of it it has."""

    in_order = True

    def __init__(self, fs: Any, run: Run, path: str, num_bytes: int, part_bytes: int) -> None:
        from gcsfs.core import initiate_upload

        self.part_bytes = -(-part_bytes // _GRAIN_BYTES) * _GRAIN_BYTES
        self._fs, self._run, self._num_bytes, self._begun = fs, run, num_bytes, -1
        bucket, key, _ = fs.split_path(path)
        self._location = run(initiate_upload, 0, fs, bucket, key)

    def put(self, index: int, data: bytes) -> None:
        """Stores one part; the last one makes the object."""
        start, stop = index * self.part_bytes, index * self.part_bytes + len(data)
        try:
            done = max(start, self._stored()) if self._begun == index else start
            self._begun = index
            if done < stop:
                self._send(data[done - start :], done)
        except Exception as error:
            if is_not_found(error):
                raise UploadLostError(str(error)) from error
            if is_retryable(error) or self._stored() < stop:  # else the store has got the part twice
                raise

    def finish(self) -> None:
        """Nothing: the last part has done it."""

    def abort(self) -> None:
        """Drops what was sent."""
        self._run(self._fs._call, 0, "DELETE", self._location)

    def _send(self, data: bytes, offset: int) -> None:
        from gcsfs.core import upload_chunk

        self._run(upload_chunk, len(data), self._fs, self._location, data, offset, self._num_bytes, _TYPE)

    def _stored(self) -> int:
        """Bytes that the store has."""
        asked = {"Content-Range": f"bytes */{self._num_bytes}"}
        status, headers, _, _ = self._run(self._fs._request, 0, "PUT", self._location, headers=asked)
        if status != _INCOMPLETE:
            return self._num_bytes
        stored = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
        return stored - stored % _GRAIN_BYTES


class AzureUpload:
    """Blocks by name, then the list of them. Blocks that no list names are deleted by the store after a week."""

    in_order = False

    def __init__(self, fs: Any, run: Run, path: str, num_bytes: int, part_bytes: int) -> None:
        self.part_bytes = _grown(num_bytes, part_bytes)
        self._num_parts = -(-num_bytes // self.part_bytes)
        self._fs, self._run = fs, run
        self._container, self._blob, _ = fs.split_path(path)

    def put(self, index: int, data: bytes) -> None:
        """Stores one block."""
        self._call("stage_block", len(data), _block_id(index), data, length=len(data))

    def finish(self) -> None:
        """Makes the object of the blocks."""
        blocks = [_block_id(index) for index in range(self._num_parts)]
        self._call("commit_block_list", 0, blocks, metadata={"is_directory": "false"})

    def abort(self) -> None:
        """Nothing: there is no such request."""

    def _call(self, method: str, num_bytes: int, *arguments: Any, **options: Any) -> Any:
        async def request() -> Any:
            async with self._fs.service_client.get_blob_client(self._container, self._blob) as client:
                return await getattr(client, method)(*arguments, **self._fs._timeout_kwargs, **options)

        return self._run(request, num_bytes)


UPLOADS: dict[str, Callable[[Any, Run, str, int, int], Upload]] = {
    "s3": S3Upload,
    "gcs": GcsUpload,
    "azure": AzureUpload,
}


def _grown(num_bytes: int, part_bytes: int) -> int:
    """``part_bytes``, or more where there would be too many parts."""
    return max(part_bytes, -(-num_bytes // _MOST_PARTS))


def _block_id(index: int) -> str:
    return f"{index:08d}"
