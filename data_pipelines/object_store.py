"""Object storage: the project's only S3 client, with the same calls for local folders.

A URL is `s3://bucket/key`, `file:///path` (taken as written, no %-decoding) or a plain path. A call
does what it says or raises one `StoreError` that names the URL: a missing object, a refusal and a
store that does not answer are different types. Transient faults are retried, request by request,
with full-jitter backoff until `deadline_seconds`; a hung server ends in `StoreUnavailableError` at
most one request timeout later. Objects appear whole or not at all. Nothing is cached, so a listing
is never stale.
"""

import io
import mmap
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from data_pipelines import local_files
from data_pipelines.s3_requests import S3Requests, bucket_and_key, object_of
from data_pipelines.store_errors import (
    AccessRefusedError,
    AlreadyExistsError,
    BucketMissingError,
    ObjectChangedError,
    ObjectInfo,
    ObjectMissingError,
    ObjectTooShortError,
    StoreError,
    StoreUnavailableError,
    too_short,
)

__all__ = [
    "AccessRefusedError",
    "AlreadyExistsError",
    "BucketMissingError",
    "ObjectChangedError",
    "ObjectInfo",
    "ObjectMissingError",
    "ObjectStore",
    "ObjectTooShortError",
    "StoreError",
    "StoreUnavailableError",
    "absolute",
    "join",
]

_PART_BYTES = 16 * 2**20  # of large transfers
_MAX_PARTS = 10_000  # S3's limit
_PART_THREADS = 4
_DELETE_BATCH = 1_000  # S3's limit


def join(url: str, *parts: str) -> str:
    """`url` and `parts` with single slashes between them. Raises ValueError for an empty part."""
    cleaned = [part.strip("/") for part in parts]
    if not all(cleaned):
        raise ValueError(f"join({url!r}, ...) got an empty part among {parts!r}")
    return "/".join([url.rstrip("/"), *cleaned])


def absolute(url: str) -> str:
    """`url` as other processes can use it: a relative path counts from this working directory."""
    return url if "://" in url else str(Path(url).absolute())


