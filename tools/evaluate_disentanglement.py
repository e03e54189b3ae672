"""`diti eval disentanglement`: whether each attribute lives in subsets of its own."""

from data_pipelines.object_store import ObjectStore
from tools.attribute_probe import probe
from tools.disentanglement import Disentanglement, disentanglement
from tools.labelled_features import read_halves, representations_of
from tools.labels import attributes_of


def evaluate_disentanglement(
    store: ObjectStore, *, train_url: str, test_url: str
) -> Disentanglement:
    """By probes that learn on the training half and are scored on the test half.

    Raises:
        ValueError: as of `read_halves`; an attribute has one value only in one of the halves.
    """
    train, test = read_halves(store, train_url, test_url, attributes_of)
    names = train.labels.names
    probes = [probe(each, names) for each in representations_of(train, test)]
    return disentanglement(train.features, train.y, probes, test.y.mean(axis=0))
