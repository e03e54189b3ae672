"""The loop without Ray: what a run leaves, what a resumed one repeats, what it may start from."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cluster.launch import launch_training
from configs.schema import RunConfig, SourceConfig
from data_pipelines.bad_samples import (
    DEAD_LETTERS,
    DeadLetter,
    TooManyBadSamplesError,
    from_json_lines,
)
from data_pipelines.object_store import (
    ObjectInfo,
    ObjectStore,
    StoreUnavailableError,
    join,
)
from data_pipelines.sample_stream import Batch
from data_pipelines.shard_index import read_index
from data_pipelines.tar_members import ShardMismatchError
from pretrain import checkpoint, train
from pretrain.error_budget import ErrorBudget
from pretrain.fence import SupersededError, claim, enter
from pretrain.inputs import to_tensors
from pretrain.position_noise import draw
from pretrain.preflight import preflight, run_url, sample_order
from pretrain.progress import Progress
from pretrain.publisher import Publisher
from pretrain.replay import replay
from pretrain.run_plan import plan_run
from pretrain.train import TrainingDivergedError, build_model, open_batches, run
from pretrain.trained import load_diti, load_encoder
from pretrain.window import Speed, measure_speed
from pretrain.world import World
from tests.ranks import run_on_ranks
from tests.tars import headers
from tests.tiny_run import UNET, make_backbone, make_run, make_shards
from tools.cli import app

STORE = ObjectStore()
PEAK = 1e11  # FLOP/s
pytestmark = pytest.mark.usefixtures("world")
SHORT = (  # 4 steps, checkpoints at 0, 2 and 4
    "train.global_batch=8",
    "train.total_images=32",
    "train.checkpoint_every_images=16",
    "cluster.num_workers=1",
)
RESNET10 = (
    "task.encoder={kind: resnet10}",
    "task.partition={kind: published, num_subsets: 1}",
)


def tensors(config: RunConfig, step: int | None, *, ema: bool = False) -> dict[str, Tensor]:
    manifest = checkpoint.find(STORE, run_url(config), step)
    return checkpoint.read_tensors(STORE, run_url(config), manifest, ema=ema)


def assert_same_end(first: RunConfig, second: RunConfig) -> None:
    """To the last bit, the average too."""
    for ema in (False, True):
        ends = [tensors(config, None, ema=ema) for config in (first, second)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def run_in_two_parts(config: RunConfig, local_dir: Path) -> None:
    """Stop after the third step, past the checkpoint at the second, and run again."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, local_dir=local_dir, report=stop)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_too_a_resumed_run_ends_the_same_to_the_last_bit(tmp_path: Path, precision: str):
    whole = make_run(
        STORE, str(tmp_path), *SHORT, f"engine.precision={precision}", "cluster.use_gpu=true"
    )
    parted = whole.model_copy(update={"name": "parted"})
    run(whole, local_dir=tmp_path)
    run_in_two_parts(parted, tmp_path)
    run(parted, local_dir=tmp_path)
    assert_same_end(whole, parted)


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
    weights, average = (tensors(resnet10, 4, ema=ema) for ema in (False, True))
    assert len(buffers(weights)) == 12 * 3
    for name, buffer in buffers(weights).items():
        assert torch.equal(average[name], buffer), name
    assert not torch.equal(average["encoder.conv1.weight"], weights["encoder.conv1.weight"])
    assert weights["encoder.bn1.num_batches_tracked"] == 4
    before = tensors(resnet10, 0)
    assert not torch.equal(before["encoder.bn1.running_mean"], weights["encoder.bn1.running_mean"])


def test_a_resumed_run_ends_with_the_same_buffers_and_weights_to_the_last_bit(
    resnet10: RunConfig, tmp_path: Path
):
    config = resnet10.model_copy(update={"name": "resumed"})
    run_in_two_parts(config, tmp_path)
    run(config, local_dir=tmp_path)
    assert_same_end(config, resnet10)


