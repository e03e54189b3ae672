"""Verbs over frozen denoisers."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tools.commands.options import (
    AsJson,
    AuthorsConfig,
    Ema,
    LocalDir,
    Overrides,
    check_out_file,
    not_empty,
)
from tools.commands.outcome import clear_errors
from tools.commands.runs import launch
from tools.tables import print_contents

app = typer.Typer(help="Frozen denoisers.", no_args_is_help=True, rich_markup_mode=None)

ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Side of a denoiser's images, in pixels.")
]
HeadChannels = Annotated[int | None, typer.Option(min=1, help="Channels per attention head.")]
NumHeads = Annotated[int | None, typer.Option(min=1, help="Attention heads.")]
Order = Annotated[
    Literal["legacy", "new"] | None,
    typer.Option(help="Heads before q, k, v (legacy) or after (new). Default: legacy."),
]


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="A run of kind denoiser.")],
    out: Annotated[str, typer.Option(help="Where to write NAME.safetensors and its card.")],
    overrides: Overrides = None,
    local_dir: LocalDir = Path("runs/local"),
) -> None:
    """Train a small denoiser and write it as a backbone: safetensors and a JSON card.

    Example: diti backbone train configs/runs/avatars32_backbone.yaml --out avatars32.safetensors
    """
    with clear_errors(goes_on=True):
        from configs.loading import load_run
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import check_backbone_run, write_backbone

        _check_backbone_out(ObjectStore(), out)
        config = load_run(run_file, tuple(overrides or ()))
        check_backbone_run(config)
        manifest = launch(config, local_dir)
        command = " ".join(
            ["diti", "backbone", "train", str(run_file), *(overrides or ()), "--out", out]
        )
        digest = write_backbone(config, manifest, out, command=command)
        typer.echo(f"{out}: SHA-256 {digest}")


@app.command()
def samples(
    weights: Annotated[str, typer.Argument(help="NAME.safetensors, or builtin/NAME.safetensors.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Images, in rows of 12.")] = 48,
) -> None:
    """Draw unconditional samples of a backbone, to see what it has learnt.

    Example: diti backbone samples builtin/avatars32.safetensors --out samples.png
    """
    with clear_errors():
        from tools.backbone import sample_sheet
        from tools.pictures import SAMPLE_STEPS
        from tools.progress import progress_bar

        check_out_file(out)
        with progress_bar("sampling", SAMPLE_STEPS) as update:
            sheet = sample_sheet(weights, count, lambda step: update(step, ""))
            update(SAMPLE_STEPS, "")
        out.write_bytes(sheet)
        typer.echo(str(out))


@app.command("make-small")
def make_small(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A shard set with captions.")],
    out: Annotated[str, typer.Option(callback=not_empty, help="New folder for the model.")],
    image_size: Annotated[
        int, typer.Option(help="Side of its images: a multiple of 8 px, 16 to 128.")
    ] = 32,
    images: Annotated[
        int, typer.Option(help="Images to train on: a third for the VAE, then the rest.")
    ] = 18_000,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of weights, order and noise.")
    ] = 0,
) -> None:
    """Train a small model of Stable Diffusion's format in minutes, as diffusers saves it.

    It is for trying things out on a CPU: one process, a few MB, and nothing to resume.

    Example: diti backbone make-small data/avatars/train --out models/small
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from pretrain.small_stable_diffusion import SmallModel
        from tools.backbone import make_small as make

        model = SmallModel(image_size_px=image_size, images=images, seed=seed)
        digest = make(ObjectStore(), shards, out, model)
        typer.echo(f"{out}: SHA-256 {digest}")


@app.command("import")
def import_(
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
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import ImportOptions, import_backbone

        store = ObjectStore()
        _check_backbone_out(store, out)
        options = ImportOptions(config, ema, image_size, num_heads, head_channels, attention_order)
        digest, summary = import_backbone(store, file, out, options)
        typer.echo(f"{out}: SHA-256 {digest}\n{summary}")


@app.command()
def inspect(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="FILE.pt, FILE.safetensors or a folder of diffusers."),
    ],
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
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.backbone import ImportOptions, inspect_file

        options = ImportOptions(config, ema, image_size, num_heads, head_channels, attention_order)
        found = inspect_file(ObjectStore(), file, options)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            print_contents(found)


def _check_backbone_out(store: Any, out: str) -> None:
    if not out.endswith(".safetensors"):
        raise ValueError(f"--out must end in .safetensors, got {out!r}")
    store.check_access(out.rpartition("/")[0] or ".", write=True)
