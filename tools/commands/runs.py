"""Verbs over a whole run: demo and its server, train, export, report."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tools.commands.options import (
    AsJson,
    AuthorsConfig,
    Ema,
    LocalDir,
    Misleading,
    Overrides,
    Run,
    Step,
    Timesteps,
    Untrained,
    check_out_file,
    ends_of,
    not_empty,
)
from tools.commands.outcome import clear_errors
from tools.evaluation_tables import print_losses, print_probes
from tools.tables import counted, print_export_outlook, print_outlook


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """The whole line on this machine: data, S3, Ray, two ZeRO workers, features, report page.

    Example: diti demo --folder /tmp/diti-demo
    """
    with clear_errors(goes_on=True):
        from tools.demo import run_demo

        result = run_demo(folder, tuple(overrides or ()))
        print_probes(result.probes)
        print_losses(result.losses)
        typer.echo(f"report: {result.report.resolve()}")


def s3(
    folder: Annotated[Path, typer.Argument(help="The demo's folder.")] = Path("runs/demo"),
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Default: your shell.")
    ] = None,
) -> None:
    """Run a command, or a shell, beside the demo's S3 server: its data are at s3://diti.

    Example: diti s3 runs/demo diti features show s3://diti/runs/demo/features/step-00000256-test
    """
    with clear_errors():
        from tools.demo import run_beside_s3

        raise typer.Exit(run_beside_s3(folder, command or [os.environ.get("SHELL", "/bin/sh")]))


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="What to train.")],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Start from these weights: a published .pt file, or a run's folder."),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, help="Go back to this checkpoint; later ones are set aside."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A setting, or a section, that may differ from the checkpoint's."
        ),
    ] = None,
    replay: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="STEP", help="Only take this step again, and show each sample's loss."
        ),
    ] = None,
    local_dir: LocalDir = Path("runs/local"),
) -> None:
    """Train on this machine, or on the Ray cluster at RAY_ADDRESS. Run it again to resume.

    Example: diti train configs/runs/demo.yaml data.shards=data/avatars/train output=runs
    """
    without = None if from_step is None else "--from-step"
    with clear_errors(goes_on=True, without=without):
        from configs.loading import load_run  # a wrong file is refused before all else is imported

        changes = list(overrides or ())
        if checkpoint is not None:
            from data_pipelines.object_store import absolute

            changes.append(f"task.start_from={json.dumps(absolute(checkpoint))}")
        config = load_run(run_file, tuple(changes))
        if replay is not None:
            if from_step is not None:
                raise ValueError("--replay goes back by itself; leave --from-step out")
            from cluster.launch import with_absolute_paths
            from pretrain.replay import replay as take_again
            from tools.tables import print_replay

            allowed = tuple(allow_change or ())
            print_replay(take_again(with_absolute_paths(config), replay, allowed))
            return

        from pretrain.preflight import run_url

        manifest = launch(config, local_dir, from_step, tuple(allow_change or ()))
        typer.echo(f"{run_url(config)}: {manifest.images} images, {manifest.name} complete")
        if causes := manifest.bad_samples:
            typer.echo(
                f"{counted(sum(causes.values()), 'sample')} could not be used and had substitutes: "
                f"see {run_url(config)}/dead-letters, or `diti data repair` once they are mended"
            )


def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="What would be trained.")],
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Workers. Default: cluster.num_workers.")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Plan the export of its features instead.")
    ] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="With --export: images. Default: LAION-2B's.")
    ] = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(min=1e-3, help="With --export: of a worker. Default: measured here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What each worker will hold in memory, by part and ZeRO stage, before any is started.

    With --export: shards and hours of each worker, and bytes by dtype and time-steps.

    Example: diti plan configs/runs/demo.yaml --world-size 8 data.shards=data/avatars/train
    """
    with clear_errors():
        from configs.loading import load_run

        if not export and (images or images_per_second):
            raise ValueError("--images and --images-per-second belong to --export; give that too")
        config = load_run(run_file, tuple(overrides or ()))
        workers = world_size or config.cluster.num_workers
        if export:
            from tools.export_plan import LAION_2B_IMAGES, look_ahead_to_export

            size = images or LAION_2B_IMAGES
            found = look_ahead_to_export(
                config, workers=workers, images=size, images_per_second=images_per_second
            )
            show = print_export_outlook
        else:
            from tools.plan import look_ahead

            found, show = look_ahead(config, workers), print_outlook
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=1))
        else:
            show(found)  # pyright: ignore[reportArgumentType] (each has its own)


