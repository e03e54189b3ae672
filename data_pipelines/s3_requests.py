"""Requests to S3: single attempts, retried until a deadline, with failures in the store's words.

The only importer of s3fs. Its own retries nest, know no deadline and outlast a hung server by
minutes, so they are switched off; here one loop with full-jitter backoff decides. Whatever the
server or the network does, a call ends within `deadline_seconds` plus one request timeout
(and a second), with a result or with a `StoreError`. No message contains a credential.
"""

import asyncio
import itertools
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError
from s3fs import S3FileSystem

from data_pipelines.store_errors import (
    AccessRefusedError,
    AlreadyExistsError,
    BucketMissingError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectTooShortError,
    StoreError,
    StoreUnavailableError,
    too_short,
)

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 5.0
_SETUP_SECONDS = 60.0
_SLOWEST_SENDING = 2**19  # bytes a second
_SLOWEST_FETCHING = 2**16
_REFUSAL_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # AWS: with status 400
_RETRIED_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest"}
_FAILURES = (OSError, TimeoutError, aiohttp.ClientError, boto.BotoCoreError, ResponseParserError)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
)
_RETRIED_BOTO_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
)


def bucket_and_key(url: str) -> tuple[str, str]:
    """The parts of an s3:// URL; the key may be empty. Raises ValueError without a bucket."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if "@" in bucket:  # what stands before it would be a password
        raise ValueError(
            f"the URL s3://***@{bucket.rpartition('@')[2]}/{key} must not hold credentials: set "
            f"the AWS_* variables instead"
        )
    if not bucket:
        raise ValueError(f"{url!r} names no bucket: use s3://bucket/key")
    return bucket, key


def object_of(url: str) -> dict[str, Any]:
    """Bucket and Key of an object. Raises ValueError where `url` names a bucket or a folder."""
    bucket, key = bucket_and_key(url)
    if not key or key.endswith("/"):
        raise ValueError(f"{url!r} names a bucket or a folder where an object is needed")
    return {"Bucket": bucket, "Key": key}


@dataclass(frozen=True, slots=True)
class S3Requests:
    """Runs requests; thread-safe, picklable, and with a client of its own in each process."""

    endpoint_url: str | None
    deadline_seconds: float
    request_timeout_seconds: float
    _clients: dict[int, S3FileSystem] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.endpoint_url, self.deadline_seconds, self.request_timeout_seconds)
        return S3Requests, settings

    def call(self, url: str, method: str, **query: Any) -> dict[str, Any]:
        """One S3 API method on `url`; the answer as botocore gives it. Raises StoreError."""
        limit = math.inf
        if "Body" in query:  # the client's timeouts cover waiting for an answer, but not sending
            sending = len(query["Body"]) / _SLOWEST_SENDING
            limit = self.request_timeout_seconds + sending
        return self._run(url, limit, lambda s3: s3._call_s3(method, **query))

    def call_once(self, method: str, **query: Any) -> None:
        """One attempt at an S3 API method for the sake of tidiness: a failure does not matter."""
        with suppress(*_FAILURES):
            s3 = self._client()
            _wait_for(s3, s3._call_s3(method, **query), self.request_timeout_seconds)

    def get(self, url: str, start: int, end: int | None, etag: str = "") -> bytes:
        """The bytes [start, end) of an object (`end` None: all), of the version `etag` if given.

        Raises ObjectTooShortError, ObjectChangedError. An answer cut short is tried again.
        """
        query = object_of(url)
        if end is not None:
            query["Range"] = f"bytes={start}-{end - 1}"
        if etag:
            query["IfMatch"] = etag

        async def get(s3: S3FileSystem) -> bytes:
            answer = await s3._call_s3("get_object", **query)
            async with answer["Body"] as body:
                data = await body.read()
            size_bytes = int(answer.get("ContentRange", "/-1").rpartition("/")[2])
            if end is not None and 0 <= size_bytes < end:
                raise too_short(url, start, end, size_bytes)
            expected = answer["ContentLength"] if end is None else end - start
            if len(data) != expected:
                raise ConnectionError(f"{len(data)} of {expected} bytes arrived")
            return data

        limit = math.inf
        if end is not None:  # the client's timeout is for silence, not for a trickle
            limit = self.request_timeout_seconds + (end - start) / _SLOWEST_FETCHING
        return self._run(url, limit, get)

    def put_if_absent(self, url: str, data: bytes) -> dict[str, Any]:
        """Store a new object; AlreadyExistsError when there is one that this call did not write.

        A lost answer makes the repeated request (aiohttp repeats some by itself) find our own
        object in the way, so the object carries a token that tells whose it is.
        """
        token = {"diti-writer": uuid.uuid4().hex}
        query = {**object_of(url), "Body": data, "Metadata": token, "IfNoneMatch": "*"}
        try:
            return self.call(url, "put_object", **query)
        except AlreadyExistsError:
            found: dict[str, Any] = {}
            with suppress(ObjectMissingError):  # somebody's object, deleted since
                found = self.call(url, "head_object", **object_of(url))
            if found.get("Metadata") != token:
                raise
            return found

    def require_bucket(self, url: str) -> None:
        """Raise BucketMissingError unless the bucket of `url` exists.

        The answer to a HEAD of an object has no body that could say which of the two is missing.
        """
        try:
            self.call(url, "head_bucket", Bucket=bucket_and_key(url)[0])
        except AccessRefusedError:
            return  # so it is there
        except ObjectMissingError:
            raise _bucket_missing(url, _name_of_endpoint(self._client())) from None

    def _run(
        self,
        url: str,
        limit_seconds: float,
        attempt: Callable[[S3FileSystem], Coroutine[Any, Any, T]],
    ) -> T:
        """Repeat `attempt` until it succeeds, fails for good, or the deadline has passed."""
        s3 = self._client()
        endpoint = _name_of_endpoint(s3)
        started = time.monotonic()
        for attempts in itertools.count(1):
            left = self.deadline_seconds - (time.monotonic() - started)
            try:
                patience = min(limit_seconds, max(left, self.request_timeout_seconds))
                return _wait_for(s3, attempt(s3), patience)
            except StoreError:
                raise
            except _FAILURES as error:
                if (final := _final_error(error, url, endpoint)) is not None:
                    raise final from error
                cause = error
            elapsed = time.monotonic() - started
            if elapsed >= self.deadline_seconds:
                raise StoreUnavailableError(
                    f"{endpoint} did not serve {url} in {elapsed:.1f} s and {attempts} "
                    f"attempts (deadline {self.deadline_seconds:g} s); the last one failed with "
                    f"{type(cause).__name__}: {cause}. Is the server running and reachable?"
                ) from cause
            ceiling = min(_MAX_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempts)
            pause = random.uniform(0, ceiling)  # noqa: S311 - spreads clients, guards no secret
            time.sleep(min(pause, self.deadline_seconds - elapsed))
        raise AssertionError("itertools.count does not end")

    def _client(self) -> S3FileSystem:
        """This process's client; a forked child must not use its parent's loop and sockets.

        It is complete when returned: that takes 0.3 s which no attempt should pay for.
        """
        pid = os.getpid()
        if pid not in self._clients:
            new = _new_client(_checked_endpoint(self.endpoint_url), self.request_timeout_seconds)
            self._clients.setdefault(pid, new)  # atomic; a lock could be forked while it is held
        s3 = self._clients[pid]
        if s3._s3 is None:
            try:
                _wait_for(s3, s3.set_session(), _SETUP_SECONDS)
            except (boto.BotoCoreError, TimeoutError) as error:
                raise StoreError(f"no S3 client: {type(error).__name__}: {error}") from error
        return s3


def _new_client(endpoint_url: str | None, timeout_seconds: float) -> S3FileSystem:
    client = S3FileSystem(
        endpoint_url=endpoint_url,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": timeout_seconds,
            "read_timeout": timeout_seconds,
            "retries": {"max_attempts": 0},
            "max_pool_connections": 64,
        },
    )
    client.retries = 1
    return client


def _wait_for(s3: S3FileSystem, result: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
    """Run `result` on s3fs's event loop; TimeoutError, and no more work, after the timeout."""
    assert s3.loop is not None
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(result, timeout_seconds), s3.loop)
    try:
        # One second more: a coroutine may ignore its cancellation, or the loop be stuck.
        return future.result(timeout_seconds + 1.0)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer in {timeout_seconds:.1f} s") from error
    finally:
        future.cancel()


