"""An export whose workers and driver are killed in turn ends in the bytes of one that was not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.export import export_features
from cluster.features import verify_features
from cluster.session import ray_session
from data_pipelines.feature_store import COMMITS, open_features
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from tests.published_files import write_run
from tests.tiny_run import make_shards
from tools.benchmarks.export import exporters

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SHARDS, ROWS = 60, 60


def until(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def content(store: ObjectStore, url: str) -> dict[str, bytes]:
    return {info.url.removeprefix(url): store.read(info.url) for info in store.list(url)}


def test_kills_of_workers_and_driver_leave_no_trace(victim: LocalS3, tmp_path: Path) -> None:
    store, file = ObjectStore(), write_run(tmp_path)
    shards, out = "s3://diti/set", "s3://diti/killed"
    make_shards(store, shards, split="test", shards=SHARDS, rows=ROWS)
    command = [sys.executable, "-m", "tools", "export", "--checkpoint", str(file)]
    command += ["--shards", shards, "--out", out, "--workers", "2"]

    def commits() -> int:
        return len(store.list(join(out, COMMITS)))

    driver = subprocess.Popen(command, start_new_session=True)
    killed: list[int] = []
    for after in (4, 12):
        until(lambda after=after: commits() >= after and len(exporters(driver.pid)) == 2)
        [first, *_] = [p for p in exporters(driver.pid) if p.pid not in killed]
        killed.append(first.pid)
        os.kill(first.pid, signal.SIGKILL)
    until(lambda: commits() >= 20)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    left = commits()
    assert left < SHARDS, "everything was done before the driver was killed"
    assert not store.exists(join(out, "manifest.json"))

    parts_before = {info.url: info.etag for info in store.list(join(out, "set"))}
    assert subprocess.run(command, check=False).returncode == 0
    after = {info.url: info.etag for info in store.list(join(out, "set"))}
    assert parts_before.items() <= after.items(), "a finished part was written again"

    with ray_session(num_cpus=2):
        assert verify_features(store, out, num_workers=2).problems == []
        undisturbed = "s3://diti/undisturbed"
        export_features(
            store,
            checkpoint_url=str(file),
            shards_url=shards,
            out_url=undisturbed,
            num_workers=2,
        )
    assert content(store, out) == content(store, undisturbed)
    features = open_features(out).arrays()
    places = list(zip(features.shards, features.rows.tolist(), strict=True))
    assert places == [(f"{n:05d}.tar", row) for n in range(SHARDS) for row in range(ROWS)]
