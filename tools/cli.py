"""The `diti` command: arguments in, one clear line of error out.

Exit codes: 0 done, 1 a run that failed, 2 usage or configuration refused, 130 interrupted.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="diti",
    help="Pre-train the DiTi encoder on image shards and read its features by time-step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Make shard sets.", no_args_is_help=True, rich_markup_mode=None)
backbone_app = typer.Typer(help="Frozen denoisers.", no_args_is_help=True, rich_markup_mode=None)
features_app = typer.Typer(help="Exported features.", no_args_is_help=True, rich_markup_mode=None)
eval_app = typer.Typer(help="What features hold.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(backbone_app, name="backbone")
app.add_typer(features_app, name="features")
app.add_typer(eval_app, name="eval")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the run file, in YAML syntax."),
]
LocalDir = Annotated[
    Path, typer.Option(help="Scratch folder on this node: parts on their way to storage, wandb.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AuthorsConfig = Annotated[
    str | None,
    typer.Option(
        "--config", help="Its config.yml. Default: one beside the checkpoint or one folder up."
    ),
]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Side of a denoiser's images, in pixels.")
]
Ema = Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, or the online ones.")]
HeadChannels = Annotated[int | None, typer.Option(min=1, help="Channels per attention head.")]
NumHeads = Annotated[int | None, typer.Option(min=1, help="Attention heads.")]


Order = Annotated[
    Literal["legacy", "new"] | None,
    typer.Option(help="Heads before q, k, v (legacy) or after (new). Default: legacy."),
]


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """The whole line on this machine: data, S3, Ray, two ZeRO workers, features, report page.

    Example: diti demo --folder /tmp/diti-demo
    """
    with _clear_errors():
        from tools.demo import run_demo

        result = run_demo(folder, tuple(overrides or ()))
        _print_probes(result.probes)
        _print_losses(result.losses)
        typer.echo(f"report: {result.report.resolve()}")


@data_app.command()
def make(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="avatars: DiceBear faces with exact labels.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the shards: s3://bucket/prefix or a path.")],
    count: Annotated[int, typer.Option(min=1, help="Images.")],
    style: Annotated[str, typer.Option(help="DiceBear style.")] = "voxel-art",
    size: Annotated[int, typer.Option(help="Side in pixels: 32, 64 or 128.")] = 32,
    split: Annotated[str, typer.Option(help="train, val or test: disjoint faces.")] = "train",
    seed: Annotated[int, typer.Option(help="Other seeds, other faces.")] = 0,
    correlate: Annotated[
        str | None, typer.Option(help="A:B:P makes attribute B equal A in a share P of images.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Rows 2i, 2i+1: the same face, this attribute changed.")
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Images per tar.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Render a built-in data set into WebDataset tars with their index.

    Example: diti data make avatars --count 10000 --split train --out data/avatars/train
    """
    with _clear_errors():
        from data_pipelines.avatars import AvatarSpec, parse_correlation
        from data_pipelines.object_store import ObjectStore
        from tools.make_data import make_avatars
        from tools.progress import image_bar

        if kind != "avatars":
            raise ValueError(f"unknown data set {kind!r}; there is 'avatars'")
        spec = AvatarSpec(
            style=style,
            size_px=size,
            seed=seed,
            split=split,  # pyright: ignore[reportArgumentType] (checked by AvatarSpec)
            correlate=parse_correlation(correlate) if correlate else None,
            pairs=pairs,
        )
        store = ObjectStore()
        store.check_access(out, write=True)
        with image_bar(f"{kind} {split}", count) as advance:
            index = make_avatars(
                spec,
                count,
                store,
                out,
                rows_per_shard=rows_per_shard,
                workers=workers,
                on_shard=advance,
            )
        typer.echo(
            f"{index.num_samples} images in {len(index.shards)} shards at {out}, "
            f"index {index.digest[:12]}"
        )


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="What to train.")],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Start from these weights: a published .pt file, or a run's folder."),
    ] = None,
    local_dir: LocalDir = Path("runs/local"),
) -> None:
    """Train on this machine, or on the Ray cluster at RAY_ADDRESS. Run it again to resume.

    Example: diti train configs/runs/demo.yaml data.shards=data/avatars/train output=runs
    """
    with _clear_errors():
        from configs.loading import load_run
        from data_pipelines.object_store import absolute
        from pretrain.preflight import run_url

        changes = list(overrides or ())
        if checkpoint is not None:
            changes.append(f"task.start_from={json.dumps(absolute(checkpoint))}")
        config = load_run(run_file, tuple(changes))
        manifest = _launch(config, local_dir)
        typer.echo(f"{run_url(config)}: {manifest.images} images, {manifest.name} complete")