def test_the_trained_encoder_and_model_normalise_with_the_buffers(resnet10: RunConfig):
    average = tensors(resnet10, None, ema=True)
    trained = load_encoder(STORE, run_url(resnet10))
    model, _, _ = load_diti(STORE, run_url(resnet10))
    for encoder in (trained.encoder, model.encoder):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, average[f"encoder.{name}"]), name
    images = torch.randn(4, 3, 32, 32)
    assert trained.encoder(images).shape == (4, 512)
    torch.testing.assert_close(trained.encoder(images)[:1], trained.encoder(images[:1]))


def test_ranks_average_what_each_has_seen_of_the_batch(resnet10: RunConfig, tmp_path: Path):
    """After one step the first layer's mean over two halves of a batch is that over the whole."""
    one_step = resnet10.train.model_copy(update={"total_images": 8})
    alone = resnet10.model_copy(update={"name": "alone", "train": one_step})
    run(alone, local_dir=tmp_path)
    cluster = alone.cluster.model_copy(update={"num_workers": 2})
    both = alone.model_copy(update={"name": "both", "cluster": cluster})
    run_on_ranks(both, tmp_path)
    name = "encoder.bn1.running_mean"
    of_both, of_one = (tensors(c, 1)[name] for c in (both, alone))
    torch.testing.assert_close(of_both, of_one, rtol=1e-4, atol=1e-6)


# --- where a run starts ---------------------------------------------------------------------------


def test_a_run_starts_from_another_ones_average_and_needs_it_no_more_once_it_has_a_checkpoint(
    tmp_path: Path,
):
    source = make_run(STORE, str(tmp_path), *SHORT, "name=source", "train.total_images=8")
    run(source, local_dir=tmp_path)
    config = make_run(STORE, str(tmp_path), *SHORT, "seed=1", f"task.start_from={run_url(source)}")
    run_in_two_parts(config, tmp_path)
    start = tensors(config, 0)
    average = tensors(source, None, ema=True)
    assert start.keys() == average.keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in average.items())

    shutil.rmtree(run_url(source))
    assert preflight(config, 1).resumes_at == 2
    assert run(config, local_dir=tmp_path).step == 4
    with pytest.raises(checkpoint.CheckpointError, match="source has no complete checkpoint"):
        preflight(config.model_copy(update={"name": "new"}), 1)


def test_a_start_out_of_another_run_must_fit_in_what_shapes_do_not_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = make_run(STORE, str(tmp_path), *SHORT, "name=source", "train.total_images=8")
    run(source, local_dir=tmp_path)
    start = f"task.start_from={run_url(source)}"
    heads = make_run(STORE, str(tmp_path), *SHORT, start, "task.encoder.num_heads=8")
    with pytest.raises(ValueError, match=r"its encoder is .*'num_heads': 4.*'num_heads': 8"):
        preflight(heads, 1)
    weights = str(tmp_path / "other.safetensors")
    sha256 = make_backbone(STORE, weights, UNET.model_copy(update={"dropout": 0.1}))
    other = make_run(
        STORE, str(tmp_path / "same"), *SHORT, start, f"task.backbone.weights={weights}"
    )
    assert other.task.backbone.sha256 == sha256, "the same weights are the same backbone"
    preflight(other, 1)
    assert not caplog.messages
    cut = "task.partition.stage_ends=[50, 200, 1000]"
    preflight(make_run(STORE, str(tmp_path), *SHORT, start, cut), 1)
    assert f"{run_url(source)} was trained with another partition than this run" in caplog.messages


def test_going_back_is_refused_before_a_later_checkpoint_is_set_aside(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT)
    run(config, local_dir=tmp_path)
    assert preflight(config, 1, from_step=2).resumes_at == 2
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint at step 3"):
        preflight(config, 1, from_step=3)
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(checkpoint.CheckpointError, match="step 2 made with other settings"):
        launch_training(other, local_dir=tmp_path, from_step=2)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 2, 4]


