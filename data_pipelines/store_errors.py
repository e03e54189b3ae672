"""The words in which object storage reports: what an object is, and the ways a call can fail.

Every failure is a `StoreError`; each subclass is also the built-in exception that Python itself
raises for the same thing on a local file, so callers can catch either.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object; `etag` differs once it was written again (local files: the time of that)."""

    url: str
    size_bytes: int
    etag: str


class StoreError(OSError):
    """A call to the store failed for good; the subclasses say why."""


class ObjectMissingError(StoreError, FileNotFoundError):
    """No object has this URL."""


class BucketMissingError(ObjectMissingError):
    """The bucket itself does not exist: a wrong setting rather than an absent object."""


class ObjectTooShortError(StoreError, EOFError):
    """The object ends before the requested range does."""


class ObjectChangedError(StoreError):
    """Another version of the object appeared while it was being read."""


class AlreadyExistsError(StoreError, FileExistsError):
    """A write with `only_if_absent` found an object."""


class AccessRefusedError(StoreError, PermissionError):
    """The store does not accept the credentials, or they lack the right."""


class StoreUnavailableError(StoreError, TimeoutError):
    """The store did not answer within the deadline."""


def too_short(url: str, start: int, end: int | None, size_bytes: int) -> ObjectTooShortError:
    """The error for the range [start, end) of an object of `size_bytes`."""
    wanted = f"[{start}, {'end' if end is None else end})"
    return ObjectTooShortError(
        f"{url} has {size_bytes} bytes and no range {wanted}: was it truncated or replaced?"
    )