def _name_of_endpoint(s3: S3FileSystem) -> str:
    return s3.endpoint_url or "AWS S3"


def _checked_endpoint(given: str | None) -> str | None:
    endpoint = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and (not endpoint.startswith(("http://", "https://")) or "@" in endpoint):
        shown = endpoint.rpartition("@")[2]  # what stands before it would be a password
        raise ValueError(
            f"the S3 endpoint {shown!r} must be http(s)://host:port without credentials: check "
            "AWS_ENDPOINT_URL"
        )
    return endpoint or None


def _bucket_missing(url: str, endpoint: str) -> BucketMissingError:
    return BucketMissingError(
        f"the bucket {bucket_and_key(url)[0]!r} of {url} does not exist at {endpoint}: create it, "
        "or check the URL and AWS_ENDPOINT_URL"
    )


def _final_error(error: Exception, url: str, endpoint: str) -> Exception | None:
    """What to raise for a failed attempt, or None where another one can succeed."""
    answer = getattr(error.__cause__, "response", None)  # s3fs keeps botocore's error as the cause
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        operation = getattr(error.__cause__, "operation_name", "")
        return _refusal(url, endpoint, status, answer["Error"].get("Code", ""), operation)
    if isinstance(error, _NO_CREDENTIALS):
        return AccessRefusedError(
            f"no complete S3 credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, boto.ParamValidationError):
        return ValueError(f"{url} is no valid S3 URL: {error}")
    if isinstance(error, boto.BotoCoreError) and not isinstance(error, _RETRIED_BOTO_ERRORS):
        return StoreError(f"{url} at {endpoint}: {type(error).__name__}: {error}")
    return None


def _refusal(url: str, endpoint: str, status: int, code: str, operation: str) -> StoreError | None:
    """The server's error answer in our words, or None where it asks for another attempt."""
    said = f"{endpoint} answered {operation} with {status} {code}"
    if status in (401, 403) or code in _REFUSAL_CODES:
        return AccessRefusedError(
            f"access to {url} refused ({said}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN and their rights on the bucket"
        )
    if code == "NoSuchBucket":
        return _bucket_missing(url, endpoint)
    if status == 404:
        return ObjectMissingError(f"{url} does not exist ({said}): check the URL")
    if status == 412 and operation == "GetObject":
        return ObjectChangedError(f"{url} was replaced while it was being read ({said})")
    if status == 412:
        return AlreadyExistsError(f"{url} exists already ({said})")
    if status == 416:
        return ObjectTooShortError(f"{url} ends before the range that was asked for ({said})")
    if code in _RETRIED_CODES or status in (408, 409, 429) or (status >= 500 and status != 501):
        return None
    return StoreError(f"{url}: {said}")