@backbone_app.command("train")
def backbone_train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="A run of kind denoiser.")],
    out: Annotated[str, typer.Option(help="Where to write NAME.safetensors and its card.")],
    overrides: Overrides = None,
    local_dir: LocalDir = Path("runs/local"),
) -> None:
    """Train a small denoiser and write it as a backbone: safetensors and a JSON card.

    Example: diti backbone train configs/runs/avatars32_backbone.yaml --out avatars32.safetensors
    """
    with _clear_errors():
        from configs.loading import load_run
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import check_backbone_run, write_backbone

        _check_backbone_out(ObjectStore(), out)
        config = load_run(run_file, tuple(overrides or ()))
        check_backbone_run(config)
        manifest = _launch(config, local_dir)
        command = " ".join(["diti", "backbone", "train", str(run_file), *(overrides or ())])
        digest = write_backbone(config, manifest, out, command=command)
        typer.echo(f"{out}: SHA-256 {digest}")


@backbone_app.command("samples")
def backbone_samples(
    weights: Annotated[str, typer.Argument(help="NAME.safetensors, or builtin/NAME.safetensors.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Images, in rows of 12.")] = 48,
) -> None:
    """Draw unconditional samples of a backbone, to see what it has learnt.

    Example: diti backbone samples builtin/avatars32.safetensors --out samples.png
    """
    with _clear_errors():
        from tools.backbone import sample_sheet

        _check_out_file(out)
        out.write_bytes(sample_sheet(weights, count))
        typer.echo(str(out))


@backbone_app.command("import")
def backbone_import(
    file: Annotated[str, typer.Argument(metavar="FILE.PT", help="A published checkpoint.")],
    out: Annotated[str, typer.Option(help="Where to write NAME.safetensors and its card.")],
    config: AuthorsConfig = None,
    image_size: ImageSize = None,
    ema: Ema = True,
    head_channels: HeadChannels = None,
    num_heads: NumHeads = None,
    attention_order: Order = None,
) -> None:
    """Make a backbone of a published denoiser: the authors', a DiTi or PDAE run's, or ADM's.

    Example: diti backbone import pre-trained-dpms/celeba64/checkpoint.pt --image-size 64
    --out celeba64.safetensors
    """
    with _clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import ImportOptions, import_backbone

        store = ObjectStore()
        _check_backbone_out(store, out)
        options = ImportOptions(config, ema, image_size, num_heads, head_channels, attention_order)
        digest, summary = import_backbone(store, file, out, options)
        typer.echo(f"{out}: SHA-256 {digest}\n{summary}")


@backbone_app.command("inspect")
def backbone_inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="FILE.pt or FILE.safetensors.")],
    config: AuthorsConfig = None,
    image_size: ImageSize = None,
    ema: Ema = True,
    head_channels: HeadChannels = None,
    num_heads: NumHeads = None,
    attention_order: Order = None,
    as_json: AsJson = False,
) -> None:
    """What a published checkpoint or a backbone holds, and where each thing was found.

    Example: diti backbone inspect runs/celeba64/diti64/checkpoints/latest.pt
    """
    with _clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import ImportOptions, inspect_file

        options = ImportOptions(config, ema, image_size, num_heads, head_channels, attention_order)
        found = inspect_file(ObjectStore(), file, options)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            _print_contents(found)


