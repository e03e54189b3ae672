"""`diti eval fewshot`: attributes learnt from a few examples, by features and by their subsets."""

from collections.abc import Callable, Sequence

from data_pipelines.object_store import ObjectStore
from tools.few_shot import FewShotResult, Shortcut, few_shot, plan_tasks
from tools.labelled_features import raw_pixels, read_halves, representations_of
from tools.labels import attributes_of

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
    """The whole feature, each subset alone, subsets together, and raw pixels, by number of shots.

    Using some subsets only is the intervention: what the others say is taken out.

    Args:
        train_url, test_url: as of `evaluate_attributes`.
        shortcut: misleads in the few examples, and not in the test.
        timesteps: also the subsets together whose time-steps intersect this half-open range.
        on_result: told each as it is there.

    Raises:
        ValueError: as of `read_halves`, `plan_tasks` and `few_shot`; no subset in `timesteps`.
    """
    train, test = read_halves(store, train_url, test_url, attributes_of)
    attributes, most = train.labels.names, max(shots)
    enough = plan_tasks(train.y, attributes, shots=most, draws=1, shortcut=shortcut)
    representations = representations_of(train, test, timesteps)
    if pixels:
        representations.append(raw_pixels(train, test))
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
