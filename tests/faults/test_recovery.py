"""Whatever dies, the weights at the end are those of an undisturbed run, to the last bit.

Each fault prints what it cost (`pytest -rP` shows it): seconds from the harm until a step was done
that had not been done before, and images that were computed twice.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster

from cluster.launch import RunStoppedError, launch_training
from configs.schema import RunConfig
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import run_url
from pretrain.progress import Progress
from tests.faults.harm import kill_the_coordinator, ray_nodes
from tests.s3_server import s3_in_environment
from tests.tiny_run import make_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
CHECKPOINT_STEPS = 20
SETTINGS = (
    "train.total_images=3200",  # 100 steps
    f"train.checkpoint_every_images={32 * CHECKPOINT_STEPS}",
    "output=s3://diti/runs",  # shards lie on the disk: only publishing meets the server
)
Ranks = Mapping[int, Progress]


class Watcher:
    """Does harm between two checkpoints, and measures what it cost."""

    def __init__(self, harm: Callable[[Ranks], None]) -> None:
        self.harm = harm
        self.pids: set[int] = set()
        self.harmed_at = self.resumed_at = self.furthest = 0
        """Steps: at the harm, where new workers went on from, how far the old ones came."""
        self.seconds = float("nan")
        self._when = 0.0

    def __call__(self, ranks: Ranks) -> None:
        step = min(rank.step for rank in ranks.values())
        newest = max(rank.checkpoint_step for rank in ranks.values())
        pids = {rank.pid for rank in ranks.values()}
        if not self.harmed_at:
            if len(ranks) == 2 and newest >= CHECKPOINT_STEPS and step >= newest + 5:
                self.harmed_at = self.furthest = step
                self._when, self.pids = time.monotonic(), pids
                self.harm(ranks)
        elif pids & self.pids:
            self.furthest = max(self.furthest, step)
            if step > self.harmed_at and math.isnan(self.seconds):
                self.seconds = time.monotonic() - self._when
        else:
            if not self.resumed_at:
                self.resumed_at, self.seconds = newest, float("nan")
            if step > self.furthest and math.isnan(self.seconds):
                self.seconds = time.monotonic() - self._when

    @property
    def images_twice(self) -> int:
        return 32 * (self.furthest - self.resumed_at) if self.resumed_at else 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two for the workers, and one to spare: for the test that kills one."""
    with ray_nodes(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with s3_in_environment(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(
    server: LocalS3, nodes: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    config = make_run(ObjectStore(), str(tmp_path_factory.mktemp("data")), *SETTINGS)
    launch_training(config, local_dir=tmp_path_factory.mktemp("local"))
    return weights(config)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    manifest = checkpoint.find(ObjectStore(), run_url(config), None)
    assert manifest.images == config.train.total_images
    return checkpoint.read_tensors(ObjectStore(), run_url(config), manifest, ema=False)


def kill_a_worker(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    os.kill(ranks[1].pid, signal.SIGKILL)


def kill_a_node(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    raylet = psutil.Process(ranks[1].pid).ppid()
    [node] = [
        node
        for node in nodes.worker_nodes
        if any(info.process.pid == raylet for info in node.all_processes["raylet"])
    ]
    nodes.remove_node(node, allow_graceful=False)


def lose_the_coordinator(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    kill_the_coordinator()


def give_notice(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_a_worker_in_mid_upload(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    """The server takes nothing in and says nothing, so the next checkpoint is on its way."""
    os.killpg(server.pid, signal.SIGSTOP)

    def later() -> None:
        os.kill(ranks[1].pid, signal.SIGKILL)
        os.killpg(server.pid, signal.SIGCONT)

    threading.Timer(4, later).start()


def take_the_storage_away(ranks: Ranks, server: LocalS3, nodes: Cluster) -> None:
    os.killpg(server.pid, signal.SIGSTOP)
    threading.Timer(8, os.killpg, (server.pid, signal.SIGCONT)).start()


@pytest.mark.parametrize(
    ("fault", "restarts"),
    [
        (kill_a_worker, True),
        (kill_a_node, True),
        (lose_the_coordinator, False),
        (give_notice, True),
        (kill_a_worker_in_mid_upload, True),
        (take_the_storage_away, False),
    ],
)
def test_the_end_is_the_same_to_the_last_bit(
    fault: Callable[[Ranks, LocalS3, Cluster], None],
    restarts: bool,
    server: LocalS3,
    nodes: Cluster,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    config = make_run(ObjectStore(), str(tmp_path), *SETTINGS, f"name={fault.__name__}")
    watcher = Watcher(lambda ranks: fault(ranks, server, nodes))
    try:
        launch_training(config, local_dir=tmp_path / "local", on_progress=watcher)
    except RunStoppedError:
        launch_training(config, local_dir=tmp_path / "local", on_progress=watcher)
    assert watcher.harmed_at
    assert bool(watcher.resumed_at) == restarts
    print(
        f"{fault.__name__}: harm after step {watcher.harmed_at}, {watcher.seconds:.1f} s lost, "
        f"{watcher.images_twice} images computed twice"
    )
    found = weights(config)
    assert found.keys() == undisturbed.keys()
    assert [n for n, tensor in found.items() if not torch.equal(tensor, undisturbed[n])] == []