@app.command()
def export(
    shards: Annotated[str, typer.Option(help="Shard set to encode.")],
    out: Annotated[str, typer.Option(help="Folder for the features.")],
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run's folder: OUTPUT/NAME.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Instead of a run: a published .pt file that every worker can reach."),
    ] = None,
    config: AuthorsConfig = None,
    ema: Ema = True,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Checkpoint; 0 is the untrained encoder. Default: newest."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors, one core each.")] = 2,
) -> None:
    """Encode every image of a shard set into Parquet, one column per time-step subset.

    Example: diti export runs/my-run --shards data/avatars/test --out runs/my-run/features/test
    """
    with _clear_errors():
        from cluster.export import export_features
        from data_pipelines.object_store import ObjectStore
        from tools.progress import progress_bar

        with progress_bar("export", 1.0) as update:
            manifest = export_features(
                ObjectStore(),
                run_url=run,
                step=step,
                checkpoint_url=checkpoint,
                config=config,
                ema=ema,
                shards_url=shards,
                out_url=out,
                num_workers=workers,
                on_progress=lambda s: update(
                    s.done / max(1, s.done + s.leased + s.waiting + len(s.failures)),
                    f"{s.done} shards done",
                ),
            )
        typer.echo(f"{manifest.rows} rows of {manifest.checkpoint} at {out}")


@features_app.command()
def show(
    url: Annotated[str, typer.Argument(help="Folder with manifest.json.")],
    as_json: AsJson = False,
) -> None:
    """What a feature set holds: subsets with their time-steps and dimensions, counts, digests.

    Example: diti features show runs/my-run/features/test
    """
    with _clear_errors():
        from data_pipelines.feature_store import read_manifest
        from data_pipelines.object_store import ObjectStore

        manifest = read_manifest(ObjectStore(), url)
        if as_json:
            typer.echo(json.dumps(asdict(manifest), indent=1))
            return
        size = sum(part.size_bytes for part in manifest.parts.values())
        typer.echo(
            f"{manifest.rows} rows, {manifest.columns[-1].dims[1]} dimensions {manifest.dtype}, "
            f"{len(manifest.parts)} parts, {size} bytes ({size / manifest.rows:.0f} per row)\n"
            f"source   {manifest.source_url} (index {manifest.index_digest[:12]})\n"
            f"encoder  {manifest.checkpoint} (SHA-256 {manifest.encoder_sha256[:12]}), "
            f"backbone {manifest.backbone_sha256[:12]}"
        )
        table = Table("column", "time-steps", "dimensions", "mean", "std")
        for column in manifest.columns:
            dims = slice(*column.dims)
            table.add_row(
                column.name,
                f"{column.timesteps[0]}-{column.timesteps[1]}",
                f"{column.dims[0]}-{column.dims[1]}",
                f"{_average(manifest.mean[dims]):.3f}",
                f"{_average(manifest.std[dims]):.3f}",
            )
        Console().print(table)


