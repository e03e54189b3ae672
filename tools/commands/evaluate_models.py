"""Verbs that ask what a trained model does with images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.commands.options import AsJson, AuthorsConfig, Checkpoint, Run, check_out_file
from tools.commands.outcome import clear_errors
from tools.evaluation_tables import (
    print_attribute_loss,
    print_reconstructions,
    print_timestep_losses,
)


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


def timestep_loss(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    shards: Annotated[str, typer.Option(help="Shard set whose first images are used.")],
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Loss of backbone and DiTi by time-step: the gap is what the feature knows.

    Example: diti eval timestep-loss runs/mine --shards data/avatars/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.denoising import timestep_losses
        from tools.evaluate_reconstruction import load_model, read_images
        from tools.progress import working

        store = ObjectStore()
        with working("computing losses"):
            model = load_model(store, run, None, None)
            images = read_images(store, shards, count, model.image_size_px)
            losses = timestep_losses(model, images)
        if as_json:
            typer.echo(json.dumps(asdict(losses), indent=1))
        else:
            print_timestep_losses(losses)


def reconstruction(
    shards: Annotated[str, typer.Option(help="Shard set whose first images are used.")],
    run: Run = None,
    checkpoint: Checkpoint = None,
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


def counterfactual(
    pairs: Annotated[
        list[str],
        typer.Option(
            metavar="SHARDS", help="Shard set of pairs that differ in one attribute; several times."
        ),
    ],
    run: Run = None,
    checkpoint: Checkpoint = None,
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
