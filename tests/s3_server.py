"""A real S3 server for tests, and the variables that its clients read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipelines.local_s3 import LocalS3, local_s3


@contextmanager
def s3_in_environment(folder: Path) -> Iterator[LocalS3]:
    """While it runs, the AWS_* variables are its own."""
    with local_s3(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