# --- what a run says about itself -----------------------------------------------------------------


def test_a_checkpoint_that_lost_a_file_is_refused_before_the_start_and_the_one_before_is_offered(
    tmp_path: Path,
):
    config = make_run(STORE, str(tmp_path), *SHORT)
    manifest = run(config, local_dir=tmp_path)
    STORE.delete(join(checkpoint.parts_url(run_url(config), manifest), "exp_avg/00000.safetensors"))
    with pytest.raises(checkpoint.DamagedError, match=r"is missing, .* --from-step 2$"):
        preflight(config, 1)
    assert preflight(config, 1, from_step=2).resumes_at == 2
    checkpoint.go_back(STORE, run_url(config), 2)
    assert run(config, local_dir=tmp_path).step == 4


def test_progress_and_metrics_tell_the_most_memory_so_far(tmp_path: Path, world: World):
    reports: list[Progress] = []
    config = make_run(STORE, str(tmp_path), *SHORT)
    manifest = run(config, local_dir=tmp_path, report=reports.append)
    peaks = [progress.peak_memory_gib for progress in reports]
    assert len(peaks) == 4
    assert 0.1 < peaks[0] <= peaks[1] <= peaks[2] <= peaks[3] <= world.peak_memory_gib()
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    assert [line["peak_memory_gib"] for line in lines] == peaks


def test_the_last_report_names_the_last_checkpoint(tmp_path: Path):
    reports: list[Progress] = []
    run(make_run(STORE, str(tmp_path), *SHORT), local_dir=tmp_path, report=reports.append)
    steps = [progress.checkpoint_step for progress in reports]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 4)


# --- samples that cannot be used ------------------------------------------------------------------


def spoil(config: RunConfig, shard: str, member: str) -> bytes:
    """Flip a bit of an image; returns the shard as it was."""
    where = join(config.data.shards, shard)
    whole = STORE.read(where)
    data = bytearray(whole)
    data[next(h for h in headers(whole) if h.name == member).offset_data + 40] ^= 1
    STORE.write(where, bytes(data))
    return whole


def trained_on(config: RunConfig) -> list[str]:
    """Keys in order of position, from the checkpoints' own lists."""
    url, lines = run_url(config), []
    for step in checkpoint.complete_steps(STORE, url):
        manifest = checkpoint.find(STORE, url, step)
        lines += checkpoint.read_file(STORE, url, manifest, "samples-00000.tsv").decode().split()
    return lines[1::2]


def letters_of(config: RunConfig) -> list[DeadLetter]:
    folder = join(run_url(config), DEAD_LETTERS)
    return [
        letter
        for info in STORE.list(folder)
        for letter in from_json_lines(STORE.read(info.url).decode())
    ]


def test_a_bad_sample_is_replaced_counted_and_named_and_the_rest_is_as_if_it_were_good(
    tmp_path: Path,
):
    epoch = ("train.total_images=96", "data.error_budget=0.4")  # room for the whole tar
    config = make_run(STORE, str(tmp_path), *SHORT, *epoch)
    good = config.model_copy(update={"name": "good"})
    run(good, local_dir=tmp_path)
    whole = spoil(config, "00001.tar", "000010005.jpg")
    reports: list[Progress] = []
    run_in_two_parts(config, tmp_path)
    manifest = run(config, local_dir=tmp_path, report=reports.append)
    assert reports[-1].bad_samples == 1
    assert manifest.bad_samples == {"other bytes than indexed": 1}
    [letter] = letters_of(config)
    shard = join(config.data.shards, "00001.tar")
    assert (letter.shard, letter.row, letter.key) == (shard, 5, "000010005")
    assert whole[letter.start : letter.end] != STORE.read(shard, letter.start, letter.end)
    undisturbed, found = trained_on(good), trained_on(config)
    assert [a for a, b in zip(undisturbed, found, strict=True) if a != b] == ["000010005"]

    assert "1 of 1 samples still cannot be used" in repair(config, exit_code=1)
    STORE.write(join(config.data.shards, "00001.tar"), whole)
    assert "1 of 1 samples can be used again" in repair(config, exit_code=0)
    assert letters_of(config) == []


