"""A run's start on Ray: what is refused changes nothing; a damaged checkpoint is set aside."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import launch
from cluster.launch import launch_training
from cluster.session import ClusterError, ray_session
from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import run_url
from pretrain.train import run
from tests.tiny_run import make_run
from tools.benchmarks.ranks import free_port

STORE = ObjectStore()
ONE_WORKER = ("cluster.num_workers=1", "train.checkpoint_every_images=32")


pytestmark = pytest.mark.usefixtures("world")


def longer(config: RunConfig, images: int, **settings: object) -> RunConfig:
    train = config.train.model_copy(update={"total_images": images, **settings})
    return config.model_copy(update={"train": train})


def manifests(config: RunConfig) -> dict[str, bytes]:
    """All that says which checkpoints there are, and whose."""
    folder = Path(run_url(config), "checkpoints")
    return {str(path): path.read_bytes() for path in folder.rglob("*.json")}


def recording(calls: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    return record


@pytest.mark.faults  # three launches; test_checkpoint has what is damage, and its remedy
def test_a_damaged_checkpoint_ends_the_run_or_is_set_aside_as_configured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(STORE, str(tmp_path), *ONE_WORKER, "train.total_images=64")
    manifest = run(config, local_dir=tmp_path / "local")
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 1, 2]
    with ray_session(num_cpus=1):
        weights = Path(checkpoint.parts_url(run_url(config), manifest), "weights/00000.safetensors")
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)

        calls: list[str] = []
        for name in ("claim", "collect_orphans"):
            monkeypatch.setattr(launch, name, recording(calls, getattr(launch, name)))
        going_back = longer(config, 96, if_damaged="go_back")
        manifest = launch_training(going_back, local_dir=tmp_path / "local")
    assert re.search(r"is damaged: .* --from-step 1\. Going back to step 1 \(train", caplog.text)
    assert calls == ["claim", "collect_orphans"] * 2, "of older attempts none may publish by then"
    assert [path.name[:11] for path in weights.parents[2].glob("S*")] == ["SUPERSEDED-"]
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 1, 2, 3]
    assert [p for p, _ in checkpoint.read_samples(STORE, run_url(config), manifest)] == [*range(96)]

    Path(checkpoint.parts_url(run_url(config), manifest), "weights/00000.safetensors").unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"is missing.* --from-step 2$"):
        launch_training(longer(config, 128), local_dir=tmp_path / "local")
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 1, 2, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_start_that_is_refused_by_ray_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(STORE, str(tmp_path), *ONE_WORKER, "train.total_images=64")
    run(config, local_dir=tmp_path / "local")
    with ray_session(num_cpus=1):
        before = manifests(config)
        cluster = config.cluster.model_copy(update={"use_gpu": True})
        on_gpu = longer(config, 96).model_copy(update={"cluster": cluster})
        with pytest.raises(ValueError, match="wants 1 GPUs"):
            launch_training(on_gpu, local_dir=tmp_path / "local", from_step=1)
        assert manifests(config) == before
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="there is no Ray cluster at RAY_ADDRESS="):
        launch_training(longer(config, 96), local_dir=tmp_path / "local", from_step=1)
    assert time.monotonic() - begun < 60
    assert manifests(config) == before

    shorter = longer(config, 32)
    assert launch_training(shorter, local_dir=tmp_path / "local", from_step=1).step == 1
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 1], "what is done goes back too"