class ObjectStore:
    """The project's calls on S3 and local URLs: thread-safe, picklable, usable after a fork.

    Credentials, region and (without `endpoint_url`) the endpoint come from the standard AWS_*
    environment variables of the process that makes the call.

    deadline_seconds: how long one request is retried before StoreUnavailableError; a large
        transfer is many requests.
    request_timeout_seconds: silence after which one attempt counts as failed.
    """

    def __init__(
        self,
        *,
        endpoint_url: str | None = None,
        deadline_seconds: float = 60.0,
        request_timeout_seconds: float = 10.0,
    ) -> None:
        if min(deadline_seconds, request_timeout_seconds) <= 0:
            raise ValueError(
                "deadline_seconds and request_timeout_seconds must be positive, not "
                f"{deadline_seconds} and {request_timeout_seconds}"
            )
        self._s3 = S3Requests(endpoint_url, deadline_seconds, request_timeout_seconds)

    def list(self, url: str) -> list[ObjectInfo]:
        """Every object below `url` + "/", sorted by URL; [] when there is none.

        Raises BucketMissingError, AccessRefusedError, StoreUnavailableError.
        """
        if (path := _local_path(url)) is not None:
            return local_files.list_folder(path, url)
        bucket = bucket_and_key(url)[0]
        found: list[ObjectInfo] = []
        token: dict[str, str] = {}
        while True:
            page = self._list_page(url, **token)
            found += [
                ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"].strip('"'))
                for entry in page.get("Contents", [])
                if not entry["Key"].endswith("/")  # a folder marker of some console, no object
            ]
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda info: info.url)
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, url: str) -> ObjectInfo:
        """Size and ETag. Raises ObjectMissingError (BucketMissingError without the bucket)."""
        if (path := _local_path(url)) is not None:
            return local_files.file_info(path, url)
        try:
            answer = self._s3.call(url, "head_object", **object_of(url))
        except ObjectMissingError:
            self._s3.require_bucket(url)
            raise
        return ObjectInfo(url, answer["ContentLength"], answer["ETag"].strip('"'))

    def exists(self, url: str) -> bool:
        """False only for a missing object; a missing bucket, a refusal or a dead store raise."""
        try:
            self.stat(url)
        except BucketMissingError:
            raise
        except ObjectMissingError:
            return False
        return True

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of the object, exactly that many; None reads to its end.

        One request, so all of it must arrive within the deadline: `download` has no such limit.
        Raises ObjectTooShortError when the object ends before `start` or `end`.
        """
        if start < 0 or (end is not None and end < start):
            raise ValueError(
                f"{url} has no byte range [{start}, {end}): 0 <= start <= end is needed"
            )
        if (path := _local_path(url)) is not None:
            return local_files.read_range(path, url, start, end)
        if end == start or (end is None and start > 0):
            # S3 has no empty ranges and refuses one that starts at the end: ask for the size first.
            size_bytes = self.stat(url).size_bytes
            if start > size_bytes:
                raise too_short(url, start, end, size_bytes)
            end = size_bytes if end is None else end
        return b"" if start == end else self._s3.get(url, start, end)

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        """Store `data` at `url` in one step, replacing what is there; folders are created.

        With `only_if_absent`, one of several writers succeeds and the others get
        AlreadyExistsError, also when answers are lost on the way.
        """
        if (path := _local_path(url)) is not None:
            with local_files.published_file(path, url, only_if_absent=only_if_absent) as file:
                file.write(data)
            return self.stat(url)
        if only_if_absent:
            answer = self._s3.put_if_absent(url, data)
            return ObjectInfo(url, len(data), answer["ETag"].strip('"'))
        return self._put(url, len(data), lambda start, end: data[start:end])

    def upload(self, local_path: Path, url: str) -> ObjectInfo:
        """Store a file of any size at `url`, where it appears once all of it has arrived."""
        with local_path.open("rb") as file:
            if (target := _local_path(url)) is not None:
                with local_files.published_file(target, url) as copy:
                    shutil.copyfileobj(file, copy, _PART_BYTES)
                return self.stat(url)

            def piece(start: int, end: int) -> bytes:
                data = os.pread(file.fileno(), end - start, start)
                if len(data) != end - start:
                    raise StoreError(f"{local_path} became shorter while it was sent to {url}")
                return data

            return self._put(url, os.fstat(file.fileno()).st_size, piece)

    def download(self, url: str, local_path: Path) -> None:
        """Copy the object to `local_path`, which appears once it is whole.

        Raises ObjectChangedError when the object is replaced meanwhile.
        """
        info = self.stat(url)
        with local_files.published_file(local_path, url) as file:
            if (source := _local_path(url)) is not None:
                with source.open("rb") as original:
                    shutil.copyfileobj(original, file, _PART_BYTES)
            else:
                self._get_parts(info, file.fileno())
            file.flush()
            arrived = os.fstat(file.fileno()).st_size
            if arrived != info.size_bytes:
                raise StoreError(f"{url} has {info.size_bytes} bytes, but {arrived} arrived")

    @contextmanager
    def local_copy(self, url: str) -> Iterator[Path]:
        """The file itself when it is local, else a copy that lasts as long as the block."""
        self.stat(url)
        if (path := _local_path(url)) is not None:
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="diti-") as folder:
            copy = Path(folder, "copy")
            self.download(url, copy)
            yield copy

    @contextmanager
    def mapped(self, url: str) -> Iterator[bytes | mmap.mmap]:
        """The object's bytes, however many: mapped from a local copy, not held in memory."""
        with self.local_copy(url) as path, path.open("rb") as file:
            if not path.stat().st_size:
                yield b""
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield content

    @contextmanager
    def local_folder(self, url: str, endings: tuple[str, ...]) -> Iterator[Path]:
        """The folder itself when it is local, else a copy of the objects below with these endings.

        Raises StoreError for an object whose name would lead out of the folder.
        """
        if (path := _local_path(url)) is not None:
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="diti-") as folder:
            for info in self.list(url):
                name = PurePosixPath(info.url.removeprefix(url.rstrip("/") + "/"))
                if name.is_absolute() or ".." in name.parts:
                    raise StoreError(f"{info.url} has a name that leads out of {url}; remove it")
                if name.name.endswith(endings):
                    self.download(info.url, Path(folder, name))
            yield Path(folder)

    def delete(self, url: str) -> None:
        """Remove the object; a missing one is no error."""
        if (path := _local_path(url)) is not None:
            local_files.remove_file(path, url)
        else:
            self._s3.call(url, "delete_object", **object_of(url))

    def delete_prefix(self, url: str) -> None:
        """Remove everything below `url` + "/". Raises ValueError for a whole bucket."""
        if (path := _local_path(url)) is not None:
            local_files.remove_folder(path, url)
            return
        bucket, key = bucket_and_key(url)
        if not key:
            raise ValueError(f"delete_prefix refuses to empty the whole bucket {url}")
        keys = [info.url.removeprefix(f"s3://{bucket}/") for info in self.list(url)]
        for at in range(0, len(keys), _DELETE_BATCH):
            self._delete_keys(url, bucket, keys[at : at + _DELETE_BATCH])

    def check_access(self, url: str, *, write: bool) -> None:
        """Preflight of a folder or prefix: it can be listed and, with `write`, written below.

        `write` stores and removes a small probe. Raises BucketMissingError (ObjectMissingError for
        a local folder), AccessRefusedError (also where the folder cannot be made) or
        StoreUnavailableError.
        """
        if (path := _local_path(url)) is None:
            self._list_page(url, MaxKeys=1)
        elif not write:
            with local_files.local_errors(url):
                os.scandir(path).close()
        if write:
            made = [] if path is None else local_files.missing_folders(path)
            probe = join(url, f".diti-probe-{uuid.uuid4().hex}")
            try:
                self.write(probe, b"probe")
            except StoreError as error:
                if path is None:
                    raise
                raise AccessRefusedError(
                    f"{url} cannot be written below ({error.__cause__ or error}); give a folder "
                    f"that this user may write to"
                ) from error
            self.delete(probe)
            for folder in made:
                folder.rmdir()

    def open_for_reading(self, url: str) -> BinaryIO:
        """A seekable file that fetches just the ranges asked for, without read-ahead.

        Its reads raise what `read` raises, and ObjectChangedError once the object is replaced.
        """
        info = self.stat(url)
        if (path := _local_path(url)) is not None:
            with local_files.local_errors(url):
                return path.open("rb")
        return cast("BinaryIO", _RangeReader(self._s3, info))

    def _list_page(self, url: str, **query: str | int) -> dict[str, Any]:
        bucket, key = bucket_and_key(url)
        prefix = key.rstrip("/") + "/" if key else ""
        return self._s3.call(url, "list_objects_v2", Bucket=bucket, Prefix=prefix, **query)

    def _get_parts(self, info: ObjectInfo, descriptor: int) -> None:
        def fetch(start: int) -> None:
            end = min(start + _PART_BYTES, info.size_bytes)
            os.pwrite(descriptor, self._s3.get(info.url, start, end, info.etag), start)

        with ThreadPoolExecutor(_PART_THREADS) as pool:
            list(pool.map(fetch, range(0, info.size_bytes, _PART_BYTES)))

    def _put(self, url: str, size_bytes: int, piece: Callable[[int, int], bytes]) -> ObjectInfo:
        """Store `piece(0, size_bytes)`, asking for it part by part when it is large."""
        if size_bytes > _PART_BYTES:
            return self._put_parts(url, size_bytes, piece)
        answer = self._s3.call(url, "put_object", **object_of(url), Body=piece(0, size_bytes))
        return ObjectInfo(url, size_bytes, answer["ETag"].strip('"'))

    def _put_parts(
        self, url: str, size_bytes: int, piece: Callable[[int, int], bytes]
    ) -> ObjectInfo:
        part_bytes = max(_PART_BYTES, -(-size_bytes // _MAX_PARTS))
        upload = object_of(url)
        upload["UploadId"] = self._s3.call(url, "create_multipart_upload", **upload)["UploadId"]

        def put(start: int) -> dict[str, Any]:
            number = start // part_bytes + 1
            data = piece(start, min(start + part_bytes, size_bytes))
            answer = self._s3.call(url, "upload_part", **upload, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_PART_THREADS) as pool:
                parts = {"Parts": list(pool.map(put, range(0, size_bytes, part_bytes)))}
        except StoreUnavailableError:
            raise  # nothing can be tidied up; a lifecycle rule on the bucket has to
        except StoreError:
            self._s3.call_once("abort_multipart_upload", **upload)
            raise
        # Once its answer is lost, a completion that is tried again finds no upload any more.
        with suppress(ObjectMissingError):
            self._s3.call(url, "complete_multipart_upload", **upload, MultipartUpload=parts)
        info = self.stat(url)
        if info.size_bytes != size_bytes:
            raise StoreError(f"{url} has {info.size_bytes} bytes after an upload of {size_bytes}")
        return info

    def _delete_keys(self, url: str, bucket: str, keys: Sequence[str]) -> None:
        objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = self._s3.call(url, "delete_objects", Bucket=bucket, Delete=objects)
        if failed := answer.get("Errors"):
            raise StoreError(
                f"{len(failed)} of {len(keys)} objects below {url} could not be deleted, first: "
                f"{failed[0].get('Key')} ({failed[0].get('Code')})"
            )


class _RangeReader(io.RawIOBase):
    """One version of an object as a file; every read is one ranged request."""

    def __init__(self, s3: S3Requests, info: ObjectInfo) -> None:
        self._s3 = s3
        self._info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._info.size_bytes,
        }[whence]
        if origin + offset < 0:
            raise ValueError(f"{self._info.url}: cannot seek to {origin + offset}")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start, left = self._position, max(0, self._info.size_bytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted == 0:
            return b""
        data = self._s3.get(self._info.url, start, start + wanted, self._info.etag)
        self._position = start + wanted
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def _local_path(url: str) -> Path | None:
    """The path of a local URL, None for s3://. Raises ValueError for any other scheme."""
    if url.startswith("s3://"):
        return None
    if url.startswith("file:///"):
        return Path(url.removeprefix("file://"))
    if not url or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
        raise ValueError(
            f"{url!r} is no URL of the object store: use s3://bucket/key, file:///path or a path"
        )
    return Path(url)
