"""Ctrl-C and `kill` in mid-work: every process ends, and the same command goes on from there.

Also what a run's terminal says of a worker that dies.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from configs.loading import dump_run
from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from tests.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)
STORE = ObjectStore()


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would all that these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`diti` in a session of its own, as from a terminal that stands in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tools", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def interrupt(
    process: subprocess.Popen[str], number: signal.Signals, says: str = "diti: interrupted"
) -> str:
    """Send a signal; nothing of the process's family may be left. Returns what it had printed."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family, "it has started nothing yet: the test proves nothing"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert says in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]
    return output + errors


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    [worker] = [child for child in family if "RayTrainWorker" in " ".join(child.cmdline())]
    worker.kill()


def wait_until(condition, process: subprocess.Popen[str], every_seconds: float = 0.5) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(every_seconds)


RELATIVE = (
    *("train", "run.yaml", "output=runs", "data.shards=train"),
    "task.backbone.weights=backbone.safetensors",
)


def endless_run(tmp_path: Path) -> tuple[RunConfig, str]:
    """A run file for `RELATIVE`, and the run's folder."""
    run = make_run(STORE, str(tmp_path), "train.total_images=64000", "cluster.num_workers=1")
    (tmp_path / "run.yaml").write_text(dump_run(run))
    return run, str(tmp_path / "runs" / "tiny")


@pytest.mark.faults
def test_a_run_interrupted_on_relative_paths_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    run, folder = endless_run(tmp_path)
    process = start(tmp_path, *RELATIVE)
    wait_until(lambda: len(checkpoint.complete_steps(STORE, folder)) >= 3, process)
    said = interrupt(process, signal.SIGINT)
    assert "run the same command again to go on" in said
    assert "raylet" not in said, "Ray's own thousand characters about it"

    steps = checkpoint.complete_steps(STORE, folder)
    total = (steps[-1] + 2) * run.train.global_batch
    orphan = Path(folder, "checkpoints", "step-00009999", "parts-of-nobody", "weights", "0")
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"left by an attempt that was killed")
    rate = ("optimizer.learning_rate=2e-3", "--allow-change", "optimizer.learning_rate")
    again = start(tmp_path, *RELATIVE, f"train.total_images={total}", *rate)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"{total} images" in output
    assert f"going on from step {steps[-1]}\n" in errors
    assert f"changed since then: train.total_images was 64000, is {total}\n" in errors
    assert "changed since then: optimizer.learning_rate was 0.001, is 0.002\n" in errors
    assert not orphan.exists()
    manifest = checkpoint.find(STORE, folder, None)
    positions = [p for p, _ in checkpoint.read_samples(STORE, folder, manifest)]
    assert positions == list(range(total))


@pytest.mark.faults
def test_a_run_whose_worker_was_killed_publishes_when_it_is_terminated(tmp_path: Path) -> None:
    _, folder = endless_run(tmp_path)
    process = start(tmp_path, *RELATIVE)
    wait_until(lambda: len(checkpoint.complete_steps(STORE, folder)) >= 3, process)
    kill_a_worker(process)
    before = len(checkpoint.complete_steps(STORE, folder))
    wait_until(lambda: len(checkpoint.complete_steps(STORE, folder)) > before + 1, process)
    steps = checkpoint.complete_steps(STORE, folder)
    said = interrupt(process, signal.SIGTERM, says="'tiny' was asked to stop: step-")
    assert "workers were restarted after a failure; the newest checkpoint is step" in said
    stopped_at = checkpoint.find(STORE, folder, None)
    assert stopped_at.step > steps[-1], "it has published what it had done"
    assert f"asked to stop: {stopped_at.name} is complete; run the same command again" in said


def test_a_run_that_is_terminated_while_ray_starts_says_so(tmp_path) -> None:
    run = make_run(STORE, str(tmp_path), "cluster.num_workers=1")
    (tmp_path / "run.yaml").write_text(dump_run(run))
    process = start(tmp_path, "train", "run.yaml")

    def ray_is_starting() -> bool:
        family = psutil.Process(process.pid).children(recursive=True)
        return any("gcs_server" in " ".join(child.cmdline()) for child in family)

    wait_until(ray_is_starting, process, every_seconds=0.02)
    interrupt(process, signal.SIGTERM)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_rendering_leaves_no_process_and_no_set(tmp_path, number) -> None:
    command = ("data", "make", "avatars", "--count", "100000", "--rows-per-shard", "100")
    process = start(tmp_path, *command, "--out", "out", "--workers", "2")
    wait_until(lambda: any((tmp_path / "out").glob("*.tar")), process)
    interrupt(process, number)
    assert not (tmp_path / "out" / "index.parquet").exists()


@pytest.mark.faults
def test_workers_of_a_killed_rendering_end_with_it(tmp_path) -> None:
    command = ("data", "make", "avatars", "--count", "100000", "--rows-per-shard", "100")
    process = start(tmp_path, *command, "--out", "out", "--workers", "2")
    wait_until(lambda: any((tmp_path / "out").glob("*.tar")), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]
