"""Verbs that ask what features hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.commands.options import (
    AsJson,
    AuthorsConfig,
    Run,
    Timesteps,
    Untrained,
    check_out_file,
    ends_of,
)
from tools.commands.outcome import clear_errors
from tools.tables import (
    print_attribute_loss,
    print_few_shot,
    print_probes,
    print_reconstructions,
    print_weights,
)

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


@app.command()
def weights(
    train_features: Annotated[
        str, typer.Argument(metavar="FEATURES", help="Features that the probe learns on.")
    ],
    as_json: AsJson = False,
) -> None:
    """Where the probe of each attribute looks: shares of its squared weights by subset.

    Weights are of standardised features. A share above the subset's share of the dimensions says
    that the probe leans on it.

    Example: diti eval weights runs/mine/features/val
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_weights
        from tools.progress import working

        with working("fitting probes"):
            found = evaluate_weights(ObjectStore(), train_features)
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=1))
        else:
            print_weights(found)


@app.command("attribute-loss")
def attribute_loss(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: its backbone.")],
    train_shards: Annotated[
        str, typer.Option(help="Labelled shard set whose first images the probes learn on.")
    ],
    test_shards: Annotated[str, typer.Option(help="Another, that they are scored on.")],
    count: Annotated[int, typer.Option(min=2, help="Images of each set.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Where on the time axis each attribute is lost, by what the backbone makes of x_t.

    It says where a partition's stages and the time-steps of training should lie.

    Example: diti eval attribute-loss runs/mine --train-shards data/avatars/val --test-shards
    data/avatars/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.attribute_loss import evaluate_attribute_loss
        from tools.progress import working

        with working("probing reconstructions") as say:
            found = evaluate_attribute_loss(
                ObjectStore(),
                run_url=run,
                train_url=train_shards,
                test_url=test_shards,
                count=count,
                on_timestep=lambda t: say("the image itself" if t < 0 else f"time-step {t}"),
            )
        if as_json:
            rows = {
                name: {
                    "half_lost_at": found.half_lost(name),
                    "base_rate": rate,
                    "average_precision": precision,
                }
                for name, rate, precision in zip(
                    found.attributes, found.base_rate, found.precision.T.tolist(), strict=True
                )
            }
            typer.echo(json.dumps({"timesteps": found.timesteps, "attributes": rows}, indent=1))
        else:
            print_attribute_loss(found)


@app.command()
def fewshot(
    train_features: Annotated[
        str, typer.Argument(metavar="TRAIN", help="Features whose samples are the few examples.")
    ],
    test_features: Annotated[
        str, typer.Argument(metavar="TEST", help="Features that the probe is scored on.")
    ],
    shots: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="Examples with and as many without it. Default: 5, 10, 20, 50."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Of the examples, for mean and spread.")] = 10,
    shortcut: Annotated[
        str | None,
        typer.Option(help="An attribute that misleads: it agrees in most examples, not in TEST."),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.5, max=1, help="Of the examples, that agree with --shortcut; all."),
    ] = None,
    timesteps: Timesteps = None,
    pixels: Annotated[bool, typer.Option(help="Also probe the raw pixels.")] = True,
    as_json: AsJson = False,
) -> None:
    """Accuracy after a few examples of each attribute: whole feature, each subset, raw pixels.

    A subset alone is an intervention on the others: what they say cannot mislead it.

    Example: diti eval fewshot runs/mine/features/val runs/mine/features/test
    --shortcut dark_background
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_few_shot import SHOTS, evaluate_few_shot
        from tools.few_shot import Shortcut
        from tools.progress import working

        if share is not None and shortcut is None:
            raise ValueError("--share belongs to --shortcut; give that too")
        with working("learning from few examples") as say:
            results = evaluate_few_shot(
                ObjectStore(),
                train_url=train_features,
                test_url=test_features,
                shots=sorted(set(shots or SHOTS)),
                draws=draws,
                shortcut=Shortcut(shortcut, share or 1.0) if shortcut else None,
                timesteps=ends_of(timesteps),
                pixels=pixels,
                on_result=lambda result: say(f"{result.shots} shots, {result.name}"),
            )
        if as_json:
            rows = [
                {"name": r.name, "dims": r.dims, "shots": r.shots, "mean": r.mean}
                | {"spread": r.spread}
                | {"attributes": dict(zip(r.attributes, r.accuracy.T.tolist(), strict=True))}
                for r in results
            ]
            typer.echo(json.dumps(rows, indent=1))
        else:
            print_few_shot(results)


@app.command()
def reconstruction(
    shards: Annotated[str, typer.Option(help="Shard set whose first images are used.")],
    run: Run = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead of a run: a published .pt file of DiTi or PDAE.")
    ] = None,
    config: AuthorsConfig = None,
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps, in either direction.")] = 50,
    as_json: AsJson = False,
) -> None:
    """How well images come back from their features: our sampler, the published one, no feature.

    Example: diti eval reconstruction runs/my-run --shards data/avatars/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_reconstruction import (
            evaluate_reconstruction,
            load_model,
            read_images,
        )
        from tools.progress import progress_bar

        store = ObjectStore()
        model = load_model(store, run, checkpoint, config)
        images = read_images(store, shards, count, model.image_size_px)
        with progress_bar("reconstructing", 1.0) as update:
            results = evaluate_reconstruction(
                model, images, steps=steps, on_progress=lambda share: update(share, "")
            )
        if as_json:
            typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        else:
            print_reconstructions(results)


@app.command()
def counterfactual(
    pairs: Annotated[
        list[str],
        typer.Option(
            metavar="SHARDS", help="Shard set of pairs that differ in one attribute; several times."
        ),
    ],
    run: Run = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead of a run: a published .pt file of DiTi or PDAE.")
    ] = None,
    config: AuthorsConfig = None,
    labelled: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Labelled shard set that classifiers learn on."),
    ] = None,
    count: Annotated[int, typer.Option(min=4, help="Pairs of each set.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps, in either direction.")] = 25,
    out: Annotated[Path | None, typer.Option(help="HTML file to write, with pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a picture becomes when parts of its feature are another's: scores, and a page.

    The truth is the other drawing of a pair: diti data make avatars --pairs glasses --split test
    --count 64 --out data/glasses

    Example: diti eval counterfactual runs/mine --pairs data/glasses --labelled data/avatars/val
    --out counterfactual.html
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.counterfactual_page import make_page
        from tools.counterfactual_table import print_directions, print_swaps
        from tools.evaluate_counterfactual import evaluate_counterfactual
        from tools.evaluate_reconstruction import load_model
        from tools.progress import progress_bar, working

        if out is not None:
            check_out_file(out)
        store = ObjectStore()
        model = load_model(store, run, checkpoint, config)
        with progress_bar("swapping", 1.0) as update:
            found = evaluate_counterfactual(
                store,
                model,
                pairs_urls=pairs,
                labelled_url=labelled,
                count=count,
                steps=steps,
                on_progress=update,
            )
        if as_json:
            rows = {
                each.scores.attribute: asdict(each.scores) | {"probmask": None}
                for each in found.swaps
            }
            for direction in found.directions:
                learnt = {"precision": direction.precision, "kept": direction.kept}
                rows[direction.attribute]["probmask"] = learnt
            typer.echo(json.dumps(rows, indent=1))
        else:
            print_swaps([each.scores for each in found.swaps])
            if found.directions:
                print_directions(found.directions)
        if out is not None:
            with working("drawing the page") as say:
                page = make_page(model, run or checkpoint or "", found, steps=steps, say=say)
            out.write_text(page, encoding="utf-8")
            typer.echo(f"page: {out.resolve()}", err=as_json)
