"""Verbs over exported features."""

import json
from typing import Annotated

import typer

from tools.commands.data import CORES, Workers, report_problems
from tools.commands.options import AsJson, Timesteps, ends_of, not_empty
from tools.commands.outcome import clear_errors
from tools.tables import counted, print_features, print_features_diff

app = typer.Typer(help="Exported features.", no_args_is_help=True, rich_markup_mode=None)

FeaturesUrl = Annotated[str, typer.Argument(metavar="URL", help="Folder with manifest.json.")]


@app.command()
def show(url: FeaturesUrl, as_json: AsJson = False) -> None:
    """What a feature set holds: subsets with their time-steps and dimensions, counts, digests.

    Example: diti features show runs/my-run/features/test
    """
    with clear_errors():
        from data_pipelines.feature_store import read_manifest
        from data_pipelines.object_store import ObjectStore

        manifest = read_manifest(ObjectStore(), url)
        if as_json:
            typer.echo(json.dumps(manifest.to_json(), indent=1))
        else:
            print_features(manifest)


@app.command()
def verify(
    url: FeaturesUrl,
    shards: Annotated[
        str | None, typer.Option(help="Their shard set. Default: where it was at the export.")
    ] = None,
    with_shards: Annotated[
        bool, typer.Option("--with-shards/--without-shards", help="Join every row to its sample.")
    ] = True,
    workers: Workers = CORES,
) -> None:
    """Read every part: counts, checksums, rows against the shards, NaN, constant dimensions.

    Example: diti features verify runs/my-run/features/test
    """
    with clear_errors():
        from cluster.features import verify_features
        from data_pipelines.object_store import ObjectStore
        from tools.progress import shard_bar

        with shard_bar("verifying") as show_progress:
            found = verify_features(
                ObjectStore(),
                url,
                shards_url=shards,
                with_shards=with_shards,
                num_workers=workers,
                on_progress=show_progress,
            )
        report_problems(found.problems, "found")
        manifest = found.manifest
        joined = ", each joined to its sample" if with_shards else "; not joined to their shards"
        typer.echo(
            f"nothing wrong: {counted(manifest.rows, 'row')} in "
            f"{counted(len(manifest.parts), 'part')}{joined}"
        )


@app.command()
def diff(first: FeaturesUrl, second: FeaturesUrl, workers: Workers = CORES) -> None:
    """How two feature sets differ, row by row and column by column; exit code 1 if they do.

    Example: diti features diff features/float16 features/int8
    """
    with clear_errors():
        from cluster.features import diff_features
        from data_pipelines.object_store import ObjectStore
        from tools.progress import shard_bar

        with shard_bar("comparing") as show_progress:
            found = diff_features(
                ObjectStore(), first, second, num_workers=workers, on_progress=show_progress
            )
        print_features_diff(found)
        if not found.is_none:
            raise typer.Exit(1)
        typer.echo("no difference")


@app.command()
def to_webdataset(
    url: FeaturesUrl,
    out: Annotated[str, typer.Option(callback=not_empty, help="Folder for the tars.")],
    timesteps: Timesteps = None,
    workers: Workers = CORES,
) -> None:
    """Write features as WebDataset tars with the names and keys of their image shards.

    Example: diti features to-webdataset features/laion --out s3://bucket/laion-z --timesteps 0:300
    """
    with clear_errors():
        from cluster.features import features_to_shards
        from data_pipelines.object_store import ObjectStore
        from tools.progress import shard_bar

        with shard_bar("writing") as show_progress:
            index = features_to_shards(
                ObjectStore(),
                url,
                out,
                timesteps=ends_of(timesteps),
                num_workers=workers,
                on_progress=show_progress,
            )
        typer.echo(
            f"{counted(index.num_samples, 'sample')} in {counted(len(index.shards), 'shard')} "
            f"at {out}"
        )
