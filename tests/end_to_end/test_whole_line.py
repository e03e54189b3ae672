"""The whole line on real parts: S3, Ray, two ZeRO-2 workers, a kill, export, a plain reader."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors

from cluster.export import export_features
from cluster.launch import launch_training
from cluster.session import ray_session
from configs.schema import RunConfig
from data_pipelines.feature_store import read_manifest
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.pieces import KINDS
from pretrain.preflight import run_url
from pretrain.progress import Progress
from tests.tiny_run import make_run, make_shards
from tools.evaluate_attributes import evaluate_attributes
from tools.report import make_report

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class TwoRuns:
    """The same run undisturbed, and with one of its workers killed on the way."""

    url: str
    store: ObjectStore
    undisturbed: RunConfig
    killed: RunConfig
    killed_pids: list[int]


@pytest.fixture(scope="module")
def runs(s3: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRuns]:
    store, url = ObjectStore(), f"s3://{s3.bucket}/whole-line"
    undisturbed = make_run(store, url)
    killed = make_run(store, url, "name=killed")
    pids: list[int] = []

    def kill_one_worker(ranks: Mapping[int, Progress]) -> None:
        past_a_checkpoint = 1 in ranks and ranks[1].checkpoint_step >= 2
        if not pids and past_a_checkpoint:
            pids.append(ranks[1].pid)
            os.kill(ranks[1].pid, signal.SIGKILL)

    local = tmp_path_factory.mktemp("local")
    with ray_session(num_cpus=2):
        launch_training(undisturbed, local_dir=local / "undisturbed")
        launch_training(killed, local_dir=local / "killed", on_progress=kill_one_worker)
        yield TwoRuns(url, store, undisturbed, killed, pids)


def newest(runs: TwoRuns, config: RunConfig) -> checkpoint.Manifest:
    return checkpoint.find(runs.store, run_url(config), None)


def weights(runs: TwoRuns, config: RunConfig, *, ema: bool) -> dict[str, torch.Tensor]:
    manifest = newest(runs, config)
    return checkpoint.read_tensors(runs.store, run_url(config), manifest, ema=ema)


def test_a_killed_worker_costs_no_sample_and_repeats_none(runs: TwoRuns) -> None:
    assert runs.killed_pids, "the worker was never killed: the test proves nothing"
    trained_on = [
        checkpoint.read_samples(runs.store, run_url(config), newest(runs, config))
        for config in (runs.undisturbed, runs.killed)
    ]
    assert trained_on[0] == trained_on[1]
    assert [position for position, _ in trained_on[0]] == list(range(320))


def test_the_same_run_gives_the_same_loss_and_weights_to_the_last_bit(runs: TwoRuns) -> None:
    first, second = (
        checkpoint.read_metrics(runs.store, run_url(config), newest(runs, config))
        for config in (runs.undisturbed, runs.killed)
    )
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    for ema in (False, True):
        ends = [weights(runs, config, ema=ema) for config in (runs.undisturbed, runs.killed)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_is_done_starts_no_worker(runs: TwoRuns, tmp_path: Path) -> None:
    reports: list[Mapping[int, Progress]] = []
    manifest = launch_training(runs.killed, local_dir=tmp_path, on_progress=reports.append)
    assert manifest == newest(runs, runs.killed)
    assert not reports
    assert not list(tmp_path.iterdir()), "Ray Train writes here as soon as it runs"


def test_the_loss_falls(runs: TwoRuns) -> None:
    manifest = newest(runs, runs.undisturbed)
    losses = [
        line["loss"]
        for line in checkpoint.read_metrics(runs.store, run_url(runs.undisturbed), manifest)
    ]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_no_tensor_of_the_backbone_is_in_a_checkpoint(runs: TwoRuns) -> None:
    manifest, url = newest(runs, runs.undisturbed), run_url(runs.undisturbed)
    assert not [name for name in manifest.shapes if "backbone" in name]
    numbers = sum(prod(shape) for shape in manifest.shapes.values())
    for kind in KINDS:
        names = sorted(name for name in manifest.files if name.startswith(f"{kind}/"))
        assert names == [f"{kind}/00000.safetensors", f"{kind}/00001.safetensors"]
        saved = [
            load_safetensors(checkpoint.read_file(runs.store, url, manifest, n)) for n in names
        ]
        places = [place for part in saved for place in part]
        assert {place.rpartition("@")[0] for place in places} == set(manifest.shapes)
        assert sum(tensor.numel() for part in saved for tensor in part.values()) == numbers
    assert not [name for name in manifest.files if name.endswith((".pt", ".pkl"))]


def test_features_are_exported_probed_reported_and_read_with_pyarrow_alone(
    runs: TwoRuns, s3: LocalS3
) -> None:
    features = {}
    for split in ("val", "test"):
        shards = join(runs.url, split)
        make_shards(runs.store, shards, split=split, shards=3, rows=100)
        features[split] = join(runs.url, "features", split)
        export_features(
            runs.store,
            run_url=run_url(runs.undisturbed),
            step=None,
            shards_url=shards,
            out_url=features[split],
            num_workers=2,
        )
    manifest = read_manifest(runs.store, features["test"])
    assert manifest.rows == 300
    assert [column.timesteps for column in manifest.columns] == [(0, 50), (50, 300), (300, 1000)]

    probes = evaluate_attributes(
        runs.store, train_url=features["val"], test_url=features["test"], pixels=True
    )
    assert [probe.dims for probe in probes] == [24, 8, 8, 8, 3072]
    page, losses = make_report(
        runs.store,
        run_url=run_url(runs.undisturbed),
        train_url=features["val"],
        test_url=features["test"],
        probes=probes,
    )
    assert "http://" not in page.split("<main>")[1]
    assert page.count("data:image/png;base64,") == 7
    assert losses.diti < losses.backbone

    before = export_features(
        runs.store,
        run_url=run_url(runs.undisturbed),
        step=0,
        shards_url=join(runs.url, "test"),
        out_url=join(runs.url, "features", "before"),
        num_workers=2,
    )
    assert before.encoder_sha256 != manifest.encoder_sha256
    with pytest.raises(ValueError, match="another encoder"):
        make_report(
            runs.store,
            run_url=run_url(runs.undisturbed),
            train_url=features["val"],
            test_url=join(runs.url, "features", "before"),
            probes=probes,
        )

    script = Path(__file__).with_name("read_with_pyarrow.py")
    answer = subprocess.run(
        [sys.executable, script, s3.endpoint_url, features["test"].removeprefix("s3://")],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], **s3.environment()},
        cwd="/",
    )
    rows, dims, bytes_below_300, bytes_of_all = map(int, answer.stdout.split())
    assert (rows, dims) == (300, 24)
    assert 0 < bytes_below_300 < bytes_of_all


def test_an_export_goes_on_where_it_was_and_refuses_another_encoder(runs: TwoRuns) -> None:
    shards, out = join(runs.url, "resumed"), join(runs.url, "features", "resumed")
    make_shards(runs.store, shards, split="test", shards=2, rows=8)
    arguments = {"run_url": run_url(runs.undisturbed), "shards_url": shards, "out_url": out}
    first = export_features(runs.store, step=None, num_workers=1, **arguments)
    part = next(iter(first.parts))
    kept = next(name for name in first.parts if name != part)
    before = runs.store.read(join(out, kept))
    runs.store.delete(join(out, part))
    runs.store.delete(join(out, "manifest.json"))
    again = export_features(runs.store, step=None, num_workers=1, **arguments)
    assert again == first
    assert runs.store.read(join(out, kept)) == before
    with pytest.raises(ValueError, match="another encoder"):
        export_features(runs.store, step=0, num_workers=1, **arguments)
    for damaged in (b"[]", b"{"):
        runs.store.write(join(out, "export.json"), damaged)
        with pytest.raises(ValueError, match=r"export\.json is damaged"):
            export_features(runs.store, step=None, num_workers=1, **arguments)
