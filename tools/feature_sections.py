"""The part of a run's report that asks what its features hold."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.avatars import attribute_granularity
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_labels import LABELS_EXTENSION
from tools import figures
from tools.attribute_probe import ProbeResult, weight_shares
from tools.class_probe import by_a_line, by_neighbours, probe_classes
from tools.disentanglement import Disentanglement, disentanglement
from tools.evaluate_few_shot import few_shots
from tools.few_shot import Shortcut, best_subset
from tools.labelled_features import Half, read_halves, representations_of
from tools.labels import attributes_of, classes_of, numbers_of
from tools.number_probe import probe_numbers

GROUPS = ("coarse", "middle", "fine")
FEW_SHOT_DRAWS = 5
OTHERS = ("untrained encoder", "raw pixels")
"""What the feature is compared with; all other probes are of parts of it."""


def feature_sections(
    store: ObjectStore,
    *,
    train_url: str,
    test_url: str,
    probes: Sequence[ProbeResult],
    shortcut: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Values of `report.html`, by name.

    Args:
        train_url, test_url, probes: as `evaluate_attributes` takes and returns them.
        shortcut: the attribute that misleads few-shot learning; None leaves that section out.

    Raises:
        ValueError: as `read_halves`; there is no such attribute.
    """
    train, test = read_halves(store, train_url, test_url, attributes_of)
    say("asking where each attribute lives")
    of_feature = [probe for probe in probes if probe.name not in OTHERS]
    base_rate = test.y.mean(axis=0)
    places = disentanglement(train.features, train.y, of_feature, base_rate)
    fields = json.loads(train.samples[0][LABELS_EXTENSION]).keys()
    return {
        "precision": figures.precision_bars(probes),
        **_probe_tables(probes),
        "weights": _weight_map(train),
        "places": _places(places),
        "few_shot": _few_shot(train, test, shortcut, say) if shortcut else None,
        "classes": _classes(train, test, say) if "classes" in fields else [],
        "numbers": _numbers(train, test) if "numeric" in fields else [],
    }


def _probe_tables(probes: Sequence[ProbeResult]) -> dict[str, Any]:
    members = _by_granularity(probes[0].attributes)
    return {
        "num_attributes": len(probes[0].attributes),
        "groups": list(members),
        "probes": [
            {
                "name": result.name,
                "dims": result.dims,
                "cells": [
                    f"{value:.3f}"
                    for value in (result.mean, *map(result.mean_over, members.values()))
                ],
                "strong": result is probes[0],
            }
            for result in probes
        ],
        "attribute_columns": [result.name for result in probes],
        "attributes": [
            {"name": group, "rows": [_attribute_row(name, probes) for name in of_group]}
            for group, of_group in members.items()
        ],
        "worse": _worse_than_untrained(probes),
    }


def _by_granularity(attributes: Sequence[str]) -> dict[str, list[str]]:
    """Names by group, coarse first; groups without a member are left out."""
    granularity = attribute_granularity()
    members = {
        group: [name for name in attributes if granularity.get(name, "other") == group]
        for group in (*GROUPS, "other")
    }
    return {group: of_group for group, of_group in members.items() if of_group}


def _attribute_row(name: str, probes: Sequence[ProbeResult]) -> dict[str, Any]:
    number = probes[0].attributes.index(name)
    cells = [f"{result.average_precision[number]:.3f}" for result in probes]
    return {"name": _spoken(name), "cells": cells}


def _worse_than_untrained(probes: Sequence[ProbeResult]) -> list[str]:
    """Attributes that the untrained encoder's feature tells better than the trained one's."""
    for other in probes:
        if other.name == "untrained encoder":
            pairs = zip(probes[0].average_precision, other.average_precision, strict=True)
            worse = [trained < untrained for trained, untrained in pairs]
            named = zip(probes[0].attributes, worse, strict=True)
            return [_spoken(name) for name, is_worse in named if is_worse]
    return []