def export(
    shards: Annotated[str, typer.Option(callback=not_empty, help="Shard set to encode.")],
    out: Annotated[str, typer.Option(callback=not_empty, help="Folder for the features.")],
    run: Run = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Instead of a run: a published .pt file that every worker can reach."),
    ] = None,
    config: AuthorsConfig = None,
    ema: Ema = True,
    step: Step = None,
    timesteps: Timesteps = None,
    dtype: Annotated[
        Literal["float16", "int8", "float32"],
        typer.Option(help="Of the values. int8: a scale per dimension, in the manifest."),
    ] = "float16",
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KIND]",
            help="A field of each sample's json that becomes a column: string, int, float or bool.",
        ),
    ] = None,
    error_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.001,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors, one core each.")] = 2,
    use_gpu: Annotated[bool, typer.Option(help="A GPU for each, computing in bfloat16.")] = False,
) -> None:
    """Encode every image of a shard set into Parquet, one column per time-step subset.

    Example: diti export runs/my-run --shards data/avatars/test --out runs/my-run/features/test
    """
    with clear_errors(goes_on=True):
        from cluster.export import export_features
        from data_pipelines.object_store import ObjectStore
        from tools.progress import export_bar

        with export_bar("export") as (say_start, show):
            manifest = export_features(
                ObjectStore(),
                run_url=run,
                step=step,
                checkpoint_url=checkpoint,
                config=config,
                ema=ema,
                timesteps=ends_of(timesteps),
                dtype=dtype,
                copied=kinds_of(copy or []),
                error_budget=error_budget,
                use_gpu=use_gpu,
                shards_url=shards,
                out_url=out,
                num_workers=workers,
                on_start=say_start,
                on_progress=show,
            )
        typer.echo(f"{counted(manifest.rows, 'row')} of {manifest.checkpoint} at {out}")
        if manifest.skipped:
            typer.echo(
                f"{counted(manifest.skipped, 'sample')} could not be used and have no row: "
                f"{out}/_commits says which, and why"
            )


def kinds_of(texts: list[str]) -> dict[str, Any]:
    """`width:int`: name and kind of a column to copy; a string without a kind."""
    kinds: dict[str, Any] = {}
    for text in texts:
        name, _, kind = text.partition(":")
        if not name or name in kinds:
            raise ValueError(f"--copy {text!r}: give each field once, as NAME or NAME:KIND")
        kinds[name] = kind or "string"
    return kinds


def report(
    run: Annotated[str, typer.Argument(help="The run's folder: OUTPUT/NAME.")],
    train_features: Annotated[
        str, typer.Option(metavar="URL", help="Features that probes learn on.")
    ],
    test_features: Annotated[
        str, typer.Option(metavar="URL", help="Features that probes are scored on.")
    ],
    untrained: Untrained = None,
    shortcut: Misleading = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Pairs that differ in one attribute, for counterfactuals; several times.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page about a run: losses, pictures, probes.

    Example: diti report runs/my-run --train-features F/val --test-features F/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_attributes
        from tools.progress import working
        from tools.report import make_report

        check_out_file(out)
        store = ObjectStore()
        with working("probing attributes"):
            probes = evaluate_attributes(
                store, train_url=train_features, test_url=test_features, untrained=untrained
            )
        with working("reading the run") as say:
            page, losses = make_report(
                store,
                run_url=run,
                train_url=train_features,
                test_url=test_features,
                probes=probes,
                shortcut=shortcut,
                pairs_urls=pairs or (),
                say=say,
            )
        out.write_text(page, encoding="utf-8")
        print_losses(losses)
        typer.echo(f"report: {out.resolve()}")


def publish(
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", callback=not_empty, help="Folder for the release: a path or s3://."
        ),
    ],
    run: Run = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead of a run: a published .pt file of DiTi or PDAE.")
    ] = None,
    config: AuthorsConfig = None,
    ema: Ema = True,
    step: Step = None,
    licence: Annotated[
        str | None,
        typer.Option(
            metavar="SPDX", help="Of the weights, such as CC-BY-NC-4.0. Default: not stated."
        ),
    ] = None,
    features: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="TRAIN TEST",
            help="Two feature sets exported with this encoder, for the probe results on the card.",
        ),
    ] = None,
) -> None:
    """Write the encoder for others: weights, model card, and code that loads it with torch alone.

    Example: diti publish runs/my-run --out runs/my-run/encoder --licence CC-BY-4.0
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from pretrain.trained import choose_encoder
        from tools.progress import console
        from tools.publish import publish_encoder

        store = ObjectStore()
        _, trained = choose_encoder(store, run, step, checkpoint, config, ema=ema)
        written = publish_encoder(
            store, trained, out, ema=ema, licence=licence, features=features, say=console.print
        )
        typer.echo(
            f"encoder of {trained.checkpoint} at {out}: {written.size_bytes} bytes of weights, "
            f"SHA-256 {written.weights_sha256[:12]}; loaded back, z agrees to {written.error:.1e}"
        )


def launch(
    config: Any,
    local_dir: Path,
    from_step: int | None = None,
    allow_change: tuple[str, ...] = (),
) -> Any:
    from cluster.launch import launch_training
    from tools.progress import say_start, training_bar

    with training_bar("training", config.train.total_images) as show_progress:
        return launch_training(
            config,
            local_dir=local_dir.resolve() / config.name,
            from_step=from_step,
            allow_change=allow_change,
            on_start=say_start,
            on_progress=show_progress,
        )
