"""The services around the workers die in mid-work: the storage, the coordinator, an exporter."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.export import export_features
from cluster.launch import RunFailedError, launch_training
from cluster.leases import QueueState
from cluster.session import ray_session
from configs.schema import RunConfig
from data_pipelines.feature_store import FeatureManifest
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.feature_export import ExportFailedError
from pretrain.preflight import run_url
from tests.faults.harm import Once, kill_the_coordinator
from tests.published_files import write_run
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
    make_shards(store, shards, split="test", shards=40, rows=120)
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
    assert manifest.rows == 4800


def test_an_export_whose_server_stays_away_says_so_and_goes_on_later(
    victim: LocalS3, tmp_path: Path
) -> None:
    store = ObjectStore(deadline_seconds=4, request_timeout_seconds=2)
    file, shards, out = write_run(tmp_path), "s3://diti/x/many", "s3://diti/x/features"
    make_shards(store, shards, split="test", shards=40, rows=120)

    def export(on_progress: Callable[[QueueState], None]) -> FeatureManifest:
        return export_features(
            store,
            checkpoint_url=str(file),
            shards_url=shards,
            out_url=out,
            num_workers=2,
            on_progress=on_progress,
        )

    away: list[int] = []

    def stop_once(state: QueueState) -> None:
        if not away and state.done:
            victim.stop()
            away.append(state.done)

    with ray_session(num_cpus=2):
        with pytest.raises(ExportFailedError, match=r"did not serve.*run the same command again"):
            export(stop_once)
        victim.restart()
        begun: list[int] = []
        manifest = export(lambda state: begun.append(state.waiting))
    assert away[0] < 40, "everything was done before the server went away"
    assert begun[0] <= 40 - away[0], "what was finished is done again"
    assert manifest.rows == 4800
