"""Fixtures of the whole suite: one real S3 server, and a fresh prefix on it for each test."""

import os

# Before torch: on tiny tensors a second OpenMP thread only spins, and on a busy machine that costs
# minutes. What tests start inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from pretrain.world import World, join_world
from tests.s3_server import s3_in_environment


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A running server; its AWS_* variables are set for the session. Tests must not stop it."""
    with s3_in_environment(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[LocalS3]:
    """A server of the test's own, to be mistreated; its AWS_* variables are set."""
    with s3_in_environment(tmp_path / "victim") as server:
        yield server


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process alone, as one rank. DeepSpeed keeps its group, so there is one for all tests."""
    yield join_world()
    dist.destroy_process_group()


@pytest.fixture
def store(s3: LocalS3) -> ObjectStore:
    """An object store with default settings, on the session's server."""
    return ObjectStore()


@pytest.fixture
def s3_url(s3: LocalS3, request: pytest.FixtureRequest) -> str:
    """An empty prefix of this test's own, such as s3://diti/test_x-1f0c."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", request.node.name)
    return join(f"s3://{s3.bucket}", f"{name}-{uuid.uuid4().hex[:12]}")
