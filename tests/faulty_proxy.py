"""A proxy in front of an S3 server: meets a request with a fault, and counts what comes back."""

import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from data_pipelines.local_s3 import LocalS3

_CHUNK_BYTES = 2**20


class FaultyProxy:
    """Forwards to the real server; the first request that matches `on` meets `fault`, once.

    fault: "reset" the connection, answer 503 "SlowDown" or 500, "cut" the answer short, "lose" the
    answer after the server has acted, "replace" it by NoSuchUpload, "freeze" the server in
    the middle of it, or a callable to run before the request goes on.
    """

    def __init__(self, target: LocalS3, on: bytes, fault: str | Callable[[], object]) -> None:
        self._target, self._on, self._fault = target, re.compile(on), fault
        self.faults_met, self.bytes_down = 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target.ports["s3"]))
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """Requests upward; answers come down in a thread that knows what to withhold."""
        withheld: list[str] = []
        down = threading.Thread(target=self._down, args=(server, client, withheld), daemon=True)
        down.start()
        with suppress(OSError):
            while chunk := client.recv(_CHUNK_BYTES):
                if not self.faults_met and self._on.search(chunk):
                    self.faults_met += 1
                    if callable(self._fault):
                        self._fault()
                    elif self._fault in ("cut", "lose", "replace", "freeze"):
                        withheld.append(self._fault)
                    else:
                        client.sendall(ANSWERS[self._fault])
                        break
                server.sendall(chunk)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _down(self, server: socket.socket, client: socket.socket, withheld: list[str]) -> None:
        with suppress(OSError):
            while chunk := server.recv(_CHUNK_BYTES):
                half = chunk[: len(chunk) // 2]
                if withheld == ["freeze"]:
                    if not chunk.startswith(b"HTTP/1.1"):  # past the head, so in the body
                        os.kill(self._target.pid, signal.SIGSTOP)
                        self.bytes_down += len(half)
                        client.sendall(half)
                        return  # and the connection stays open
                elif withheld and not chunk.startswith(b"HTTP/1.1 100"):
                    client.sendall({"cut": half, "lose": b"", "replace": GONE}[withheld[0]])
                    break
                self.bytes_down += len(chunk)
                client.sendall(chunk)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def error_answer(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"{head}\r\nConnection: close\r\n\r\n{body}".encode()


GONE = error_answer("404 Not Found", "NoSuchUpload")
ANSWERS = {
    "reset": b"",
    "SlowDown": error_answer("503 Slow Down", "SlowDown"),
    "InternalError": error_answer("500 Internal Server Error", "InternalError"),
    "TooManyRequests": error_answer("429 Too Many Requests", "TooManyRequests"),
    "conflict": error_answer("409 Conflict", "ConditionalRequestConflict"),
}
