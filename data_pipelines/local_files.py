"""Object-store calls on local files: atomic writes, recursive listing, the store's error types.

A file appears under its name whole or not at all: it is written under a hidden `.partial` name in
the same folder, flushed to disk, and then moved. `.partial` files of killed writers are not listed.
"""

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipelines.store_errors import (
    AccessRefusedError,
    AlreadyExistsError,
    ObjectInfo,
    ObjectMissingError,
    StoreError,
    too_short,
)

_PARTIAL = ".partial"
WRITTEN = "written-"
"""Begins the ETag of a local file; the time of its last change in nanoseconds follows."""


@contextmanager
def local_errors(url: str) -> Iterator[None]:
    """Turn the operating system's errors into the store's, which name `url`."""
    try:
        yield
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectMissingError(f"{url} does not exist: check the path") from error
    except PermissionError as error:
        raise AccessRefusedError(f"{url} is not accessible to this user: {error}") from error
    except OSError as error:
        raise StoreError(f"{url}: {error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_info(path: Path, url: str) -> ObjectInfo:
    """Size and ETag of a regular file. Raises ObjectMissingError, also for a folder."""
    with local_errors(url):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ObjectMissingError(f"{url} is not a file: an object cannot be a folder")
    return _info(url, found)


def _info(url: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(url, found.st_size, f"{WRITTEN}{found.st_mtime_ns}")


def list_folder(path: Path, url: str) -> list[ObjectInfo]:
    """Every file below `path`, sorted by URL; [] when there is no such folder."""
    found: list[ObjectInfo] = []
    with local_errors(url):
        for folder, _, names in os.walk(path, onerror=_raise_unless_missing):
            for name in names:
                if not (name.startswith(".") and name.endswith(_PARTIAL)):
                    file = Path(folder, name)
                    below = file.relative_to(path).as_posix()
                    with suppress(FileNotFoundError):  # a dangling link, or just deleted
                        found.append(_info(f"{url.rstrip('/')}/{below}", file.stat()))
    return sorted(found, key=lambda info: info.url)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def read_range(path: Path, url: str, start: int, end: int | None) -> bytes:
    """The bytes [start, end) of a file. Raises ObjectTooShortError when it ends before."""
    size_bytes = file_info(path, url).size_bytes
    stop = size_bytes if end is None else end
    with local_errors(url), path.open("rb") as file:
        file.seek(start)
        data = file.read(max(0, stop - start))
    if start > size_bytes or len(data) != stop - start:
        raise too_short(url, start, end, size_bytes)
    return data


@contextmanager
def published_file(path: Path, url: str, *, only_if_absent: bool = False) -> Iterator[BinaryIO]:
    """A file to fill; it becomes `path` in one step when the block ends without an error.

    Raises AlreadyExistsError when `only_if_absent` and `path` exists by then.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    with local_errors(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _move(partial, path, url, only_if_absent=only_if_absent)
        finally:
            partial.unlink(missing_ok=True)


def _move(partial: Path, path: Path, url: str, *, only_if_absent: bool) -> None:
    if not only_if_absent:
        partial.replace(path)
        return
    try:
        path.hardlink_to(partial)  # unlike a rename, a link never replaces
    except FileExistsError as error:
        raise AlreadyExistsError(f"{url} exists already") from error


def missing_folders(path: Path) -> list[Path]:
    """`path` and those above it that do not exist yet, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_file(path: Path, url: str) -> None:
    """Delete a file; a missing one is no error."""
    with local_errors(url):
        path.unlink(missing_ok=True)


def remove_folder(path: Path, url: str) -> None:
    """Delete a folder and everything in it; a missing one is no error."""
    if path.resolve() == Path(path.resolve().anchor):
        raise ValueError(f"refusing to delete everything below {url}")
    with local_errors(url):
        if path.is_dir():
            shutil.rmtree(path)
