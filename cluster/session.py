"""Joining a Ray cluster, or starting one on this machine for as long as we need it."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

REACH_SECONDS = 10.0
_log = logging.getLogger(__name__)


class ClusterError(RuntimeError):
    """Ray failed us: an actor died for good, a node was lost, the cluster went away."""


@contextmanager
def ray_session(num_cpus: int, num_gpus: int = 0) -> Iterator[None]:
    """Ray for the length of the block; a session that is already there is used and left alone.

    Joins the cluster at RAY_ADDRESS where that is set. A local one is told that this machine has
    `num_cpus` cores: ranks are processes, and two of them must fit on one core too.

    Raises:
        ValueError: this machine has fewer than `num_gpus` GPUs.
        ClusterError: in place of Ray's own errors out of the block.
    """
    started = not ray.is_initialized()
    try:
        if started:
            _start(num_cpus)
        _check_gpus(num_gpus)
        yield
    except KeyboardInterrupt:
        _log.warning("interrupted; ending Ray's processes")
        raise
    except RayError as error:
        raise ClusterError(f"Ray failed: {last_line(error)}") from error
    finally:
        if started:
            ray.shutdown()


@contextmanager
def interrupts_raised(number: signal.Signals) -> Iterator[None]:
    """A signal ends the block as KeyboardInterrupt, and its handler is as before afterwards.

    Ray installs handlers of its own, which call `sys.exit` or abort; ours unwind, and so end what
    was started.
    """
    before = signal.getsignal(number)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, before)


def _start(num_cpus: int) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" not in os.environ:
        # Nobody reads the metrics of a Ray without a dashboard, nor what its log monitor collects,
        # which takes 1.2 % of a core in looking for new files all the time: once a minute will do.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")
    # A local session has a token of its own, and Ray warns about it at every start.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    # "local": without it Ray joins whatever cluster this machine last started, running or dead.
    local = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    where = {} if "RAY_ADDRESS" in os.environ else local
    cores = os.cpu_count() or 1
    if where and num_cpus > cores:
        _log.warning(
            "%d cores are asked for and this machine has %d: they take turns, and starting takes "
            "as many times longer",
            num_cpus,
            cores,
        )
    _check_reachable(os.environ.get("RAY_ADDRESS", ""))
    with interrupts_raised(signal.SIGTERM):
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
        except (ValueError, RayError):
            raise
        except Exception as error:
            ray.shutdown()
            raise ClusterError(
                f"Ray did not start: {last_line(error)}. Is this machine overloaded, or does the "
                f"cluster at RAY_ADDRESS want a token (RAY_AUTH_MODE, RAY_AUTH_TOKEN) that it was "
                f"not given? If neither, run the same command again."
            ) from error


def _check_reachable(address: str) -> None:
    """Ray itself tries an address for minutes, without a word."""
    host, mark, port = address.removeprefix("ray://").rpartition(":")
    if not mark or not port.isdecimal():
        return  # "auto", or one that Ray refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"there is no Ray cluster at RAY_ADDRESS={address} ({error}); correct it, start the "
            f"cluster, or unset RAY_ADDRESS to use this machine"
        ) from error


def _check_gpus(num_gpus: int) -> None:
    found = int(ray.cluster_resources().get("GPU", 0))
    if found >= num_gpus:
        return
    if "RAY_ADDRESS" not in os.environ:
        raise ValueError(
            f"the run wants {num_gpus} GPUs (cluster.use_gpu with cluster.num_workers) and this "
            f"machine has {found}; set cluster.use_gpu=false, or RAY_ADDRESS to a cluster's"
        )
    _log.warning("the cluster has %d GPUs, the run waits for %d", found, num_gpus)


def result_of(reference: Any, *, timeout_seconds: float | None = None) -> Any:
    """`ray.get` that raises what the actor's method raised, not Ray's wrapping of it."""
    try:
        return ray.get(reference, timeout=timeout_seconds)
    except RayTaskError as error:
        raise error.cause from error


def last_line(error: BaseException) -> str:
    """The last line of an error's text: Ray puts whole tracebacks above it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
