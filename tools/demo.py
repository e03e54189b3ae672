"""`diti demo`: the whole line on this machine, through the same parts as a run on a cluster."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cluster.export import export_features
from cluster.launch import launch_training
from cluster.session import ray_session
from configs.loading import parse_run
from configs.schema import RunConfig
from data_pipelines.avatars import AvatarSpec, Split
from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import INDEX_NAME
from pretrain.preflight import open_store, run_url
from tools.attribute_probe import ProbeResult
from tools.denoising import FourLosses
from tools.evaluate_attributes import evaluate_attributes
from tools.make_data import make_avatars
from tools.progress import console, export_bar, image_bar, say_start, training_bar, working
from tools.report import make_report

AVATARS_URL = "s3://diti/avatars"
COUNTS: dict[Split, int] = {"train": 8_192, "val": 3_072, "test": 3_072}
ROWS_PER_SHARD = 512
NUM_WORKERS = 2
SHORTCUT = "dark_background"


@dataclass(frozen=True, slots=True)
class DemoResult:
    report: Path
    probes: list[ProbeResult]
    losses: FourLosses


def run_demo(folder: Path, overrides: tuple[str, ...] = ()) -> DemoResult:
    """Data, training, export, evaluation and report, with an S3 server that lives as long.

    Args:
        folder: everything is kept below it; what is already there is gone on with.
        overrides: `key.path=value` changes to `configs/runs/demo.yaml`.
    """
    text = (resources.files("configs") / "runs" / "demo.yaml").read_text()
    config = parse_run(text, overrides, source="configs/runs/demo.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    with local_s3(folder / "s3") as server:
        os.environ |= server.environment()
        store = open_store(config)
        console.print(f"S3 server at {server.endpoint_url}, data in {folder / 's3'}")
        make_splits(store, AVATARS_URL, COUNTS)
        with ray_session(num_cpus=NUM_WORKERS):
            newest, features = _train_and_export(store, config, folder)
        return _evaluate(store, config, folder, newest, features)


def run_beside_s3(folder: Path, command: list[str]) -> int:
    """Run a command while the S3 server of a demo's folder is up; returns its exit code.

    The server's address and credentials are the command's AWS_* variables.

    Raises:
        ValueError: there is no demo in the folder, or no such command.
    """
    if not (folder / "s3").is_dir():
        raise ValueError(
            f"{folder} holds no demo; make one: diti demo --folder {folder}; or begin with an "
            f"empty store: mkdir -p {folder / 's3'}"
        )
    with local_s3(folder / "s3") as server:
        try:
            done = subprocess.run(command, env=os.environ | server.environment(), check=False)  # noqa: S603
        except OSError as error:
            raise ValueError(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.returncode


Exported = dict[tuple[Split, int], str]
"""Features by split and step."""


def _train_and_export(store: ObjectStore, config: RunConfig, folder: Path) -> tuple[int, Exported]:
    """The newest step, and features of it and of step 0."""
    with training_bar("training", config.train.total_images) as show:
        manifest = launch_training(
            config,
            local_dir=(folder / "local").resolve(),
            on_start=say_start,
            on_progress=show,
        )
    return manifest.step, {
        (split, step): _export(store, config, split, step)
        for step in (manifest.step, 0)
        for split in ("val", "test")
    }


def _evaluate(
    store: ObjectStore, config: RunConfig, folder: Path, newest: int, features: Exported
) -> DemoResult:
    train_url, test_url = features["val", newest], features["test", newest]
    with working("probing attributes"):
        probes = evaluate_attributes(
            store,
            train_url=train_url,
            test_url=test_url,
            untrained=(features["val", 0], features["test", 0]),
        )
    with working("reading the run") as say:
        page, losses = make_report(
            store,
            run_url=run_url(config),
            train_url=train_url,
            test_url=test_url,
            probes=probes,
            shortcut=SHORTCUT,
            say=say,
        )
    report = folder / "report.html"
    report.write_text(page, encoding="utf-8")
    return DemoResult(report, probes, losses)


def make_splits(store: ObjectStore, avatars_url: str, counts: Mapping[Split, int]) -> None:
    """The shards of every split that are not there yet."""
    for split, count in counts.items():
        url = join(avatars_url, split)
        if store.exists(join(url, INDEX_NAME)):
            continue
        with image_bar(f"avatars {split}", count) as advance:
            make_avatars(
                AvatarSpec(split=split),
                count,
                store,
                url,
                rows_per_shard=ROWS_PER_SHARD,
                workers=os.cpu_count() or 1,
                on_shard=advance,
            )


def _export(store: ObjectStore, config: RunConfig, split: Split, step: int) -> str:
    out_url = join(run_url(config), "features", f"step-{step:08d}-{split}")
    which = "trained" if step else "untrained"
    with export_bar(f"export {split}, {which}") as (start, show):
        export_features(
            store,
            run_url=run_url(config),
            step=step,
            shards_url=join(AVATARS_URL, split),
            out_url=out_url,
            num_workers=NUM_WORKERS,
            on_start=start,
            on_progress=show,
        )
    return out_url
