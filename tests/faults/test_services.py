"""The services around the workers die in mid-work: the storage, the coordinator, an exporter."""

import os
import signal
import threading
from pathlib import Path

import pytest

from cluster.export import export_features
from cluster.launch import RunFailedError, launch_training
from cluster.session import ray_session
from configs.schema import RunConfig
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.preflight import run_url
from tests.faults.harm import Once, kill_the_coordinator
from tests.tiny_run import make_run, make_shards
from tools.benchmarks.export import exporters

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def trained_on(store: ObjectStore, run: RunConfig) -> list[int]:
    manifest = checkpoint.find(store, run_url(run), None)
    return [position for position, _ in checkpoint.read_samples(store, run_url(run), manifest)]


def test_a_server_that_comes_back_costs_nothing(victim: LocalS3, tmp_path: Path) -> None:
    store = ObjectStore()
    run = make_run(store, "s3://diti/x", "train.total_images=1280")

    def out_for_five_seconds() -> None:
        victim.stop()
        threading.Timer(5, victim.restart).start()

    harm = Once(out_for_five_seconds)
    with ray_session(num_cpus=2):
        launch_training(run, local_dir=tmp_path / "local", on_progress=harm)
    assert harm.done_at is not None
    assert trained_on(store, run) == list(range(1280))


def test_a_server_that_stays_away_fails_the_run_and_the_same_command_goes_on(
    victim: LocalS3, tmp_path: Path
) -> None:
    store = ObjectStore()
    run = make_run(
        store,
        "s3://diti/x",
        "train.total_images=1280",
        "cluster.max_failures=0",
        "store.deadline_seconds=4",
        "store.request_timeout_seconds=2",
    )
    harm = Once(victim.stop)
    with ray_session(num_cpus=2):
        with pytest.raises(RunFailedError, match="did not serve") as failed:
            launch_training(run, local_dir=tmp_path / "local", on_progress=harm)
        assert len(str(failed.value).splitlines()) == 1
        victim.restart()
        launch_training(run, local_dir=tmp_path / "local")
    assert trained_on(store, run) == list(range(1280))


def test_a_dead_coordinator_is_rebuilt(victim: LocalS3, tmp_path: Path) -> None:
    store = ObjectStore()
    run = make_run(store, "s3://diti/x", "train.total_images=1280")

    harm = Once(kill_the_coordinator)
    with ray_session(num_cpus=2):
        launch_training(run, local_dir=tmp_path / "local", on_progress=harm)
    assert harm.done_at is not None
    assert trained_on(store, run) == list(range(1280))


def test_a_killed_exporter_is_replaced(victim: LocalS3, tmp_path: Path) -> None:
    store = ObjectStore()
    run = make_run(store, "s3://diti/x", "train.total_images=32", "cluster.num_workers=1")
    shards = "s3://diti/x/many"
    make_shards(store, shards, split="test", shards=40, rows=16)
    killed: list[int] = []

    def kill_one(state) -> None:
        running = exporters(os.getpid())
        if not killed and running and state.done >= 1:
            killed.append(running[0].pid)
            os.kill(running[0].pid, signal.SIGKILL)

    with ray_session(num_cpus=2):
        launch_training(run, local_dir=tmp_path / "local")
        manifest = export_features(
            store,
            run_url=run_url(run),
            step=None,
            shards_url=shards,
            out_url=join("s3://diti/x", "features"),
            num_workers=2,
            on_progress=kill_one,
        )
    assert killed
    assert manifest.rows == 640
