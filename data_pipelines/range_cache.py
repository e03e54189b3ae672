"""Byte ranges of shards on a local disk, so that later epochs need not fetch them again.

An entry is named by what its bytes are (the tar's SHA-256 from the index, and the range), and kept
only after they were found to be those that were indexed, so neither a replaced shard nor a damaged
one is answered from here. Entries appear whole by a rename and end with a CRC-32;
one that is damaged is removed and fetched again. Several processes may share a folder: nothing is
locked, and an entry that another process removes while it is read stays readable. The least
recently used go when the folder has grown beyond its limit. A disk that fails makes it slower, not
wrong.
"""

import logging
import os
import threading
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_CRC_BYTES = 4
_KEPT_SHARE = 0.9
"""Of the limit, after entries have been removed."""
_LOOKS_PER_LIMIT = 64
"""A process looks at the folder's size after writing this part of the limit."""
_log = logging.getLogger(__name__)


class RangeCache:
    """A folder of byte ranges; thread-safe.

    Args:
        limit_bytes: of all entries; each process that writes may exceed it by a 64th.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache.folder {folder} cannot be made ({error}); give a folder on a local "
                f"disk that this user may write to"
            ) from error
        self.folder, self.limit_bytes = folder, limit_bytes
        self._lock = threading.Lock()
        self._unchecked = limit_bytes  # what lies there already is looked at with the first write
        self._warned = False

    def read(
        self,
        name: str,
        size_bytes: int,
        fetch: Callable[[], bytes],
        is_sound: Callable[[bytes], bool],
    ) -> bytes:
        """The entry `name` of this size; from `fetch` where there is none, and then kept if it is
        sound."""
        path = self.folder / name[:2] / name
        try:
            content = path.read_bytes()
            if len(content) == size_bytes + _CRC_BYTES and _is_whole(content):
                os.utime(path)  # used just now
                return content[:-_CRC_BYTES]
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(error)
        content = fetch()
        if is_sound(content):
            try:
                self._keep(path, content)
            except OSError as error:
                self._warn(error)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        size = len(content) + _CRC_BYTES
        if size > self.limit_bytes * _KEPT_SHARE:
            return
        with self._lock:
            self._unchecked += size
            look = self._unchecked * _LOOKS_PER_LIMIT >= self.limit_bytes
            if look:
                self._unchecked = 0
        if look:
            self._make_room(size)
        path.parent.mkdir(exist_ok=True)
        new = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            with new.open("wb") as file:
                file.write(content)
                file.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "little"))
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Remove the least recently used entries, if the folder is beyond its limit."""
        entries = []
        for path in self.folder.glob("*/*"):
            with suppress(OSError):  # another process was quicker
                found = path.stat()
                entries.append((found.st_mtime, found.st_size, path))
        total = size + sum(entry[1] for entry in entries)
        if total <= self.limit_bytes:
            return
        for _, entry_size, path in sorted(entries):
            if total <= self.limit_bytes * _KEPT_SHARE:
                return
            path.unlink(missing_ok=True)
            total -= entry_size

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the cache in %s does not work (%s); reading on without", self.folder, error
            )


def _is_whole(content: bytes) -> bool:
    checksum = int.from_bytes(content[-_CRC_BYTES:], "little")
    return zlib.crc32(content[:-_CRC_BYTES]) == checksum
