"""`diti eval knn` and `linear`: which class an image is of, by features and by their subsets."""

from collections.abc import Callable, Sequence

from data_pipelines.object_store import ObjectStore
from tools.class_probe import Classifier, ClassResult, probe_classes
from tools.labelled_features import read_halves, representations_of
from tools.labels import classes_of


def evaluate_classes(
    store: ObjectStore,
    classify: Classifier,
    label: str,
    *,
    train_url: str,
    test_url: str,
    pixels: bool = True,
    on_result: Callable[[ClassResult], None] = lambda result: None,
) -> list[ClassResult]:
    """The whole feature, each subset alone, and raw pixels.

    Args:
        classify: `by_neighbours` or `by_a_line`.
        label: of those that each sample's json has under `classes`.
        train_url, test_url: as of `evaluate_attributes`.
        on_result: told each as it is there.

    Raises:
        ValueError: as of `read_halves` and `probe_classes`; there is no such label.
    """
    train, test = read_halves(store, train_url, test_url, classes_of)
    number = number_of(label, train.labels.names)
    results = []
    for representation in representations_of(train, test, pixels=pixels):
        results.append(probe_classes(representation, number, classify))
        on_result(results[-1])
    return results


def number_of(label: str, labels: Sequence[str]) -> int:
    """Raises ValueError where it is not one of them."""
    if label not in labels:
        raise ValueError(f"there is no label {label}; there are: {', '.join(labels)}")
    return labels.index(label)