def repair(config: RunConfig, exit_code: int) -> str:
    result = CliRunner().invoke(app, ["data", "repair", run_url(config)])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_an_earlier_group_publishes_nothing_once_another_has_begun(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
):
    """Cut off from the cluster, it may still reach the store while the model is being built."""
    config = make_run(STORE, str(tmp_path), *SHORT)
    url, build = run_url(config), train.build_model
    newest = run(config, local_dir=tmp_path)
    launch = claim(STORE, url)
    fence = enter(STORE, url, launch)
    cut_off = Publisher(STORE, url, world, fence, deadline_seconds=5, kept_steps=set)

    def build_meanwhile(*arguments: Any, **settings: Any) -> Any:
        late = replace(newest, step=6, images=48, parent=newest.name, files={})
        cut_off.start(late, [("metrics.jsonl", b"")])
        assert isinstance(cut_off.settle(wait=True), SupersededError)
        return build(*arguments, **settings)

    monkeypatch.setattr(train, "build_model", build_meanwhile)
    longer = make_run(STORE, str(tmp_path), *SHORT, "train.total_images=48")
    assert run(longer, local_dir=tmp_path, launch=launch).step == 6
    assert len(trained_on(longer)) == 48


class AwayStore(ObjectStore):
    """Takes nothing for a run's folder while it is away."""

    away = False

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        if self.away and "/runs/" in url:
            raise StoreUnavailableError(f"{url}: the store does not answer")
        return super().write(url, data, only_if_absent=only_if_absent)


def test_dead_letters_that_storage_does_not_take_go_with_a_later_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    longer = ("train.total_images=96", "data.error_budget=0.1")
    config = make_run(STORE, str(tmp_path), *SHORT, *longer)
    spoil(config, "00001.tar", "000010005.jpg")
    store = AwayStore()
    monkeypatch.setattr(train, "open_store", lambda config: store)

    def leave(progress: Progress) -> None:
        store.away = progress.step < 11

    assert run(config, local_dir=tmp_path, report=leave).step == 12
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 12]
    assert [letter.row for letter in letters_of(config)] == [5]


def test_a_position_counts_once_however_many_substitutes_are_bad_too(world: World):
    def letter(position: int, cause: str) -> DeadLetter:
        return DeadLetter(position, "0.tar", 0, "k", 0, 1, cause, "why")

    budget = ErrorBudget(0.5, at_least=4, counts={"shard missing": 1})
    budget.note([letter(3, "undecodable image"), letter(3, "shard missing"), letter(4, "cut")])
    assert budget.settle() == 3
    assert budget.counts == {"shard missing": 1, "undecodable image": 1, "cut": 1}
    assert len(budget.take_unwritten()) == 3
    with pytest.raises(TooManyBadSamplesError, match="3 samples could not be used, 2 are allowed"):
        budget.check(4)
    budget.check(6)


def test_when_nothing_can_take_a_samples_place_its_letters_are_written(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT, "data.error_budget=1")
    for info in STORE.list(config.data.shards):
        if info.url.endswith(".tar"):
            STORE.delete(info.url)
    with pytest.raises(TooManyBadSamplesError, match="100 substitutes cannot be used"):
        run(config, local_dir=tmp_path)
    assert len(letters_of(config)) == 101


def test_above_the_budget_the_run_stops_with_the_causes_ranked_and_its_dead_letters(
    tmp_path: Path,
):
    config = make_run(STORE, str(tmp_path), *SHORT, "data.error_budget=0", "train.total_images=96")
    spoil(config, "00001.tar", "000010005.jpg")
    with pytest.raises(
        TooManyBadSamplesError, match=r"1 samples .* 0 are allowed .* 1 other bytes"
    ):
        run(config, local_dir=tmp_path)
    assert [letter.row for letter in letters_of(config)] == [5]


