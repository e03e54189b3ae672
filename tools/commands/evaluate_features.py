"""Verbs that ask what exported features hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tools.commands.options import (
    AsJson,
    Label,
    Misleading,
    Pixels,
    TestFeatures,
    Timesteps,
    TrainFeatures,
    Untrained,
    ends_of,
)
from tools.commands.outcome import clear_errors
from tools.evaluation_tables import print_few_shot, print_probes, print_weights

if TYPE_CHECKING:
    from tools.attribute_probe import ProbeResult
    from tools.class_probe import Classifier


def attributes(
    train_features: TrainFeatures,
    test_features: TestFeatures,
    untrained: Untrained = None,
    pixels: Pixels = True,
    as_json: AsJson = False,
) -> None:
    """Average precision of every labelled attribute: whole feature, each subset, baselines.

    Labels are read from the shards that the features were exported from. By default the probe is
    ridge regression in closed form on standardised features.

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
        _print_precision(results, as_json)


def published_probe(
    train_features: TrainFeatures,
    validation_features: Annotated[
        str, typer.Argument(metavar="VALIDATION", help="Features that choose the epoch.")
    ],
    test_features: TestFeatures,
    as_json: AsJson = False,
) -> None:
    """Average precision by the paper's own protocol: Adam on raw features, the best of 15 epochs.

    It favours features of larger numbers; compare encoders by `diti eval attributes`.

    Example: diti eval published-probe features/train features/val features/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_attributes import evaluate_as_published
        from tools.progress import working

        with working("probing attributes"):
            results = evaluate_as_published(
                ObjectStore(),
                train_url=train_features,
                validation_url=validation_features,
                test_url=test_features,
            )
        _print_precision(results, as_json)


def _print_precision(results: list[ProbeResult], as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": r.name, "dims": r.dims, "mean": r.mean}
            | {"attributes": dict(zip(r.attributes, r.average_precision, strict=True))}
            for r in results
        ]
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_probes(results)


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


def fewshot(
    train_features: TrainFeatures,
    test_features: TestFeatures,
    shots: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="Examples with and as many without it. Default: 5, 10, 20, 50."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Of the examples, for mean and spread.")] = 10,
    shortcut: Misleading = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.5, max=1, help="Of the examples, that agree with --shortcut; all."),
    ] = None,
    timesteps: Timesteps = None,
    pixels: Pixels = True,
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


def knn(
    train_features: TrainFeatures,
    test_features: TestFeatures,
    label: Label,
    pixels: Pixels = True,
    as_json: AsJson = False,
) -> None:
    """Which class an image is of, by the vote of its 20 nearest neighbours.

    Example: diti eval knn runs/mine/features/val runs/mine/features/test --label top
    """
    with clear_errors():
        from tools.class_probe import by_neighbours

        _recognise(by_neighbours, label, train_features, test_features, pixels, as_json)


def linear(
    train_features: TrainFeatures,
    test_features: TestFeatures,
    label: Label,
    pixels: Pixels = True,
    as_json: AsJson = False,
) -> None:
    """Which class an image is of, by logistic regression.

    Example: diti eval linear runs/mine/features/val runs/mine/features/test --label top
    """
    with clear_errors():
        from tools.class_probe import by_a_line

        _recognise(by_a_line, label, train_features, test_features, pixels, as_json)


def _recognise(
    classify: Classifier, label: str, train_url: str, test_url: str, pixels: bool, as_json: bool
) -> None:
    from data_pipelines.object_store import ObjectStore
    from tools.evaluate_classes import evaluate_classes
    from tools.evaluation_tables import print_classes
    from tools.progress import working

    with working(f"recognising {label}") as say:
        results = evaluate_classes(
            ObjectStore(),
            classify,
            label,
            train_url=train_url,
            test_url=test_url,
            pixels=pixels,
            on_result=lambda result: say(result.name),
        )
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
    else:
        print_classes(results, label)


def regression(
    train_features: TrainFeatures,
    test_features: TestFeatures,
    pixels: Pixels = True,
    as_json: AsJson = False,
) -> None:
    """How well the numbers that images are labelled with are told: Pearson r and squared error.

    Example: diti eval regression runs/mine/features/val runs/mine/features/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_numbers import evaluate_numbers
        from tools.evaluation_tables import print_numbers
        from tools.progress import working

        with working("fitting probes"):
            results = evaluate_numbers(
                ObjectStore(), train_url=train_features, test_url=test_features, pixels=pixels
            )
        if as_json:
            typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        else:
            print_numbers(results)


def disentanglement(
    train_features: TrainFeatures, test_features: TestFeatures, as_json: AsJson = False
) -> None:
    """Whether each attribute lives in subsets of its own: DCI, and what other subsets tell of it.

    Example: diti eval disentanglement runs/mine/features/val runs/mine/features/test
    """
    with clear_errors():
        from data_pipelines.object_store import ObjectStore
        from tools.evaluate_disentanglement import evaluate_disentanglement
        from tools.evaluation_tables import print_disentanglement
        from tools.progress import working

        with working("probing subsets"):
            found = evaluate_disentanglement(
                ObjectStore(), train_url=train_features, test_url=test_features
            )
        if as_json:
            leak = found.leakage
            shares = dict(zip(leak.attributes, leak.shares.tolist(), strict=True))
            scores = {
                "by_dimension": asdict(found.by_dimension),
                "by_subset": asdict(found.by_subset),
                "informativeness": found.informativeness,
                "leakage": {"subsets": leak.subsets, "attributes": shares, "untold": leak.untold},
            }
            typer.echo(json.dumps(scores, indent=1))
        else:
            print_disentanglement(found)
