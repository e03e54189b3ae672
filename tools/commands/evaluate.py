"""Verbs that ask what features hold."""

import json
from typing import Annotated

import typer

from tools.commands.options import AsJson, Untrained
from tools.commands.outcome import clear_errors
from tools.tables import print_probes

app = typer.Typer(help="What features hold.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def attributes(
    train_features: Annotated[
        str, typer.Argument(metavar="TRAIN", help="Features that the probe learns on.")
    ],
    test_features: Annotated[
        str, typer.Argument(metavar="TEST", help="Features that it is scored on.")
    ],
    untrained: Untrained = None,
    pixels: Annotated[bool, typer.Option(help="Also probe the raw pixels.")] = True,
    as_json: AsJson = False,
) -> None:
    """Average precision of every labelled attribute: whole feature, each subset, baselines.

    Labels are read from the shards that the features were exported from.

    Example: diti eval attributes runs/my-run/features/val runs/my-run/features/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_attributes
        from tools.progress import working

        with working("probing attributes"):
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
            print_probes(results)