def test_a_shard_that_is_gone_is_refused_or_counted_by_the_same_budget(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT, "data.error_budget=0.3")
    STORE.delete(join(config.data.shards, "00002.tar"))
    assert preflight(config, 1).resumes_at == 0
    strict = config.data.model_copy(update={"error_budget": 0.2})
    with pytest.raises(ShardMismatchError, match=r"00002\.tar is missing"):
        preflight(config.model_copy(update={"data": strict}), 1)
    manifest = run(config, local_dir=tmp_path)
    assert manifest.bad_samples.keys() == {"shard missing"}


def test_a_run_made_longer_after_its_rate_had_begun_to_fall_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = make_run(
        STORE, str(tmp_path), *SHORT, "train.total_images=48", "optimizer.decay_images=24"
    )
    run(config, local_dir=tmp_path)
    preflight(config, 1)
    assert not caplog.messages
    longer = config.train.model_copy(update={"total_images": 96})
    preflight(config.model_copy(update={"train": longer}), 1)
    [said] = caplog.messages
    assert "begun to fall after 24 images" in said
    assert "the 48 images done keep" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.attention=xformers", "engine.attention is 'xformers', but its kernel does not"),
        ("data.cache={folder: /dev/null/cache, limit_gib: 1}", "data.cache.folder /dev/null/cache"),
        ("engine.compile=both", "needs the C\\+\\+ compiler 'no-such-compiler', and there is none"),
        ("wandb.mode=online", "there are no credentials for it"),
    ],
)
def test_what_the_workers_would_lack_is_refused_before_they_start(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = make_run(STORE, str(tmp_path), *SHORT, override)
    with pytest.raises(ValueError, match=message):
        preflight(config, 1)
    assert not Path(config.output, config.name).exists()


@pytest.mark.skipif(
    torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU computes in fp16"
)
def test_fp16_is_refused_on_a_cpu_without_it(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT, "engine.precision=fp16")
    with pytest.raises(ValueError, match="'fp16', which this CPU has no instructions for"):
        preflight(config, 1)


def test_peak_memory_is_that_of_the_process_and_stays_when_memory_is_freed():
    code = (
        "import torch; from pretrain.world import World;"
        "ballast = torch.ones(2**29); del ballast;"
        "print(World(0, 1, torch.device('cpu')).peak_memory_gib())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2 < float(done.stdout) < 4


# --- several data sets ----------------------------------------------------------------------------


def with_sources(config: RunConfig, folder: Path) -> RunConfig:
    """The run on its own shards and, a third as often, on a second set."""
    make_shards(STORE, str(folder / "second"), split="val", shards=2, rows=5)
    assert config.data.shards is not None
    sources = {
        "main": SourceConfig(shards=config.data.shards, weight=3),
        "more": SourceConfig(shards=str(folder / "second")),
    }
    data = config.data.model_copy(update={"shards": None, "sources": sources})
    return config.model_copy(update={"data": data})


def test_sources_are_mixed_by_weight_and_a_resumed_run_goes_on_with_both(tmp_path: Path):
    config = with_sources(make_run(STORE, str(tmp_path), *SHORT), tmp_path)
    run_in_two_parts(config, tmp_path)
    run(config, local_dir=tmp_path)
    whole = config.model_copy(update={"name": "whole"})
    run(whole, local_dir=tmp_path)
    assert trained_on(config) == trained_on(whole)
    assert_same_end(config, whole)

    again = config.model_copy(update={"data": config.data.moved(lambda url: f"{url}/")})
    preflight(again, 1)  # a set may have moved
    more = config.data.sources["more"].model_copy(update={"weight": 2.0})
    changed = config.data.model_copy(update={"sources": config.data.sources | {"more": more}})
    with pytest.raises(ValueError, match=r"data\.sources\.more\.weight was 1\.0, is 2\.0"):
        preflight(config.model_copy(update={"data": changed}), 1)


def test_a_shard_missing_from_one_of_the_sources_is_named_with_its_folder(tmp_path: Path):
    config = with_sources(make_run(STORE, str(tmp_path), *SHORT), tmp_path)
    STORE.delete(str(tmp_path / "second" / "00001.tar"))
    with pytest.raises(ShardMismatchError, match=r"second/00001\.tar is missing"):
        preflight(config, 1)


def test_weights_that_lanes_round_far_off_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = with_sources(make_run(STORE, str(tmp_path), *SHORT), tmp_path)
    preflight(config, 1)
    assert not caplog.messages, "3 to 1 in eight lanes is exact"
    preflight(config.model_copy(update={"data": config.data.model_copy(update={"lanes": 3})}), 1)
    [said] = caplog.messages
    assert "become 2, 1 of 3 lanes" in said
    assert "66.7%, 33.3% instead of 75.0%, 25.0%" in said


def test_a_weight_below_one_lane_is_refused_before_the_start(tmp_path: Path):
    config = with_sources(make_run(STORE, str(tmp_path), *SHORT, "data.lanes=1"), tmp_path)
    with pytest.raises(ValueError, match=r"without any of 1 lanes; use at least data\.lanes=4"):
        preflight(config, 1)


# --- what each step draws, and when it ends -------------------------------------------------------


def test_dropout_is_drawn_anew_at_every_step_and_alike_after_a_restart(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT, "train.log_every_steps=1", dropout=0.5)
    seeds: list[int] = []
    run(config, local_dir=tmp_path, report=lambda progress: seeds.append(torch.initial_seed()))
    assert len(set(seeds)) == 4
    again = config.model_copy(update={"name": "again"})
    run_in_two_parts(again, tmp_path)
    run(again, local_dir=tmp_path)
    ends = [tensors(each, 4) for each in (config, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    without = make_run(STORE, str(tmp_path / "without"), *SHORT)
    run(without, local_dir=tmp_path)
    name = next(name for name in ends[0] if name.startswith("decoder."))
    assert not torch.equal(ends[0][name], tensors(without, 4)[name])


def test_images_are_mirrored_where_their_coin_says_so(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), "data.horizontal_flip=true")
    model, _ = build_model(config, STORE, torch.device("cpu"))
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, None, :, None], (8, 32, 1, 3))
    batch = Batch(ramp, np.arange(8), ("key",) * 8)
    images, _, noise = to_tensors(batch, config, model, torch.device("cpu"))
    coins = draw(batch.positions, seed=config.seed, global_batch=32, noise_shape=(3, 32, 32)).flip_B
    assert 0 < coins.sum() < 8
    falls = (images[:, 0, 0, -1] < images[:, 0, 0, 0]).tolist()
    assert falls == coins.tolist()
    assert images.shape == noise.shape == (8, 3, 32, 32)
    assert images.is_contiguous()


@pytest.mark.parametrize(("rate", "what"), [("1e30", "loss"), ("1e12", "gradient norm")])
def test_a_run_that_comes_to_no_number_stops_and_keeps_the_samples_of_that_step(
    tmp_path: Path, rate: str, what: str
):
    config = make_run(STORE, str(tmp_path), *SHORT, f"optimizer.learning_rate={rate}")
    with pytest.raises(
        TrainingDivergedError, match=r"newest complete checkpoint is step \d"
    ) as told:
        run(config, local_dir=tmp_path)
    steps = checkpoint.complete_steps(STORE, run_url(config))
    assert steps[-1] < 4, "weights that are no numbers are not published"
    [where] = [info.url for info in STORE.list(join(run_url(config), "faults"))]
    fault = json.loads(STORE.read(where))
    assert fault["what"] == what
    assert f"{what} is " in str(told.value)
    assert f"at step {fault['step']}, first on rank 0" in str(told.value)
    images = config.train.global_batch
    assert fault["positions"] == list(range((fault["step"] - 1) * images, fault["step"] * images))
    assert len(fault["keys"]) == images
    again = replay(config, fault["step"])
    assert not math.isfinite(again.loss if fault["what"] == "loss" else again.gradient_norm)
    assert [sample.key for sample in again.samples] == fault["keys"]


def test_weights_that_the_last_step_spoiled_are_not_published(tmp_path: Path):
    spoiled = (
        "optimizer.learning_rate=1e38",
        "optimizer.weight_decay=10",
        "optimizer.warmup_images=0",
    )
    config = make_run(STORE, str(tmp_path), "train.total_images=32", *spoiled)
    with pytest.raises(TrainingDivergedError, match=r"no finite numbers after step 1, so they are"):
        run(config, local_dir=tmp_path)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0]


