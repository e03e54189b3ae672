"""Joining a Ray cluster, or starting one on this machine for as long as we need it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def ray_session(num_cpus: int) -> Iterator[None]:
    """Ray for the length of the block; a session that is already there is used and left alone.

    Joins the cluster at RAY_ADDRESS where that is set. A local one is told that this machine has
    `num_cpus` cores: ranks are processes, and two of them must fit on one core too.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def result_of(reference: Any, *, timeout_seconds: float | None = None) -> Any:
    """`ray.get`, whose own annotations do not know what an actor's method returns."""
    return ray.get(reference, timeout=timeout_seconds)
