"""`python -m tools.benchmarks.method_quality ROW...`: what features are worth, method by method.

Each row is a change to `configs/runs/avatars32_diti.yaml`. It is trained, exported and probed like
any run, on the same images, and leaves one file in `results/method_quality`, with the commit, the
configuration and a learning curve. What is there already is not done again, and a row that was
interrupted goes on; so the table can be filled over days. Without a row, the table is printed.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from cluster.export import export_features
from cluster.launch import launch_training
from cluster.session import ray_session
from configs.schema import RunConfig
from configs.task import DitiTask
from data_pipelines.avatars import AvatarSpec, Split, attribute_granularity
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import INDEX_NAME
from pretrain import checkpoint
from pretrain.preflight import run_url
from pretrain.trained import load_diti, load_encoder
from tools.attribute_probe import ProbeResult
from tools.benchmarks.method_rows import ROWS, config_of, digest_of_config
from tools.demo import make_splits
from tools.evaluate_attributes import evaluate_attributes
from tools.evaluate_counterfactual import evaluate_counterfactual, swap_numbers
from tools.evaluate_few_shot import evaluate_few_shot
from tools.few_shot import FewShotResult, Shortcut, best_subset
from tools.make_data import make_avatars

RESULTS = Path(__file__).parent / "results" / "method_quality"
COUNTS: dict[Split, int] = {"train": 49_152, "val": 4_096, "test": 4_096}
SHORTCUT = Shortcut("dark_background", 1.0)
PAIRS = ("mouth_open", "glasses", "hat", "dark_skin")
"""Attributes whose exact counterfactuals are drawn: a fine one, two in between, a coarse one."""
NUM_PAIRS = 32


@dataclass(frozen=True, slots=True)
class Precision:
    """Mean average precision of a whole feature."""

    images: int
    """Trained on so far; 0 is the untrained encoder."""
    all: float
    by_granularity: dict[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """What a row leaves."""

    row: str
    seed: int
    command: str
    commit: str
    config_digest: str
    date: str
    machine: str
    images_per_second: float
    """In training; the median."""
    core_hours: float
    """Of training: cores, or one GPU, times hours at that rate."""
    encoder_images_per_second: float
    """Features of images, on cores, by as many threads as torch takes."""
    curve: list[Precision]
    pixels: Precision
    attributes: dict[str, float]
    """Average precision of each, at the end."""
    few_shot: dict[str, float]
    """Mean accuracy by number of shots, whole feature."""
    misled: dict[str, float]
    """The same where the background misleads."""
    misled_best_subset: dict[str, float]
    """The same by the subset that is best in the mean over the numbers of shots."""
    counterfactual: dict[str, float] | None
    """Swaps between drawn pairs (`swap_numbers`); None without a decoder that is told z."""


def run_row(folder: Path, row: str, seed: int, *, use_gpu: bool = False) -> Result:
    """Train, export, probe; goes on with what is there. Two ranks on cores, or one on a GPU."""
    config = config_of(folder, row, seed, use_gpu=use_gpu)
    store = ObjectStore()
    make_splits(store, str(folder / "avatars"), COUNTS)
    with ray_session(num_cpus=config.cluster.num_workers, num_gpus=int(use_gpu)):
        launch_training(config, local_dir=(folder / "local").resolve())
        steps = checkpoint.complete_steps(store, run_url(config))
        for step in steps:
            for split in ("val", "test"):
                _export(store, config, folder, split, step)
    probes = {step: _probe(store, config, step, pixels=step == 0) for step in steps}
    (pixels,) = (probe for probe in probes[0] if probe.name == "raw pixels")
    batch, last = config.train.global_batch, probes[steps[-1]][0]
    plain, misled = (_few_shot(store, config, steps[-1], each) for each in (None, SHORTCUT))
    newest = checkpoint.find(store, run_url(config), None)
    metrics = checkpoint.read_metrics(store, run_url(config), newest)
    speed = median(line["images_per_second"] for line in metrics)
    seconds = config.train.total_images / speed
    return Result(
        row=row,
        seed=seed,
        command=f"python -m tools.benchmarks.method_quality {row} --seed {seed}"
        + " --use-gpu" * use_gpu,
        commit=_git("rev-parse", "--short", "HEAD"),
        config_digest=digest_of_config(config),
        date=datetime.now(UTC).date().isoformat(),
        machine=_machine(use_gpu),
        images_per_second=speed,
        core_hours=config.cluster.num_workers * seconds / 3600,
        encoder_images_per_second=_encoder_speed(store, config),
        curve=[_precision(probe[0], step * batch) for step, probe in probes.items()],
        pixels=_precision(pixels, 0),
        attributes=dict(zip(last.attributes, last.average_precision, strict=True)),
        few_shot=_of_feature(plain, plain[0].name),
        misled=_of_feature(misled, misled[0].name),
        misled_best_subset=_of_feature(misled, best_subset(misled)),
        counterfactual=_counterfactual(store, config, folder),
    )


def _features_url(config: RunConfig, split: str, step: int) -> str:
    return join(run_url(config), "features", f"step-{step:08d}-{split}")


def _export(store: ObjectStore, config: RunConfig, folder: Path, split: Split, step: int) -> None:
    export_features(
        store,
        run_url=run_url(config),
        step=step,
        shards_url=str(folder / "avatars" / split),
        out_url=_features_url(config, split, step),
        num_workers=config.cluster.num_workers,
        use_gpu=config.cluster.use_gpu,
    )


def _probe(store: ObjectStore, config: RunConfig, step: int, *, pixels: bool) -> list[ProbeResult]:
    return evaluate_attributes(
        store,
        train_url=_features_url(config, "val", step),
        test_url=_features_url(config, "test", step),
        pixels=pixels,
    )


def _few_shot(
    store: ObjectStore, config: RunConfig, step: int, shortcut: Shortcut | None
) -> list[FewShotResult]:
    return evaluate_few_shot(
        store,
        train_url=_features_url(config, "val", step),
        test_url=_features_url(config, "test", step),
        shortcut=shortcut,
        pixels=False,
    )


def _encoder_speed(store: ObjectStore, config: RunConfig) -> float:
    encoder = load_encoder(store, run_url(config)).encoder
    images = torch.zeros(256, 3, config.data.image_size_px, config.data.image_size_px)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        with torch.inference_mode():
            encoder(images)
        seconds.append(time.perf_counter() - begun)
    return len(images) / median(seconds)


def _counterfactual(store: ObjectStore, config: RunConfig, folder: Path) -> dict[str, float] | None:
    if not isinstance(config.task, DitiTask):
        return None
    urls = [str(folder / "avatars" / f"pairs-{attribute}") for attribute in PAIRS]
    for attribute, url in zip(PAIRS, urls, strict=True):
        if not store.exists(join(url, INDEX_NAME)):
            spec = AvatarSpec(split="test", pairs=attribute)
            make_avatars(spec, 2 * NUM_PAIRS, store, url, rows_per_shard=2 * NUM_PAIRS, workers=1)
    found = evaluate_counterfactual(
        store,
        load_diti(store, run_url(config))[0],
        pairs_urls=urls,
        labelled_url=str(folder / "avatars" / "val"),
        count=NUM_PAIRS,
    )
    return swap_numbers([swaps.scores for swaps in found.swaps])


def _of_feature(results: list[FewShotResult], name: str) -> dict[str, float]:
    return {str(result.shots): result.mean for result in results if result.name == name}


def _precision(probe: ProbeResult, images: int) -> Precision:
    granularity = attribute_granularity()
    by = {
        kind: probe.mean_over([name for name, of in granularity.items() if of == kind])
        for kind in ("coarse", "middle", "fine")
    }
    return Precision(images, probe.mean, by)


def _machine(use_gpu: bool) -> str:
    cores = f"{os.cpu_count()} cores, {_processor()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if use_gpu else cores


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return found.stdout.strip()


def table() -> Iterator[str]:
    """The results that are there, a line each; averages are of the whole feature."""
    yield f"{'row':22} {'seed':>4} {'images':>7} {'AP':>6} {'coarse':>7} {'middle':>7} {'fine':>6}"
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        first, last = found["curve"][0], found["curve"][-1]
        for name, at in ((found["row"], last), ("  untrained", first)):
            by = at["by_granularity"]
            yield (
                f"{name:22} {found['seed']:>4} {at['images']:>7} {at['all']:>6.3f} "
                f"{by['coarse']:>7.3f} {by['middle']:>7.3f} {by['fine']:>6.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and probe rows of the table of methods.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    parser.add_argument("--use-gpu", action="store_true", help="train and export on a GPU")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="data and runs (runs/quality)"
    )
    args = parser.parse_args()
    if unknown := [row for row in args.rows if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]}; there are: {', '.join(ROWS)}")
    folder = args.folder.absolute()
    for row in args.rows:
        file = RESULTS / f"{row}-{args.seed}.json"
        if file.exists():
            print(f"{file} is there already")
            continue
        result = run_row(folder, row, args.seed, use_gpu=args.use_gpu)
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(result), indent=1) + "\n")
        print(f"{row}: {result.curve[-1].all:.3f}, written to {file}", flush=True)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
