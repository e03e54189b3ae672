"""The cluster changes under a run: a node dies, a node is about to be taken away, storage goes."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from cluster.launch import RunFailedError, RunStoppedError, launch_training
from configs.schema import RunConfig
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import run_url
from pretrain.progress import Progress
from pretrain.train import run
from tests.faults.harm import Once, ray_nodes
from tests.tiny_run import make_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
STORE = ObjectStore()


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with ray_nodes(2) as cluster:
        yield cluster


def losses(config: RunConfig) -> list[float]:
    manifest = checkpoint.find(STORE, run_url(config), None)
    return [line["loss"] for line in checkpoint.read_metrics(STORE, run_url(config), manifest)]


def world_sizes(config: RunConfig) -> list[int]:
    manifest = checkpoint.find(STORE, run_url(config), None)
    return [each.world_size for each in checkpoint.lineage(STORE, run_url(config), manifest)]


def test_a_run_that_loses_a_node_goes_on_with_fewer_workers_on_the_same_curve(
    nodes: Cluster, tmp_path: Path
) -> None:
    elastic = ("train.total_images=1280", "cluster.min_workers=1")
    config = make_run(STORE, str(tmp_path), *elastic)
    harm = Once(lambda: nodes.remove_node(next(iter(nodes.worker_nodes))))
    launch_training(config, local_dir=tmp_path / "local", on_progress=harm)
    assert harm.done_at is not None
    sizes = world_sizes(config)
    assert (sizes[0], sizes[-1]) == (2, 1)
    manifest = checkpoint.find(STORE, run_url(config), None)
    samples = checkpoint.read_samples(STORE, run_url(config), manifest)
    assert [position for position, _ in samples] == list(range(1280))

    alone = make_run(STORE, str(tmp_path), *elastic, "name=alone", "cluster.num_workers=1")
    launch_training(alone, local_dir=tmp_path / "local-alone")
    assert losses(config)[:20] == pytest.approx(losses(alone)[:20], rel=1e-5)
    assert losses(config) == pytest.approx(losses(alone), rel=1e-3)


def test_a_node_that_will_be_taken_away_makes_the_run_publish_at_once(
    nodes: Cluster, tmp_path: Path
) -> None:
    config = make_run(
        STORE,
        str(tmp_path),
        "train.total_images=64000",
        "train.checkpoint_every_images=6400",
        "cluster.min_workers=1",
    )
    node = next(iter(nodes.worker_nodes))

    def give_notice() -> None:
        client = GcsClient(address=nodes.address)
        accepted, reason = client.drain_node(
            node.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot",
            int(1e3 * (time.time() + 60)),
        )
        assert accepted, reason

    harm = Once(give_notice, past=0)
    stopper = threading.Event()

    def watch(ranks: Mapping[int, Progress]) -> None:
        harm(ranks)
        steps = checkpoint.complete_steps(STORE, run_url(config))
        if len(steps) > 1 and not stopper.is_set():
            stopper.set()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match="was asked to stop"):
        launch_training(config, local_dir=tmp_path / "local", on_progress=watch)
    first = checkpoint.complete_steps(STORE, run_url(config))[1]
    assert harm.done_at is not None
    assert harm.done_at <= first < 200, "well before the regular one"


def test_a_worker_that_stops_stepping_is_named_and_fails_the_run_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped, not killed: nothing tells Ray; only the other worker waits, in a collective."""
    config = make_run(
        STORE,
        str(tmp_path),
        "train.total_images=640000",
        "cluster.stall_seconds=24",
        "cluster.max_failures=0",
    )
    frozen: list[Progress] = []

    def freeze(ranks: Mapping[int, Progress]) -> None:
        if not frozen and len(ranks) == 2 and ranks[1].step > 3:
            frozen.append(ranks[1])
            os.kill(ranks[1].pid, signal.SIGSTOP)

    start = time.monotonic()
    with pytest.raises(RunFailedError) as told:
        launch_training(config, local_dir=tmp_path / "local", on_progress=freeze)
    [victim] = frozen
    assert time.monotonic() - start < 180
    assert f"rank 1 (pid {victim.pid} on " in str(told.value)
    assert "no sign of life" in str(told.value)
    assert "the run has stalled: rank 1" in caplog.text


def test_a_run_that_diverges_ends_at_once_and_is_not_tried_again(tmp_path: Path) -> None:
    config = make_run(STORE, str(tmp_path), "optimizer.learning_rate=1e30")
    assert config.cluster.max_failures > 0
    pids: set[int] = set()
    with pytest.raises(RunFailedError, match=r"at step \d+, first on rank \d; its samples"):
        launch_training(
            config,
            local_dir=tmp_path / "local",
            on_progress=lambda ranks: pids.update(rank.pid for rank in ranks.values()),
        )
    assert len(pids) <= 2, "the workers were started once"
    attempts = [info.url for info in STORE.list(run_url(config)) if "/parts-" in info.url]
    assert len({url.partition("/parts-")[2][:8] for url in attempts}) == 1


def test_a_checkpoint_that_storage_does_not_take_is_given_up_and_the_next_has_it_all(
    victim: LocalS3, tmp_path: Path, world: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Data lie on a disk, so only publishing notices."""
    patience = ("store.deadline_seconds=1", "store.request_timeout_seconds=1")
    length = ("train.total_images=640", "cluster.num_workers=1")
    config = make_run(STORE, str(tmp_path), *patience, *length, "output=s3://diti/runs")

    def report(progress: Progress) -> None:
        if progress.step == 5:
            victim.stop()
        if progress.step == 10:
            victim.restart()

    manifest = run(config, local_dir=tmp_path, report=report)
    assert "the run goes on, the next checkpoint has it all" in caplog.text
    store = ObjectStore()
    steps = checkpoint.complete_steps(store, run_url(config))
    assert len(steps) < 11
    samples = checkpoint.read_samples(store, run_url(config), manifest)
    assert [position for position, _ in samples] == list(range(640))
    metrics = checkpoint.read_metrics(store, run_url(config), manifest)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    undisturbed = make_run(STORE, str(tmp_path), *length, "name=undisturbed")
    end = run(undisturbed, local_dir=tmp_path)
    ends = [
        checkpoint.read_tensors(*of, ema=False)
        for of in ((store, run_url(config), manifest), (STORE, run_url(undisturbed), end))
    ]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
