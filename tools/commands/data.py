"""Verbs over shard sets."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.commands import make
from tools.commands.options import AsJson, Overrides, check_out_file, not_empty
from tools.commands.outcome import clear_errors
from tools.tables import counted, print_audit, print_set_stats, size_of

CORES = os.cpu_count() or 1
app = typer.Typer(
    help="Make, index and check shard sets.", no_args_is_help=True, rich_markup_mode=None
)


app.add_typer(make.app, name="make")

ShardSet = Annotated[
    str, typer.Argument(callback=not_empty, help="Folder of a shard set with its index.")
]
Workers = Annotated[int, typer.Option(min=1, help="Ray actors, one core each.")]


@app.command()
def preprocess(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG.YAML", help="From where, to where, and what stays.")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make training shards of img2dataset's output: filtered, without duplicates, resized, mixed.

    Every sample is accounted for: it stays, or a rule, a duplicate or a fault is named. Run it
    again to go on; the result does not depend on how often it was stopped, or on the workers.

    Example: diti data preprocess configs/shards/laion.yaml raw=s3://bucket/raw
    out=s3://bucket/train
    """
    with clear_errors(goes_on=True):
        from configs.loading import load_preprocess

        config = load_preprocess(config_file, tuple(overrides or ()))
        from cluster.preprocess import preprocess as run
        from data_pipelines.object_store import ObjectStore
        from tools.progress import pass_bars

        with pass_bars({"screen_tar": "screening", "mix_group": "mixing"}) as show:
            found, audit = run(ObjectStore(**config.store.model_dump()), config, on_progress=show)
        if as_json:
            typer.echo(json.dumps({"index": found.digest, **audit.to_json()}))
            return
        print_audit(audit)
        typer.echo(f"{size_of(found)} at {config.out}, index {found.digest[:12]}")


@app.command()
def encode(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.YAML", help="A run with data.encoded: where to.")
    ],
    overrides: Overrides = None,
    workers: Workers = CORES,
) -> None:
    """Make latents, and embeddings of captions, of a run's shards beforehand.

    The run file says of which shards, by which backbone, whether of captions
    (task.backbone.condition) and of mirrored images (data.horizontal_flip), and where to
    (data.encoded). With cluster.use_gpu each worker has a GPU. Run it again to go on.

    Example: diti data encode configs/runs/laion512_sd21.yaml data.encoded=s3://bucket/encoded
    """
    with clear_errors(goes_on=True):
        from configs.loading import load_run

        config = load_run(run_file, tuple(overrides or ()))
        from cluster.encode import encode_set
        from tools.progress import shard_bar

        with shard_bar("encoding") as show:
            found, encoding = encode_set(config, num_workers=workers, on_progress=show)
        shapes = ", ".join(f"{name} {shape}" for name, shape in encoding.shapes.items())
        typer.echo(f"{size_of(found)} at {config.data.encoded}: {shapes} in float16")


@app.command()
def index(
    url: Annotated[
        str,
        typer.Argument(callback=not_empty, help="Folder of tars: s3://bucket/prefix or a path."),
    ],
    workers: Workers = CORES,
) -> None:
    """Index tars that are there already, so that they can be trained on. Run it again to go on.

    Reads every tar of the folder and its sub-folders once, but decodes no image. Damaged ones are
    named and left out; then the exit code is 1. A sample is the members whose names agree up to the
    first dot.

    Example: diti data index s3://bucket/laion-shards
    """
    with clear_errors(goes_on=True):
        from cluster.index import index_set
        from data_pipelines.object_store import ObjectStore
        from data_pipelines.sample_images import IMAGE_EXTENSIONS
        from tools.progress import shard_bar

        store = ObjectStore()
        before = index_before(store, url)
        with shard_bar("indexing") as show:
            found, tars = index_set(store, url, num_workers=workers, on_progress=show)
        typer.echo(f"{size_of(found)} at {url}, index {found.digest[:12]}")
        if before is not None and before.digest != found.digest:
            typer.echo(
                f"it was {size_of(before)}, index {before.digest[:12]}: runs that began with that "
                f"one cannot go on with this one"
            )
        say_interleaved(sum(tar.num_interleaved for tar in tars.values()))
        if without := sum(tar.num_without_image for tar in tars.values()):
            none_of = ", ".join(IMAGE_EXTENSIONS)
            typer.echo(f"without an image ({none_of}): {counted(without, 'sample')}")
        report_problems([tar.problem for tar in tars.values() if tar.problem], "left out")


