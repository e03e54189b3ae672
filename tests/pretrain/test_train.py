"""The loop without Ray: what a run leaves, what a resumed one repeats, what it may start from."""

import multiprocessing
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import preflight, run_url
from pretrain.train import Progress, run
from pretrain.trained import load_diti, load_encoder
from pretrain.world import World
from tests.tiny_run import make_run

STORE = ObjectStore()
FILES = (checkpoint.WEIGHTS_NAME, checkpoint.EMA_NAME)
pytestmark = pytest.mark.usefixtures("world")
SHORT = (  # 3 steps, checkpoints at 0, 2 and 3
    "train.global_batch=8",
    "train.total_images=24",
    "train.checkpoint_every_images=16",
    "cluster.num_workers=1",
)
RESNET10 = (
    "task.encoder={kind: resnet10}",
    "task.partition={kind: published, num_subsets: 1}",
)


def tensors(config: RunConfig, step: int | None, name: str) -> dict[str, Tensor]:
    manifest = checkpoint.find(STORE, run_url(config), step)
    return load_safetensors(checkpoint.read_file(STORE, run_url(config), manifest, name))


def run_in_two_parts(config: RunConfig, local_dir: Path) -> None:
    """Stop after the third step, past the checkpoint at the second, and run again."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, local_dir=local_dir, report=stop)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 2]


# --- BatchNorm's buffers --------------------------------------------------------------------------


def buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if "running_" in n or "num_batches" in n}


@pytest.fixture(scope="module")
def resnet10(tmp_path_factory: pytest.TempPathFactory, world: World) -> RunConfig:
    """A finished run with BatchNorm."""
    folder = tmp_path_factory.mktemp("resnet10")
    config = make_run(STORE, str(folder), *SHORT, *RESNET10)
    run(config, local_dir=folder)
    return config


def test_checkpoints_hold_the_buffers_the_averaged_weights_with_a_copy(resnet10: RunConfig):
    weights, average = (tensors(resnet10, 3, name) for name in FILES)
    assert len(buffers(weights)) == 12 * 3
    for name, buffer in buffers(weights).items():
        assert torch.equal(average[name], buffer), name
    assert not torch.equal(average["encoder.conv1.weight"], weights["encoder.conv1.weight"])
    assert weights["encoder.bn1.num_batches_tracked"] == 3
    before = tensors(resnet10, 0, checkpoint.WEIGHTS_NAME)
    assert not torch.equal(before["encoder.bn1.running_mean"], weights["encoder.bn1.running_mean"])


def test_a_resumed_run_ends_with_the_same_buffers_and_weights_to_the_last_bit(
    resnet10: RunConfig, tmp_path: Path
):
    config = resnet10.model_copy(update={"name": "resumed"})
    run_in_two_parts(config, tmp_path)
    manifests = [run(config, local_dir=tmp_path), checkpoint.newest(STORE, run_url(resnet10))]
    for name in FILES:
        assert len({manifest.files[name] for manifest in manifests if manifest}) == 1, name


def test_the_trained_encoder_and_model_normalise_with_the_buffers(resnet10: RunConfig):
    average = tensors(resnet10, None, checkpoint.EMA_NAME)
    trained = load_encoder(STORE, run_url(resnet10))
    model, _, _ = load_diti(STORE, run_url(resnet10))
    for encoder in (trained.encoder, model.encoder):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, average[f"encoder.{name}"]), name
    images = torch.randn(4, 3, 32, 32)
    assert trained.encoder(images).shape == (4, 512)
    torch.testing.assert_close(trained.encoder(images)[:1], trained.encoder(images[:1]))


def _one_rank(rank: int, port: int, config: RunConfig, local_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RANK", rank),
            ("WORLD_SIZE", config.cluster.num_workers),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
        ):
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        run(config, local_dir=local_dir)


def test_ranks_average_what_each_has_seen_of_the_batch(resnet10: RunConfig, tmp_path: Path):
    """After one step the first layer's mean over two halves of a batch is that over the whole."""
    one_step = resnet10.train.model_copy(update={"total_images": 8})
    alone = resnet10.model_copy(update={"name": "alone", "train": one_step})
    run(alone, local_dir=tmp_path)
    cluster = alone.cluster.model_copy(update={"num_workers": 2})
    both = alone.model_copy(update={"name": "both", "cluster": cluster})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_one_rank, args=(r, port, both, tmp_path)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    name = "encoder.bn1.running_mean"
    of_both, of_one = (tensors(c, 1, checkpoint.WEIGHTS_NAME)[name] for c in (both, alone))
    torch.testing.assert_close(of_both, of_one, rtol=1e-4, atol=1e-6)


# --- where a run starts ---------------------------------------------------------------------------


def test_a_run_starts_from_another_ones_average_and_needs_it_no_more_once_it_has_a_checkpoint(
    tmp_path: Path,
):
    source = make_run(STORE, str(tmp_path), *SHORT, "name=source", "train.total_images=8")
    run(source, local_dir=tmp_path)
    config = make_run(STORE, str(tmp_path), *SHORT, "seed=1", f"task.start_from={run_url(source)}")
    run_in_two_parts(config, tmp_path)
    start = tensors(config, 0, checkpoint.WEIGHTS_NAME)
    average = tensors(source, None, checkpoint.EMA_NAME)
    assert start.keys() == average.keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in average.items())

    shutil.rmtree(run_url(source))
    assert preflight(config, 1).resumes_at == 2
    assert run(config, local_dir=tmp_path).step == 3
    with pytest.raises(checkpoint.CheckpointError, match="source has no complete checkpoint"):
        preflight(config.model_copy(update={"name": "new"}), 1)


# --- what a run says about itself -----------------------------------------------------------------


def test_progress_and_metrics_tell_the_most_memory_so_far(tmp_path: Path, world: World):
    reports: list[Progress] = []
    config = make_run(STORE, str(tmp_path), *SHORT)
    manifest = run(config, local_dir=tmp_path, report=reports.append)
    peaks = [progress.peak_memory_gib for progress in reports]
    assert len(peaks) == 3
    assert 0.1 < peaks[0] <= peaks[1] <= peaks[2] <= world.peak_memory_gib()
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    assert [line["peak_memory_gib"] for line in lines] == peaks


def test_peak_memory_is_that_of_the_process_and_stays_when_memory_is_freed():
    code = (
        "import torch; from pretrain.world import World;"
        "ballast = torch.ones(2**29); del ballast;"
        "print(World(0, 1, torch.device('cpu')).peak_memory_gib())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2 < float(done.stdout) < 4
