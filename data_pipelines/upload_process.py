"""Large uploads, from a process of their own.

The copies and checksums of an upload hold the interpreter's lock for milliseconds at a time. In
a process that trains, the training thread would stand still meanwhile.
"""

import mmap
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from data_pipelines.local_files import sha256_of
from data_pipelines.object_store import ObjectStore
from data_pipelines.store_errors import StoreError

_NICENESS = 10  # where training has every core, an upload takes what training leaves


class MemoryFile:
    """Bytes in memory while this object lives, that other processes can open by `path` (Linux).

    Attributes:
        bytes: writable.
    """

    def __init__(self, size_bytes: int) -> None:
        self._file = os.fdopen(os.memfd_create("diti"), "r+b")
        self._file.truncate(size_bytes)
        # All pages at once: it takes a third less time than one by one, as they are written.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.bytes = mmap.mmap(self._file.fileno(), size_bytes, flags)

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")


class UploadProcess:
    """Started by the first upload; ends with the process that started it. One upload at a time."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._process: subprocess.Popen[bytes] | None = None

    def upload(self, file: MemoryFile, url: str, *, deadline_seconds: float) -> str:
        """Store a file at `url`; returns its SHA-256.

        Raises StoreError: what the upload raised, that its process was killed, or that it took too
        long and was ended.
        """
        process = self._process = self._process or self._start()
        try:
            self._pipe.send((self._store, file.path, url))
            if not self._pipe.poll(deadline_seconds):
                self.close()
                self._process = None
                raise StoreError(f"{url}: not stored after {deadline_seconds:.0f} s, so given up")
            outcome = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process = None
            raise StoreError(
                f"{url}: the process that uploads ended with {process.wait()}"
            ) from error
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """End the process, also in the middle of an upload."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # No multiprocessing.Process: it would import the main module, which may be Ray's.
        self._pipe, far_end = Pipe()
        with far_end:
            number = far_end.fileno()
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", __name__, str(number)],
                pass_fds=[number],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )


def _upload(store: ObjectStore, path: Path, url: str) -> str | Exception:
    try:
        store.upload(path, url)
        return sha256_of(path)
    except Exception as error:  # noqa: BLE001 (raised where the upload was asked for)
        return error


def main() -> None:
    """The process: uploads what it is told to, until the other end of its pipe is gone."""
    for told_to_all in (signal.SIGINT, signal.SIGTERM):  # a run publishes once more when told
        signal.signal(told_to_all, signal.SIG_IGN)
    os.nice(_NICENESS)
    pipe = Connection(int(sys.argv[1]))
    with ThreadPoolExecutor(1) as uploads:
        while True:
            try:
                wanted = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            uploads.submit(lambda wanted=wanted: pipe.send(_upload(*wanted)))


if __name__ == "__main__":
    main()