_READ = "every tar has the bytes that were indexed, and every image can be decoded"
_LISTED = "every tar is there, with the size and version that were indexed (--deep reads them)"


@app.command()
def verify(
    url: ShardSet,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte of every tar, and decode every image.")
    ] = False,
    workers: Workers = CORES,
) -> None:
    """Compare a shard set with its index: what is missing, cut, replaced, repeated, not indexed.

    Without --deep only what the store lists is compared: names, sizes, ETags or times.

    Example: diti data verify s3://bucket/laion-shards --deep
    """
    with clear_errors():
        from cluster.index import verify_set
        from data_pipelines.object_store import ObjectStore
        from data_pipelines.shard_index import read_index
        from tools.progress import shard_bar

        store = ObjectStore()
        found = read_index(store, url)
        with shard_bar("verifying") as show:
            problems, interleaved = verify_set(
                store, found, deep=deep, num_workers=workers, on_progress=show
            )
        typer.echo(f"{size_of(found)} at {url}")
        say_interleaved(interleaved)
        report_problems(problems, "found")
        typer.echo("nothing wrong: " + (_READ if deep else _LISTED))


@app.command()
def stats(
    url: ShardSet,
    out: Annotated[Path | None, typer.Option(help="HTML page to write, with plots.")] = None,
    workers: Workers = CORES,
) -> None:
    """Count what a shard set holds: sizes, captions, scores, members. Reads every tar once.

    Example: diti data stats s3://bucket/laion --out laion.html
    """
    with clear_errors():
        from cluster.stats import count_set
        from data_pipelines.object_store import ObjectStore
        from data_pipelines.shard_index import read_index
        from tools.progress import shard_bar
        from tools.set_report import make_set_report

        if out is not None:
            check_out_file(out)
        store = ObjectStore()
        found = read_index(store, url)
        with shard_bar("counting") as show:
            totals = count_set(store, found, num_workers=workers, on_progress=show)
        typer.echo(f"{size_of(found)} at {url}")
        print_set_stats(totals)
        if out is not None:
            out.write_text(make_set_report(found, totals), encoding="utf-8")
            typer.echo(f"page: {out.resolve()}")


@app.command()
def repair(
    run: Annotated[str, typer.Argument(help="The run's folder: OUTPUT/NAME.")],
) -> None:
    """Read a run's dead letters again, and clear those that can be used by now.

    Example: diti data repair s3://bucket/runs/my-run
    """
    with clear_errors():
        from data_pipelines.bad_samples import ranked_causes
        from data_pipelines.object_store import ObjectStore
        from tools.progress import working
        from tools.repair import repair as read_again

        with working("reading dead letters again"):
            found = read_again(ObjectStore(), run)
        bad = found.still_bad.total()
        everything = found.mended + bad
        typer.echo(f"{found.mended} of {everything} samples can be used again")
        if bad:
            typer.echo(
                f"diti: {bad} of {everything} samples still cannot be used: "
                f"{ranked_causes(found.still_bad)}",
                err=True,
            )
            raise typer.Exit(1)


def index_before(store: Any, url: str) -> Any:
    """The index that is there already and will be replaced, if it can be read."""
    from data_pipelines.object_store import ObjectMissingError
    from data_pipelines.shard_index import read_index
    from data_pipelines.tar_members import ShardMismatchError

    try:
        return read_index(store, url)
    except (ObjectMissingError, ShardMismatchError):
        return None


def say_interleaved(samples: int) -> None:
    if samples:
        typer.echo(
            f"{samples} samples have members of others among theirs: WebDataset's own reader would "
            f"split them, this project reads them"
        )


def report_problems(problems: list[str], what: str) -> None:
    """Print them and end with exit code 1, if there are any."""
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        typer.echo(f"diti: {counted(len(problems), 'problem')} {what}", err=True)
        raise typer.Exit(1)
