"""Verbs over exported features."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from tools.commands.options import AsJson
from tools.commands.outcome import clear_errors
from tools.tables import print_features

app = typer.Typer(help="Exported features.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    url: Annotated[str, typer.Argument(help="Folder with manifest.json.")],
    as_json: AsJson = False,
) -> None:
    """What a feature set holds: subsets with their time-steps and dimensions, counts, digests.

    Example: diti features show runs/my-run/features/test
    """
    with clear_errors():
        from data_pipelines.feature_store import read_manifest
        from data_pipelines.object_store import ObjectStore

        manifest = read_manifest(ObjectStore(), url)
        if as_json:
            typer.echo(json.dumps(asdict(manifest), indent=1))
        else:
            print_features(manifest)
