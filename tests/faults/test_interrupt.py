"""Ctrl-C in mid-run: every process ends, and the same command goes on from the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.loading import dump_run
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import run_url
from tests.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


def start(run_file: Path, local: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools", "train", str(run_file), *overrides]
    return subprocess.Popen(
        [*command, "--local-dir", str(local)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def test_an_interrupted_run_leaves_no_process_and_resumes(
    s3: LocalS3, store: ObjectStore, s3_url: str, tmp_path: Path
) -> None:
    run = make_run(store, s3_url, "train.total_images=64000", "cluster.num_workers=1")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_run(run))

    process = start(run_file, tmp_path / "local")
    deadline = time.monotonic() + 240
    while len(checkpoint.complete_steps(store, run_url(run))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]

    steps = checkpoint.complete_steps(store, run_url(run))
    total = (steps[-1] + 2) * run.train.global_batch
    again = start(run_file, tmp_path / "local", f"train.total_images={total}")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"{total} images" in output
    manifest = checkpoint.find(store, run_url(run), None)
    positions = [p for p, _ in checkpoint.read_samples(store, run_url(run), manifest)]
    assert positions == list(range(total))
