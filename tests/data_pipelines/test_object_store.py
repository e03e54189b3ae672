"""The object store: one contract for S3 and local files, and what it does when S3 misbehaves."""

import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import (
    AccessRefusedError,
    AlreadyExistsError,
    BucketMissingError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectStore,
    ObjectTooShortError,
    StoreError,
    StoreUnavailableError,
    join,
)
from tests.faulty_proxy import ANSWERS, FaultyProxy

MIB = 2**20
BUSY_MACHINE = 2.0  # seconds that a loaded CI machine may add
LARGE = np.random.default_rng(0).bytes(20 * MIB)  # two parts of a multipart transfer


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------- the contract, on S3 and on files


@pytest.fixture(params=["s3", "path", "file-url"])
def base(request: pytest.FixtureRequest, s3_url: str, tmp_path: Path) -> str:
    """An empty folder or prefix."""
    folder = tmp_path / "store"
    return {"s3": s3_url, "path": str(folder), "file-url": f"file://{folder}"}[request.param]


def test_what_is_written_is_read_listed_and_gone_after_delete(store: ObjectStore, base: str):
    url = join(base, "deep", "er", "a b+c%20ü#?.bin")
    assert not store.exists(url)
    info = store.write(url, b"hello")
    assert (info.url, info.size_bytes) == (url, 5)
    assert store.read(url) == b"hello"
    assert store.stat(url) == info
    assert store.list(base) == [info]
    store.delete(url)
    store.delete(url)
    assert not store.exists(url)
    assert store.list(base) == []


def test_a_write_replaces_and_an_empty_object_is_an_object(store: ObjectStore, base: str):
    url = join(base, "x")
    store.write(url, b"old and longer")
    store.write(url, b"")
    assert store.read(url) == store.read(url, 0, 0) == b""
    assert store.exists(url)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, None, b"0123456789"), (3, 7, b"3456"), (7, None, b"789"), (9, 10, b"9"), (4, 4, b""),
     (10, 10, b""), (10, None, b"")],
)  # fmt: skip
def test_ranges_are_half_open(store: ObjectStore, base: str, start, end, expected):
    store.write(join(base, "digits"), b"0123456789")
    assert store.read(join(base, "digits"), start, end) == expected


@pytest.mark.parametrize(("start", "end"), [(8, 11), (0, 11), (10, 11), (11, 12), (11, None)])
def test_a_range_beyond_the_end_is_an_error_not_fewer_bytes(store, base, start, end):
    store.write(join(base, "digits"), b"0123456789")
    with pytest.raises(ObjectTooShortError, match="digits"):
        store.read(join(base, "digits"), start, end)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (5, 4)])
def test_a_nonsensical_range_is_a_value_error(store: ObjectStore, base: str, start, end):
    with pytest.raises(ValueError, match="no byte range"):
        store.read(join(base, "digits"), start, end)


def test_list_is_recursive_sorted_fresh_and_ends_at_the_slash(store: ObjectStore, base: str):
    for name in ("b", "a/2", "a/1", "ab", "a/sub/3"):
        store.write(join(base, name), name.encode())
    below_a = [join(base, "a", name) for name in ("1", "2", "sub/3")]
    assert [i.url for i in store.list(base)] == [*below_a, join(base, "ab"), join(base, "b")]
    assert [i.url for i in store.list(join(base, "a") + "/")] == below_a
    ObjectStore().write(join(base, "a", "4"), b"by another client")
    assert join(base, "a", "4") in [i.url for i in store.list(join(base, "a"))]
    assert store.list(join(base, "nothing-here")) == []


def test_delete_prefix_takes_everything_below_and_nothing_beside(store: ObjectStore, base: str):
    for name in ("a/1", "a/sub/2", "ab", "b"):
        store.write(join(base, name), b"x")
    store.delete_prefix(join(base, "a"))
    store.delete_prefix(join(base, "never-was"))
    assert [i.url for i in store.list(base)] == [join(base, "ab"), join(base, "b")]


def test_a_missing_object_is_named_and_is_a_file_not_found_error(store, base, tmp_path: Path):
    url = join(base, "absent")
    for call in (
        lambda: store.read(url),
        lambda: store.stat(url),
        lambda: store.open_for_reading(url),
        lambda: store.download(url, tmp_path / "copy"),
    ):
        with pytest.raises(ObjectMissingError, match=re.escape(url)) as caught:
            call()
        assert isinstance(caught.value, FileNotFoundError)
    assert not (tmp_path / "copy").exists()


