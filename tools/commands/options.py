"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the run file, in YAML syntax."),
]
LocalDir = Annotated[
    Path, typer.Option(help="Folder on this node for the files of wandb and of Ray.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AuthorsConfig = Annotated[
    str | None,
    typer.Option(
        "--config", help="Its config.yml. Default: one beside the checkpoint or one folder up."
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option(help="Instead of a run: a published .pt file of DiTi or PDAE.")
]
Ema = Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, or the online ones.")]
Run = Annotated[str | None, typer.Argument(metavar="RUN", help="The run's folder: OUTPUT/NAME.")]
TrainFeatures = Annotated[
    str, typer.Argument(metavar="TRAIN", help="Features that the probe learns on.")
]
TestFeatures = Annotated[str, typer.Argument(metavar="TEST", help="Features that it is scored on.")]
Label = Annotated[
    str, typer.Option(help="Name of the classes, under `classes` in each sample's json.")
]
Pixels = Annotated[bool, typer.Option(help="Also probe the raw pixels.")]
Misleading = Annotated[
    str | None,
    typer.Option(help="An attribute that misleads: it agrees in most examples, not in TEST."),
]
Step = Annotated[
    int | None,
    typer.Option(min=0, help="Checkpoint; 0 is the untrained encoder. Default: newest."),
]
Untrained = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="TRAIN TEST",
        help="The same two feature sets exported with --step 0, to compare with.",
    ),
]


def timesteps_of(text: str) -> range:
    """`0:300`: time-steps 0 to 299."""
    start, colon, end = text.partition(":")
    if not colon or not start.isdecimal() or not end.isdecimal() or int(start) >= int(end):
        raise typer.BadParameter(f"{text!r} is no range of time-steps such as 0:300")
    return range(int(start), int(end))


Timesteps = Annotated[
    range | None,
    typer.Option(
        parser=timesteps_of,
        metavar="FROM:TO",
        help="Only the subsets that time-steps of this half-open range touch, such as 0:300.",
    ),
]


def ends_of(timesteps: range | None) -> tuple[int, int] | None:
    """As functions take them."""
    return None if timesteps is None else (timesteps.start, timesteps.stop)


def not_empty(url: str) -> str:
    """An unset shell variable would stand for the working directory."""
    if not url.strip():
        raise typer.BadParameter("is empty; is a variable unset? A dot is this folder")
    return url


def check_out_file(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(
            f"--out {out} cannot be written: it needs a file name in a folder that exists"
        )
