"""`diti eval regression`: numbers that samples are labelled with, by features and their subsets."""

from data_pipelines.object_store import ObjectStore
from tools.labelled_features import read_halves, representations_of
from tools.labels import numbers_of
from tools.number_probe import NumberResult, probe_numbers


def evaluate_numbers(
    store: ObjectStore, *, train_url: str, test_url: str, pixels: bool = True
) -> list[NumberResult]:
    """The whole feature, each subset alone, and raw pixels.

    Args:
        train_url, test_url: as of `evaluate_attributes`.

    Raises:
        ValueError: as of `read_halves` and `probe_numbers`.
    """
    train, test = read_halves(store, train_url, test_url, numbers_of)
    representations = representations_of(train, test, pixels=pixels)
    return [probe_numbers(each, train.labels.names) for each in representations]