@eval_app.command()
def attributes(
    train_features: Annotated[str, typer.Argument(help="Features that the probe learns on.")],
    test_features: Annotated[str, typer.Argument(help="Features that it is scored on.")],
    untrained: Annotated[
        tuple[str, str] | None,
        typer.Option(help="The same two, exported with --step 0, to compare with."),
    ] = None,
    pixels: Annotated[bool, typer.Option(help="Also probe the raw pixels.")] = True,
    as_json: AsJson = False,
) -> None:
    """Average precision of every labelled attribute: whole feature, each subset, baselines.

    Labels are read from the shards that the features were exported from.

    Example: diti eval attributes runs/my-run/features/val runs/my-run/features/test
    """
    with _clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_attributes

        results = evaluate_attributes(
            ObjectStore(),
            train_url=train_features,
            test_url=test_features,
            untrained=untrained,
            pixels=pixels,
        )
        if as_json:
            rows = [
                {"name": r.name, "dims": r.dims, "mean": r.mean}
                | {"attributes": dict(zip(r.attributes, r.average_precision, strict=True))}
                for r in results
            ]
            typer.echo(json.dumps(rows, indent=1))
        else:
            _print_probes(results)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The run's folder: OUTPUT/NAME.")],
    train_features: Annotated[str, typer.Option(help="Features that probes learn on.")],
    test_features: Annotated[str, typer.Option(help="Features that probes are scored on.")],
    untrained: Annotated[
        tuple[str, str] | None, typer.Option(help="The same two, exported with --step 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page about a run: losses, pictures, probes.

    Example: diti report runs/my-run --train-features F/val --test-features F/test
    """
    with _clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_attributes
        from tools.report import make_report

        _check_out_file(out)
        store = ObjectStore()
        probes = evaluate_attributes(
            store, train_url=train_features, test_url=test_features, untrained=untrained
        )
        page, losses = make_report(store, run_url=run, test_url=test_features, probes=probes)
        out.write_text(page, encoding="utf-8")
        _print_losses(losses)
        typer.echo(f"report: {out.resolve()}")


def _launch(config: Any, local_dir: Path) -> Any:
    from cluster.launch import launch_training
    from tools.progress import training_bar

    with training_bar("training", config.train.total_images) as show_progress:
        return launch_training(
            config, local_dir=local_dir.resolve() / config.name, on_progress=show_progress
        )


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what can go wrong into one line on standard error and an exit code."""
    from concurrent.futures import BrokenExecutor

    from cluster.export import ExportFailedError
    from cluster.launch import RunFailedError
    from cluster.session import ClusterError
    from data_pipelines.local_s3 import LocalS3Error

    refusals = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
    failures = (RunFailedError, ExportFailedError, ClusterError, LocalS3Error, BrokenExecutor)
    try:
        yield
    except refusals as error:
        typer.echo(f"diti: {error}", err=True)
        raise typer.Exit(2) from error
    except (*failures, OSError) as error:
        typer.echo(f"diti: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("diti: interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def _print_probes(results: list[Any]) -> None:
    from data_pipelines.avatars import attribute_granularity

    granularity = attribute_granularity()
    groups = {
        group: [name for name in results[0].attributes if granularity.get(name) == group]
        for group in ("coarse", "middle", "fine")
    }
    groups = {group: names for group, names in groups.items() if names}
    table = Table("feature", "dims", "mean AP", *groups, title="average precision on unseen images")
    for result in results:
        means = [f"{result.mean_over(names):.3f}" for names in groups.values()]
        table.add_row(result.name, str(result.dims), f"{result.mean:.3f}", *means)
    Console().print(table)


def _print_losses(losses: Any) -> None:
    table = Table("feature given to the decoder", "loss", title="loss on unseen images")
    table.add_row("none: backbone alone", f"{losses.backbone:.5f}")
    table.add_row("the image's own (DiTi)", f"{losses.diti:.5f}")
    table.add_row("another image's", f"{losses.shuffled:.5f}")
    table.add_row("the average", f"{losses.mean:.5f}")
    Console().print(table)


def _print_contents(found: dict[str, Any]) -> None:
    weights = "" if found.get("step") is None else f", step {found['step']}"
    weights += "" if "ema" not in found else ", averaged" if found["ema"] else ", online"
    typer.echo(f"{found['file']}: {found['kind']}{weights}\nSHA-256 {found['sha256']}")
    parts = Table("part", "tensors", "parameters")
    for name, counts in found["parts"].items():
        parts.add_row(name, str(counts["tensors"]), f"{counts['parameters']:,}")
    Console().print(parts)
    shown = ("image_size_px", "prediction", "unet", "schedule", "encoder", "mode")
    for key in (key for key in shown if found.get(key) is not None):
        typer.echo(f"{key}: {_in_a_line(found[key])}")
    if partition := found.get("partition"):
        dims = partition["dim_ends"]
        typer.echo(f"partition: {len(dims)} subsets of {dims[-1]} dimensions, ending at {dims}")
    typer.echo(f"config: {found['config'] or 'none found'}")
    for what, origin in found["origins"].items():
        typer.echo(f"  {what}: {origin}")


def _in_a_line(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {inner}" for key, inner in value.items())


def _check_backbone_out(store: Any, out: str) -> None:
    if not out.endswith(".safetensors"):
        raise ValueError(f"--out must end in .safetensors, got {out!r}")
    store.check_access(out.rpartition("/")[0] or ".", write=True)


def _check_out_file(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(
            f"--out {out} cannot be written: it needs a file name in a folder that exists"
        )


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the `diti` command."""
    # `kill` unwinds like Ctrl-C does, so that servers and workers end with us.
    signal.signal(signal.SIGTERM, _terminated)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(app())


if __name__ == "__main__":
    main()
