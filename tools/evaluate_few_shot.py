"""`diti eval fewshot`: attributes learnt from a few examples, by features and by their subsets."""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.object_store import ObjectStore
from tools.few_shot import FewShotResult, Shortcut, few_shot, plan_tasks
from tools.labelled_features import read_halves, representations_of
from tools.labels import attributes_of
from tools.representations import Representation

SHOTS = (5, 10, 20, 50)
DRAWS = 10


def evaluate_few_shot(
    store: ObjectStore,
    *,
    train_url: str,
    test_url: str,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    shortcut: Shortcut | None = None,
    timesteps: tuple[int, int] | None = None,
    pixels: bool = True,
    on_result: Callable[[FewShotResult], None] = lambda result: None,
) -> list[FewShotResult]:
    """`few_shots` of two feature sets, and raw pixels.

    Args:
        train_url, test_url: as of `evaluate_attributes`.
        timesteps: also the subsets together whose time-steps intersect this half-open range.
        on_result: told each as it is there.

    Raises:
        ValueError: as of `read_halves` and `few_shots`; no subset in `timesteps`.
    """
    train, test = read_halves(store, train_url, test_url, attributes_of)
    return few_shots(
        representations_of(train, test, timesteps, pixels=pixels),
        train.labels.names,
        shots=shots,
        draws=draws,
        shortcut=shortcut,
        on_result=on_result,
    )


def few_shots(
    representations: Sequence[Representation[np.int8]],
    attributes: Sequence[str],
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    shortcut: Shortcut | None = None,
    on_result: Callable[[FewShotResult], None] = lambda result: None,
) -> list[FewShotResult]:
    """Each representation by number of shots; a subset alone is the intervention: what the others
    say is taken out.

    Args:
        shortcut: misleads in the few examples, and not in the test.

    Raises:
        ValueError: as of `plan_tasks` and `few_shot`.
    """
    most, labels = max(shots), representations[0].train_y
    enough = plan_tasks(labels, attributes, shots=most, draws=1, shortcut=shortcut)
    results = []
    for each in shots:
        for representation in representations:
            # By number of shots the same attributes, or their means could not be compared.
            tasks = [
                task
                for task in plan_tasks(
                    representation.train_y, attributes, shots=each, draws=draws, shortcut=shortcut
                )
                if task.attribute in {other.attribute for other in enough}
            ]
            results.append(few_shot(representation, tasks, attributes, shortcut))
            on_result(results[-1])
    return results