def test_a_folder_is_not_an_object(store: ObjectStore, base: str):
    store.write(join(base, "folder", "x"), b"x")
    assert not store.exists(join(base, "folder"))


def test_of_many_writers_if_absent_exactly_one_wins(store: ObjectStore, base: str):
    url = join(base, "lease")
    barrier = threading.Barrier(8)

    def claim(worker: int) -> bool:
        barrier.wait()
        try:
            store.write(url, f"worker {worker}".encode(), only_if_absent=True)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert sum(won) == 1
    winner = f"worker {won.index(True)}".encode()
    assert store.read(url) == winner
    with pytest.raises(AlreadyExistsError, match=re.escape(url)) as caught:
        store.write(url, winner, only_if_absent=True)  # not even the same bytes
    assert isinstance(caught.value, FileExistsError)
    assert [i.url for i in store.list(base)] == [url]


def test_large_files_go_up_and_down_whole(store: ObjectStore, base: str, tmp_path: Path):
    (tmp_path / "original").write_bytes(LARGE)
    info = store.upload(tmp_path / "original", join(base, "large"))
    assert info == store.stat(join(base, "large"))
    assert info.size_bytes == len(LARGE)
    assert store.write(join(base, "again"), LARGE).size_bytes == len(LARGE)
    store.download(join(base, "large"), tmp_path / "new-folder" / "copy")
    assert (tmp_path / "new-folder" / "copy").read_bytes() == LARGE
    assert store.read(join(base, "again"), 16 * MIB - 1, 16 * MIB + 1) == LARGE[16 * MIB - 1 :][:2]
    assert names_in(tmp_path / "new-folder") == ["copy"]


def test_an_opened_object_seeks_like_a_file(store: ObjectStore, base: str):
    store.write(join(base, "digits"), b"0123456789")
    with store.open_for_reading(join(base, "digits")) as file:
        assert file.seekable()
        assert file.read(3) == b"012"
        assert file.seek(-2, io.SEEK_END) == 8
        assert file.read() == b"89"
        assert file.read(5) == b""
        assert file.seek(4) == file.tell() == 4
        buffer = bytearray(3)
        assert file.readinto(buffer) == 3
        assert bytes(buffer) == b"456"


def test_access_check_passes_and_leaves_nothing(store: ObjectStore, base: str):
    store.write(join(base, "x"), b"x")
    store.check_access(base, write=False)
    store.check_access(base, write=True)
    assert len(store.list(base)) == 1


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "http://host/x", "gs://b/k", "file://x", ""]
)
def test_other_schemes_are_refused(store: ObjectStore, url: str):
    with pytest.raises(ValueError, match="use s3://bucket/key, file:///path or a path"):
        store.read(url)


def test_urls_that_name_no_object_and_sweeping_deletes_are_refused(store: ObjectStore):
    for url in ("s3://bucket", "s3://bucket/", "s3://bucket/folder/"):
        with pytest.raises(ValueError, match="an object is needed"):
            store.write(url, b"x")
    with pytest.raises(ValueError, match="names no bucket"):
        store.list("s3://")
    for url in ("s3://bucket", "s3://bucket/", "/", "file:///"):
        with pytest.raises(ValueError, match=r"refuses|refusing"):
            store.delete_prefix(url)


def test_join():
    assert join("s3://b/p/", "/a/", "b/c") == "s3://b/p/a/b/c"
    assert join("/", "tmp") == "/tmp"
    with pytest.raises(ValueError, match="empty part"):
        join("s3://b", "a", "/")


# --------------------------------------------------------------------------------- local files only


def test_a_local_write_that_fails_leaves_the_old_file_and_no_debris(store, tmp_path: Path):
    url = str(tmp_path / "x")
    store.write(url, b"old")
    with pytest.raises(TypeError):
        store.write(url, "not bytes")
    assert store.read(url) == b"old"
    assert names_in(tmp_path) == ["x"]