def test_a_step_that_is_replayed_has_the_loss_and_the_samples_of_the_run(tmp_path: Path):
    config = make_run(STORE, str(tmp_path), *SHORT, "train.max_micro_batch=4")
    manifest = run(config, local_dir=tmp_path)
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    samples = checkpoint.read_samples(STORE, run_url(config), manifest)
    for step in (1, 4):
        again = replay(config, step)
        assert again.loss == lines[step - 1]["loss"]
        assert again.gradient_norm == lines[step - 1]["gradient_norm"]
        mean = np.mean([sample.loss for sample in again.samples])
        assert mean == pytest.approx(again.loss, rel=1e-5)
        own = samples[(step - 1) * 8 : step * 8]
        assert [(sample.position, sample.key) for sample in again.samples] == own
    before = {info.url for info in STORE.list(run_url(config))}
    replay(config, 2)
    assert {info.url for info in STORE.list(run_url(config))} == before, "it only reads"
    with pytest.raises(ValueError, match="the run has steps 1 to 4; there is no step 5"):
        replay(config, 5)


def plain_run(config: RunConfig, world: World) -> tuple[list[float], dict[str, Tensor], ...]:
    """What `run` should do, with nothing but torch: gradient norms, weights and average."""
    torch.manual_seed(config.seed)
    model, _ = build_model(config, STORE, torch.device("cpu"))
    index = read_index(STORE, config.data.folders[0])
    plan, optimizer = plan_run(config.train, 1), config.optimizer
    order = sample_order(config, index)
    batches = open_batches(STORE, index, order, config, plan, world, first_batch=0)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in weights.items()}
    adam = torch.optim.AdamW(
        weights.values(), betas=optimizer.betas, weight_decay=optimizer.weight_decay
    )
    norms = []
    for step in range(plan.total_steps):
        seen = step * config.train.global_batch
        warm = min(1, seen / optimizer.warmup_images)
        adam.param_groups[0]["lr"] = warm * optimizer.learning_rate
        for _ in range(plan.accumulation):
            inputs = to_tensors(next(batches), config, model, torch.device("cpu"))
            (model(*inputs).mean() / plan.accumulation).backward()
        assert optimizer.clip_norm is not None
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), optimizer.clip_norm).item())
        adam.step()
        adam.zero_grad()
        decay = config.train.ema_decay
        for name, live in weights.items():
            average[name] = decay * average[name] + (1 - decay) * live.detach()
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return norms, weights, average


