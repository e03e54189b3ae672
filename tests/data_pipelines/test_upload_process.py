"""Uploads from a process of their own arrive whole, fail in the store's words, and end with us."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import BucketMissingError, ObjectStore, StoreError, join
from data_pipelines.upload_process import MemoryFile, UploadProcess


def memory_file(size_bytes: int) -> MemoryFile:
    file = MemoryFile(size_bytes)
    file.bytes[:] = os.urandom(size_bytes)
    return file


@pytest.fixture
def uploads(store: ObjectStore) -> Iterator[UploadProcess]:
    uploads = UploadProcess(store)
    yield uploads
    uploads.close()


def children() -> list[psutil.Process]:
    everyone = psutil.Process().children()
    return [child for child in everyone if "data_pipelines.upload_process" in child.cmdline()]


def test_several_parts_arrive_as_they_were(
    uploads: UploadProcess, store: ObjectStore, s3_url: str
) -> None:
    for name in ("a", "b"):
        file = memory_file(40 * 2**20 + 1)
        digest = uploads.upload(file, join(s3_url, name), deadline_seconds=60)
        arrived = store.read(join(s3_url, name))
        assert arrived == bytes(file.bytes)
        assert digest == hashlib.sha256(arrived).hexdigest()
    assert len(children()) == 1, "one process for all uploads"


def test_a_failed_upload_is_the_stores_error_and_the_next_one_works(
    uploads: UploadProcess, s3_url: str
) -> None:
    with pytest.raises(BucketMissingError, match="no-such-bucket"):
        uploads.upload(memory_file(10), "s3://no-such-bucket/a", deadline_seconds=60)
    uploads.upload(memory_file(10), join(s3_url, "a"), deadline_seconds=60)


def test_a_killed_process_is_said_and_replaced(
    uploads: UploadProcess, store: ObjectStore, s3_url: str
) -> None:
    uploads.upload(memory_file(10), join(s3_url, "a"), deadline_seconds=60)
    children()[0].kill()
    with pytest.raises(StoreError, match=r"/b: the process that uploads ended with -9"):
        uploads.upload(memory_file(10), join(s3_url, "b"), deadline_seconds=60)
    uploads.upload(memory_file(11), join(s3_url, "b"), deadline_seconds=60)
    assert store.stat(join(s3_url, "b")).size_bytes == 11


def test_an_upload_that_takes_too_long_is_given_up_and_the_next_one_works(
    uploads: UploadProcess, s3_url: str
) -> None:
    uploads.upload(memory_file(10), join(s3_url, "a"), deadline_seconds=60)
    [stopped] = children()
    stopped.suspend()
    with pytest.raises(StoreError, match=r"/b: not stored after 1 s, so given up"):
        uploads.upload(memory_file(10), join(s3_url, "b"), deadline_seconds=1)
    assert not stopped.is_running()
    uploads.upload(memory_file(10), join(s3_url, "b"), deadline_seconds=60)


def test_it_outlives_the_signals_that_a_whole_group_gets(
    uploads: UploadProcess, s3_url: str
) -> None:
    uploads.upload(memory_file(10), join(s3_url, "a"), deadline_seconds=60)
    for told in (signal.SIGTERM, signal.SIGINT):
        children()[0].send_signal(told)
    uploads.upload(memory_file(10), join(s3_url, "b"), deadline_seconds=60)


def test_closing_ends_an_upload_that_hangs(victim: LocalS3) -> None:
    uploads = UploadProcess(ObjectStore(deadline_seconds=60))
    where = f"s3://{victim.bucket}/a"
    uploads.upload(memory_file(10), where, deadline_seconds=60)
    failures: list[StoreError] = []

    def hang() -> None:
        try:
            uploads.upload(memory_file(10), where, deadline_seconds=60)
        except StoreError as error:
            failures.append(error)

    os.killpg(victim.pid, signal.SIGSTOP)
    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.5)
    uploads.close()
    thread.join(5)
    os.killpg(victim.pid, signal.SIGCONT)
    assert not thread.is_alive()
    assert len(failures) == 1


PARENT = """
import sys, time
from data_pipelines.object_store import ObjectStore
from data_pipelines.upload_process import MemoryFile, UploadProcess
uploads = UploadProcess(ObjectStore())
uploads.upload(MemoryFile(10), sys.argv[1], deadline_seconds=60)
print(uploads._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        child.wait(timeout=10)