def test_the_partial_file_of_a_killed_writer_is_not_listed(store: ObjectStore, tmp_path: Path):
    store.write(str(tmp_path / "x"), b"x")
    (tmp_path / ".y.0123.partial").write_bytes(b"half")
    (found,) = store.list(str(tmp_path))
    assert found == store.stat(str(tmp_path / "x"))


def test_operating_system_errors_come_out_as_store_errors(store: ObjectStore, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/below"):
        store.write(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(ObjectMissingError):
        store.check_access(str(tmp_path / "absent"), write=False)


# ----------------------------------------------------------------------------------------- S3 only


def test_more_keys_than_one_page_are_listed_and_deleted(store: ObjectStore, s3_url: str):
    urls = [join(s3_url, f"{number:04}") for number in range(1_003)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda url: store.write(url, b"x"), urls))
    assert [i.url for i in store.list(s3_url)] == urls
    store.delete_prefix(s3_url)
    assert store.list(s3_url) == []


def test_a_replaced_object_has_another_etag_and_ends_an_open_reader(store, s3_url: str):
    url = join(s3_url, "x")
    first = store.write(url, b"first")
    with store.open_for_reading(url) as file:
        assert store.write(url, b"other").etag != first.etag
        with pytest.raises(ObjectChangedError, match="replaced"):
            file.read()


def test_a_missing_bucket_is_told_from_a_missing_object(store: ObjectStore, tmp_path: Path):
    url = "s3://no-such-bucket/x"
    calls: list[Callable[[], object]] = [
        lambda: store.check_access("s3://no-such-bucket/p", write=False),
        lambda: store.exists(url),
        lambda: store.stat(url),
        lambda: store.read(url),
        lambda: store.list("s3://no-such-bucket"),
        lambda: store.write(url, b"x"),
        lambda: store.write(url, b"x", only_if_absent=True),
        lambda: store.delete(url),
        lambda: store.download(url, tmp_path / "x"),
    ]
    started = time.monotonic()
    for call in calls:
        with pytest.raises(BucketMissingError, match="bucket 'no-such-bucket'"):
            call()
    assert time.monotonic() - started < 5.0, "a missing bucket must not be retried"


def test_wrong_or_absent_credentials_are_refused_at_once_and_never_shown(
    s3: LocalS3, s3_url: str, monkeypatch: pytest.MonkeyPatch
):
    started = time.monotonic()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2-hunter2")
    wrong = ObjectStore()
    calls: list[Callable[[], object]] = [
        lambda: wrong.check_access(s3_url, write=False),
        lambda: wrong.exists(join(s3_url, "x")),
        lambda: wrong.read(join(s3_url, "x")),
        lambda: wrong.write(join(s3_url, "x"), b"x"),
        lambda: wrong.list(s3_url),
    ]
    for call in calls:
        with pytest.raises(AccessRefusedError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert isinstance(caught.value, PermissionError)
        assert s3.endpoint_url in str(caught.value)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(AccessRefusedError, match="set AWS_ACCESS_KEY_ID"):
        ObjectStore().check_access(s3_url, write=False)
    assert time.monotonic() - started < 30.0, "a refusal must not be retried: that takes a minute"


def test_an_endpoint_with_a_password_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hunter2@host:1")
    with pytest.raises(ValueError, match="without credentials") as caught:
        ObjectStore().read("s3://b/k")
    assert "hunter2" not in str(caught.value)


def test_a_used_store_can_be_pickled(store: ObjectStore, s3_url: str):
    store.write(join(s3_url, "x"), b"x")
    assert pickle.loads(pickle.dumps(store)).read(join(s3_url, "x")) == b"x"


def test_a_used_store_works_in_a_forked_child_and_after_it(store: ObjectStore, s3_url: str):
    url = join(s3_url, "x")
    store.write(url, b"x" * MIB)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        answers.put(len(store.read(url)))
        store.write(join(s3_url, "from-child"), b"y")

    process = context.Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert answers.get() == MIB
    assert store.read(join(s3_url, "from-child")) == b"y"


def test_many_threads_share_one_store(s3: LocalS3, s3_url: str):
    store = ObjectStore()  # unused: its client is made by sixteen threads at once

    def work(worker: int) -> bool:
        payload = bytes([worker]) * (1000 + worker)
        url = join(s3_url, str(worker))
        store.write(url, payload)
        return all(store.read(url, 1, 900 + n) == payload[1 : 900 + n] for n in range(20))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    assert len(store.list(s3_url)) == 16


# ------------------------------------------------------------------ S3 behind a network that fails


Behind = Callable[[bytes, str | Callable[[], object]], tuple[ObjectStore, FaultyProxy]]


@pytest.fixture
def behind(s3: LocalS3) -> Iterator[Behind]:
    """A function (which request, which fault) -> store that meets it, and the proxy between."""
    proxies = []

    def make(on: bytes, fault: str | Callable[[], object]) -> tuple[ObjectStore, FaultyProxy]:
        proxies.append(FaultyProxy(s3, on, fault))
        return ObjectStore(endpoint_url=proxies[-1].url, deadline_seconds=20.0), proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize("fault", [*ANSWERS, "cut", "lose"])
def test_a_transient_fault_is_not_noticed_by_the_caller(behind, store, s3_url, fault: str):
    payload = LARGE[:MIB]
    store.write(join(s3_url, "x"), payload)
    for verb, call in {
        b"GET .*x": lambda s: s.read(join(s3_url, "x")) == payload,
        b"Range: bytes": lambda s: s.read(join(s3_url, "x"), 7, 900_000) == payload[7:900_000],
        b"HEAD ": lambda s: s.exists(join(s3_url, "x")),
        b"list-type": lambda s: len(s.list(s3_url)) == 1,
        b"PUT ": lambda s: s.write(join(s3_url, "x"), payload).size_bytes == len(payload),
    }.items():
        flaky, proxy = behind(verb, fault)
        assert call(flaky), verb
        assert proxy.faults_met == 1, verb


def test_a_transient_fault_in_a_large_transfer_repeats_only_its_part(
    behind, s3_url: str, tmp_path: Path
):
    (tmp_path / "original").write_bytes(LARGE)
    up, proxy = behind(b"partNumber=2", "lose")
    up.upload(tmp_path / "original", join(s3_url, "large"))
    down, other = behind(b"bytes=16777216-", "cut")
    down.download(join(s3_url, "large"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert (proxy.faults_met, other.faults_met) == (1, 1)
    assert other.bytes_down < 1.5 * len(LARGE)


@pytest.mark.parametrize("fault", ["lose", "replace"])
def test_a_lost_answer_to_the_completion_of_an_upload_is_no_failure(
    behind, s3_url: str, tmp_path: Path, fault: str
):
    (tmp_path / "original").write_bytes(LARGE)
    flaky, proxy = behind(rb"POST \S+uploadId=", fault)
    assert flaky.upload(tmp_path / "original", join(s3_url, "large")).size_bytes == len(LARGE)
    assert proxy.faults_met == 1


def test_a_lost_answer_to_a_write_if_absent_does_not_lose_the_race_to_itself(behind, s3_url: str):
    url = join(s3_url, "lease")
    flaky, proxy = behind(b"PUT ", "lose")
    assert flaky.write(url, b"mine", only_if_absent=True).size_bytes == 4
    assert proxy.faults_met == 1
    rival, proxy = behind(b"PUT ", "lose")
    with pytest.raises(AlreadyExistsError):
        rival.write(url, b"theirs", only_if_absent=True)
    assert proxy.faults_met == 1
    assert rival.read(url) == b"mine"


def test_an_object_replaced_during_its_download_leaves_no_mixture(
    behind, store: ObjectStore, s3_url: str, tmp_path: Path
):
    url = join(s3_url, "large")
    store.write(url, LARGE)
    racing, proxy = behind(b"bytes=16777216-", lambda: store.write(url, LARGE[::-1]))
    with pytest.raises(ObjectChangedError, match="large was replaced"):
        racing.download(url, tmp_path / "copy")
    assert proxy.faults_met == 1
    assert names_in(tmp_path) == []


def test_a_parquet_column_costs_its_own_bytes_only(behind, s3_url: str):
    columns = {name: np.random.default_rng(n).random(200_000) for n, name in enumerate("abcd")}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="none", use_dictionary=False)
    store, proxy = behind(b"never", "reset")
    store.write(join(s3_url, "x.parquet"), sink.getvalue())
    with store.open_for_reading(join(s3_url, "x.parquet")) as file:
        table = pq.read_table(file, columns=["c"], pre_buffer=False)
    assert np.array_equal(table["c"].to_numpy(), columns["c"])
    assert 1.6e6 <= proxy.bytes_down < 1.9e6


# --------------------------------------------------------------------- S3 that hangs, dies, returns


def test_a_hung_server_ends_every_call_by_the_deadline_plus_one_timeout(
    victim: LocalS3, tmp_path: Path
):
    store = ObjectStore(deadline_seconds=1.5, request_timeout_seconds=0.7)
    store.write("s3://diti/x", LARGE)
    calls: list[Callable[[], object]] = [
        lambda: store.read("s3://diti/x"),
        lambda: store.stat("s3://diti/x"),
        lambda: store.list("s3://diti"),
        lambda: store.write("s3://diti/y", b"y"),
        lambda: store.write("s3://diti/y", b"y", only_if_absent=True),
        lambda: store.write("s3://diti/y", LARGE),
        lambda: store.download("s3://diti/x", tmp_path / "x"),
        lambda: store.check_access("s3://diti", write=True),
    ]

    def seconds_until_error(call: Callable[[], object]) -> float:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"in \d\.\d s and [2-9] attempts") as caught:
            call()
        assert isinstance(caught.value, StoreUnavailableError)
        return time.monotonic() - started

    os.kill(victim.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(len(calls)) as pool:
        took = list(pool.map(seconds_until_error, calls))
    assert min(took) >= 1.5
    assert max(took) < 1.5 + 0.7 + BUSY_MACHINE
    assert not (tmp_path / "x").exists()
    os.kill(victim.pid, signal.SIGCONT)
    assert ObjectStore().read("s3://diti/x") == LARGE


def test_a_server_that_hangs_in_mid_body_is_noticed(victim: LocalS3):
    ObjectStore().write("s3://diti/x", LARGE)
    proxy = FaultyProxy(victim, b"GET /diti/x", "freeze")
    store = ObjectStore(endpoint_url=proxy.url, deadline_seconds=1.0, request_timeout_seconds=0.7)
    store.check_access("s3://diti", write=False)
    before = proxy.bytes_down
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        store.read("s3://diti/x")
    assert time.monotonic() - started < 1.0 + 0.7 + BUSY_MACHINE
    assert before < proxy.bytes_down < len(LARGE)
    proxy.close()


def test_a_server_killed_and_restarted_within_the_deadline_is_not_noticed(
    victim: LocalS3, tmp_path: Path
):
    store = ObjectStore(deadline_seconds=30.0, request_timeout_seconds=2.0)
    store.write("s3://diti/x", LARGE)
    returned: list[LocalS3] = []

    def outage() -> None:
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(1.0)
        returned.append(victim.restart())

    threading.Timer(0.05, outage).start()
    while not returned:
        store.download("s3://diti/x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == LARGE
    returned[0].stop()


def test_a_dead_server_is_one_clear_error(victim: LocalS3):
    store = ObjectStore(deadline_seconds=1.0, request_timeout_seconds=1.0)
    store.check_access("s3://diti", write=False)
    victim.stop()
    with pytest.raises(StoreUnavailableError) as caught:
        store.check_access("s3://diti/runs", write=True)
    message = str(caught.value)
    for part in (victim.endpoint_url, "s3://diti/runs", "attempts", "1 s", "Could not connect"):
        assert part in message
    everything = "".join(traceback.format_exception(caught.value))
    assert victim.secret_key not in everything
    with pytest.raises(StoreUnavailableError):
        store.exists("s3://diti/x")


def test_a_local_copy_is_the_file_itself_or_lasts_as_long_as_the_block(
    store: ObjectStore, s3_url: str, tmp_path: Path
):
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x", join(s3_url, "x")):
        store.write(url, b"content")
        with store.local_copy(url) as path:
            assert path.read_bytes() == b"content"
        assert path.exists() == (path == tmp_path / "x") == (not url.startswith("s3://"))
    with pytest.raises(ObjectMissingError), store.local_copy(join(s3_url, "none")):
        pass


def test_a_dangling_link_hides_nothing_of_its_folder(tmp_path: Path):
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here.tar").write_bytes(b"abc")
    assert [info.url for info in ObjectStore().list(str(tmp_path))] == [str(tmp_path / "here.tar")]
