"""`diti data make`: the built-in data sets, raw or ready, and folders of images."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.commands.options import not_empty
from tools.commands.outcome import clear_errors
from tools.tables import counted, size_of

CORES = os.cpu_count() or 1
app = typer.Typer(
    help="Write a shard set. Example: diti data make avatars --count 10000 --out data/avatars",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[
    str,
    typer.Option(callback=not_empty, help="Folder for the shards: s3://bucket/prefix or a path."),
]
Count = Annotated[int, typer.Option(min=1, help="Images.")]
DrawnSize = Annotated[int, typer.Option(help="Side in pixels: 32, 64 or 128.")]
RowsPerShard = Annotated[int, typer.Option(min=1, max=10_000, help="Images per tar, at most.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]


@app.command()
def avatars(
    out: Out,
    count: Count,
    style: Annotated[str, typer.Option(help="DiceBear style.")] = "voxel-art",
    size: DrawnSize = 32,
    split: Annotated[str, typer.Option(help="train, val or test: disjoint faces.")] = "train",
    seed: Annotated[int, typer.Option(help="Other seeds, other faces.")] = 0,
    correlate: Annotated[
        str | None, typer.Option(help="A:B:P makes attribute B equal A in a share P of images.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Rows 2i, 2i+1: the same face, this attribute changed.")
    ] = None,
    rows_per_shard: RowsPerShard = 1000,
    workers: Workers = CORES,
) -> None:
    """Draw DiceBear faces with exact labels into WebDataset tars with their index.

    Example: diti data make avatars --count 10000 --split train --out data/avatars/train
    """
    with clear_errors():
        from data_pipelines.avatars import AvatarSpec, parse_correlation
        from tools.make_data import make_avatars
        from tools.progress import image_bar

        spec = AvatarSpec(
            style=style,
            size_px=size,
            seed=seed,
            split=split,  # pyright: ignore[reportArgumentType] (checked by AvatarSpec)
            correlate=parse_correlation(correlate) if correlate else None,
            pairs=pairs,
        )
        store = _store_for(out)
        with image_bar(f"avatars {split}", count) as advance:
            index = make_avatars(
                spec,
                count,
                store,
                out,
                rows_per_shard=rows_per_shard,
                workers=workers,
                on_shard=advance,
            )
        typer.echo(f"{size_of(index)} at {out}, index {index.digest[:12]}")


@app.command()
def emoji(
    out: Out,
    count: Count,
    size: DrawnSize = 32,
    split: Annotated[
        str, typer.Option(help="train, val or test: disjoint emoji, with all tones and genders.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Other seeds, other images.")] = 0,
    vendors: Annotated[
        str,
        typer.Option(
            help="Whose drawings: noto (Apache 2.0), fluent (MIT), twemoji (CC BY 4.0), "
            "openmoji (CC BY-SA 4.0)."
        ),
    ] = "noto,fluent,twemoji,openmoji",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for what npm fetches, 14 MB. Default: ~/.cache/diti/emoji."),
    ] = None,
    rows_per_shard: RowsPerShard = 1000,
    workers: Workers = CORES,
) -> None:
    """Draw emoji, several hands' of each, with captions, labels and classes, into tars with index.

    The art is fetched from npm's registry once and belongs to those who drew it: their licences
    are named above. Nothing of a package is run.

    Example: diti data make emoji --count 20000 --size 64 --split train --out data/emoji/train
    """
    with clear_errors():
        from data_pipelines.emoji import EmojiSpec
        from data_pipelines.emoji_packages import default_cache, fetch_packages
        from tools.make_data import make_emoji
        from tools.progress import image_bar, working

        spec = EmojiSpec(
            size_px=size,
            seed=seed,
            split=split,  # pyright: ignore[reportArgumentType] (checked by EmojiSpec)
            vendors=tuple(vendors.split(",")),
        )
        store = _store_for(out)
        packages = cache or default_cache()
        with working("fetching emoji art"):
            fetched = fetch_packages(packages)
        if fetched:
            typer.echo(f"{counted(len(fetched), 'npm package')} fetched into {packages}")
        with image_bar(f"emoji {split}", count) as advance:
            index = make_emoji(
                spec,
                packages,
                count,
                store,
                out,
                rows_per_shard=rows_per_shard,
                workers=workers,
                on_shard=advance,
            )
        typer.echo(f"{size_of(index)} at {out}, index {index.digest[:12]}")


@app.command("laion-like")
def laion_like(
    out: Out,
    count: Count,
    faults: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows with a fault, all kinds alike.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Other seeds, other images.")] = 0,
    rows_per_shard: RowsPerShard = 1000,
    workers: Workers = CORES,
) -> None:
    """Draw a raw image-text set as img2dataset leaves it: tars, Parquet files, no index.

    The avatars' faces at sizes of the web's, with captions, URLs and scores. A share of the rows
    has one fault each: damaged, copied, tiny, huge or no images, captions and metadata that are
    missing, high scores. Which one is in the Parquet column fault, for copies with duplicate_of.

    Example: diti data make laion-like --count 20000 --out data/raw
    """
    with clear_errors():
        from data_pipelines.laion_like import LaionSpec
        from tools.make_data import make_laion_like
        from tools.progress import image_bar

        spec = LaionSpec(seed=seed, faults=faults, rows_per_shard=rows_per_shard)
        store = _store_for(out)
        with image_bar("laion-like", count) as advance:
            made = make_laion_like(spec, count, store, out, workers=workers, on_shard=advance)
        faulty = count - made[""]
        typer.echo(f"{counted(count, 'row')} at {out}, {counted(faulty, 'row')} with a fault")


@app.command()
def folder(
    images: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with jpg, png or webp, at any depth.")
    ],
    out: Out,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV with a line of names, or CelebA's list_attr_celeba.txt: first column the "
            "file's path below DIR, with or without its ending; others 0/1 or -1/1, numbers, or "
            "classes; caption is the caption."
        ),
    ] = None,
    only: Annotated[
        Path | None, typer.Option(help="File that names the images to take, one a line.")
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,WIDTH,HEIGHT", help="Rectangle to cut out, in pixels."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=8, max=4096, help="Resize the centre square to this side. Default: keep files."
        ),
    ] = None,
    rows_per_shard: RowsPerShard = 1000,
    workers: Workers = CORES,
) -> None:
    """Write a plain folder of images, with its labels, into WebDataset tars with their index.

    Without --crop and --size the files are stored as they are. One image that cannot be decoded,
    one without labels or one line of labels without an image, and nothing is finished: all such
    images are named.

    Example: diti data make folder img_align_celeba --labels list_attr_celeba.txt --only train.txt
    --crop 25,57,128,128 --size 64 --out data/celeba64/train
    """
    with clear_errors():
        from data_pipelines.image_folder import plan_folder
        from data_pipelines.image_import import Treatment, parse_crop
        from tools.make_data import import_folder
        from tools.progress import image_bar

        treatment = Treatment(size_px=size, crop=parse_crop(crop) if crop is not None else None)
        shards = plan_folder(
            images, labels=labels, only=only, treatment=treatment, rows_per_shard=rows_per_shard
        )
        store = _store_for(out)
        with image_bar(images.name, sum(len(shard.entries) for shard in shards)) as advance:
            index = import_folder(shards, store, out, workers=workers, on_shard=advance)
        typer.echo(f"{size_of(index)} at {out}, index {index.digest[:12]}")


def _store_for(out: str) -> Any:
    from data_pipelines.object_store import ObjectStore

    store = ObjectStore()
    store.check_access(out, write=True)
    return store