def flat(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in names])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_is_what_its_settings_say_in_plain_torch(tmp_path: Path, world: World, stage: int):
    settings = (
        "optimizer={learning_rate: 3e-3, betas: [0.8, 0.95], weight_decay: 0.1, clip_norm: 0.02, "
        "warmup_images: 24}",
        "train.ema_decay=0.7",
        "train.total_images=48",
        "train.max_micro_batch=4",
        f"engine.zero_stage={stage}",
    )
    config = make_run(STORE, str(tmp_path), *SHORT, *settings)
    norms, weights, average = plain_run(config, world)
    manifest = run(config, local_dir=tmp_path)
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    assert min(norms) > 0.02, "clipping changes something"
    assert [line["gradient_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([0, 1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    start = flat(tensors(config, 0), weights)
    for ema, expected in ((False, weights), (True, average)):
        moved = flat(expected, weights) - start
        found = flat(tensors(config, None, ema=ema), weights) - start
        # Adam divides by what a gradient usually is, so the digits of tiny ones count as much.
        assert (found - moved).norm() < 2e-3 * moved.norm()


def test_only_the_newest_checkpoints_stay_whole_and_of_the_others_no_tensor(tmp_path: Path):
    kept = ("train.keep_last=1", "train.keep_every_images=32", "train.total_images=48")
    config = make_run(STORE, str(tmp_path), *SHORT, *kept)
    manifest = run(config, local_dir=tmp_path)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 4, 6]
    thinned = [info.url for info in STORE.list(join(run_url(config), "checkpoints/step-00000002"))]
    assert {url.rpartition("/")[2] for url in thinned} == {
        *("HISTORY.json", "files-00000.json", "samples-00000.tsv", "metrics.jsonl", "run.yaml")
    }
    samples = checkpoint.read_samples(STORE, run_url(config), manifest)
    assert [position for position, _ in samples] == list(range(48))


def test_a_setting_that_is_allowed_to_change_changes_in_runs_and_replays(tmp_path: Path):
    before = make_run(STORE, str(tmp_path), *SHORT)
    run(before, local_dir=tmp_path)
    longer = ("train.total_images=48", "optimizer.learning_rate=3e-3")
    config = make_run(STORE, str(tmp_path), *SHORT, *longer)
    for refused in (run_it := partial(run, local_dir=tmp_path), partial(replay, step=5)):
        with pytest.raises(checkpoint.CheckpointError, match=r"--allow-change optimizer\.learning"):
            refused(config)
    again = run_it(config, allow_change=["optimizer"])
    lines = checkpoint.read_metrics(STORE, run_url(config), again)
    assert [line["learning_rate"] for line in lines] == [1e-3] * 4 + [3e-3] * 2
    shorter = make_run(STORE, str(tmp_path), *SHORT, "train.total_images=48")
    assert replay(shorter, 6, allow_change=["optimizer"]).gradient_norm > 0


def test_a_loss_that_jumps_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    config = make_run(STORE, str(tmp_path), *SHORT, "train.total_images=240")

    def spoiled(batch: Batch, *rest: object) -> tuple[Tensor, ...]:
        images, t, noise = to_tensors(batch, *rest)  # pyright: ignore[reportArgumentType]
        return images, t, 30 * noise if batch.positions[0] >= 29 * 8 else noise

    monkeypatch.setattr(train, "to_tensors", spoiled)
    run(config, local_dir=tmp_path)
    assert "up to step 30 is" in caplog.text
    assert "times the usual one" in caplog.text


def test_a_window_says_where_its_time_went_and_what_share_of_the_peak_it_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slower_machine(*about: Any) -> Speed:
        return replace(measure_speed(*about), peak=PEAK)

    monkeypatch.setattr("pretrain.train.measure_speed", slower_machine)
    config = make_run(STORE, str(tmp_path), *SHORT)
    manifest = run(config, local_dir=tmp_path)
    for line in checkpoint.read_metrics(STORE, run_url(config), manifest):
        shares = [value for name, value in line.items() if name.startswith("share/")]
        assert sum(shares) == pytest.approx(1)
        assert all(
            line[f"share/{phase}"] > 0
            for phase in ("backbone forward", "forward", "backward", "optimizer", "average")
        )
        assert line["data_wait_share"] == line["share/data wait"]
        flops = line["frozen_gflops"] + line["trained_gflops"]
        assert line["peak_share"] == pytest.approx(1e9 * flops / PEAK)
        assert line["trained_gflops"] > line["frozen_gflops"] > 0, flops
