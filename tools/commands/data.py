"""Verbs over shard sets."""

import os
from typing import Annotated

import typer

from tools.commands.outcome import clear_errors

app = typer.Typer(help="Make shard sets.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
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
    with clear_errors():
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