def _weight_map(train: Half[np.int8]) -> str:
    found = weight_shares(train.features, train.y, train.labels.names)
    rows = _coarse_first(found.shares)
    shares = [found.shares[name] for name in rows]
    columns = [_time_steps(name) for name in found.subsets]
    return figures.share_map(shares, [*map(_spoken, rows)], columns, max(map(max, shares)))


def _places(found: Disentanglement) -> dict[str, Any]:
    leak = found.leakage
    order = [leak.attributes.index(name) for name in _coarse_first(leak.attributes)]
    return {
        "figure": figures.share_map(
            leak.shares[order].tolist(),
            [_spoken(leak.attributes[number]) for number in order],
            [_time_steps(name) for name in leak.subsets],
            1.0,
        ),
        "untold": [*map(_spoken, leak.untold)],
        "best": f"{leak.best.mean():.0%}",
        "others": f"{leak.others.mean():.0%}",
        "scores": [
            (name, f"{each.disentanglement:.3f}", f"{each.completeness:.3f}")
            for name, each in (("dimension", found.by_dimension), ("subset", found.by_subset))
        ],
    }


def _few_shot(
    train: Half[np.int8], test: Half[np.int8], shortcut: str, say: Callable[[str], None]
) -> dict[str, Any]:
    say("learning from a few examples")
    representations = representations_of(train, test)
    plain, misled = (
        few_shots(representations, train.labels.names, draws=FEW_SHOT_DRAWS, shortcut=each)
        for each in (None, Shortcut(shortcut, 1.0))
    )
    whole, best = plain[0].name, best_subset(misled)
    return {
        "figure": figures.few_shot_curves(
            plain, misled, {whole: "whole feature", best: f"only {best}"}
        ),
        "shortcut": _spoken(shortcut),
        "best": best,
        "rows": [
            (f"{what}, {name}", [f"{r.mean:.3f}" for r in results if r.name == name])
            for what, results in (("plain", plain), ("misled", misled))
            for name in dict.fromkeys((whole, best))
        ],
        "shots": [result.shots for result in plain if result.name == whole],
    }


def _classes(
    train_half: Half[np.int8], test_half: Half[np.int8], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each kind of class that both halves have enough of; what has none is left out."""
    say("recognising classes")
    train, test = train_half.labelled(classes_of), test_half.labelled(classes_of)
    whole = representations_of(train, test)[0]
    rows = []
    for number, name in enumerate(train.labels.names):
        values, counts = np.unique(whole.test_y[:, number], return_counts=True)
        known = set(whole.train_y[:, number].tolist())
        if len(values) < 2 or not known.issuperset(values.tolist()):
            continue
        near, line = (probe_classes(whole, number, each) for each in (by_neighbours, by_a_line))
        rows.append(
            {
                "name": _spoken(name),
                "classes": len(values),
                "cells": [
                    f"{value:.3f}"
                    for value in (counts.max() / counts.sum(), near.accuracy, line.accuracy)
                ],
            }
        )
    return rows


def _numbers(train_half: Half[np.int8], test_half: Half[np.int8]) -> list[tuple[str, str, str]]:
    """(name, Pearson r, unexplained share of the variance) of each, by the whole feature."""
    train, test = train_half.labelled(numbers_of), test_half.labelled(numbers_of)
    found = probe_numbers(representations_of(train, test)[0], train.labels.names)
    return [
        (_spoken(name), f"{pearson:.3f}", f"{unexplained:.3f}")
        for name, pearson, unexplained in zip(
            found.numbers, found.pearson, found.unexplained, strict=True
        )
    ]


def _coarse_first(attributes: Sequence[str] | dict[str, Any]) -> list[str]:
    return [name for names in _by_granularity(list(attributes)).values() for name in names]


def _time_steps(subset: str) -> str:
    """`z000: time-steps 0-300` as `0-300`."""
    return subset.rpartition(" ")[2]


def _spoken(name: str) -> str:
    return name.replace("_", " ")
