"""`diti eval attributes`: what can be read from features, beside what needs no training."""

from data_pipelines.feature_store import Features, read_features, read_manifest
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import read_index
from tools.attribute_probe import ProbeResult, probe, probe_features
from tools.labels import Labels, labels_of, read_pixels, read_samples


def evaluate_attributes(
    store: ObjectStore,
    *,
    train_url: str,
    test_url: str,
    untrained: tuple[str, str] | None = None,
    pixels: bool = True,
) -> list[ProbeResult]:
    """Probes of the whole feature, each subset, the untrained encoder's feature and raw pixels.

    Args:
        train_url, test_url: features of two disjoint shard sets; the probe learns on the first and
            is scored on the second. Labels are read from the shards that they were exported from.
        untrained: the same for the encoder before training.
        pixels: also probe the raw pixels of the same images.

    Raises:
        ValueError: both features come from the same shards, or labels are missing.
    """
    manifests = [read_manifest(store, url) for url in (train_url, test_url)]
    sources = [manifest.source_url for manifest in manifests]
    if manifests[0].encoder_sha256 != manifests[1].encoder_sha256:
        raise ValueError(
            f"{train_url} ({manifests[0].checkpoint}) and {test_url} ({manifests[1].checkpoint}) "
            f"were made by different encoders; export both from one checkpoint"
        )
    if manifests[0].index_digest == manifests[1].index_digest:
        raise ValueError(
            f"both feature sets come from {sources[0]}; a probe must be tested on images that it "
            f"has not seen: export a second split"
        )
    samples = [read_samples(store, read_index(store, source)) for source in sources]
    labels = [labels_of(half) for half in samples]
    train, test = (read_features(store, url) for url in (train_url, test_url))
    attributes = labels[0].names
    if attributes != labels[1].names:
        raise ValueError(
            f"{sources[0]} and {sources[1]} are labelled with different attributes: "
            f"{sorted(set(attributes) ^ set(labels[1].names))}"
        )
    results = probe_features(
        train, labels[0].of(train.keys), test, labels[1].of(test.keys), attributes
    )
    if untrained:
        halves = [read_features(store, url) for url in untrained]
        results.append(_probe_whole("untrained encoder", halves, labels))
    if pixels:
        size_px = manifests[0].config["data"]["image_size_px"]
        flat = [read_pixels(half, size_px).reshape(len(half), -1) / 255.0 for half in samples]
        results.append(
            probe(
                "raw pixels",
                flat[0].astype("float32"),
                labels[0].values,
                flat[1].astype("float32"),
                labels[1].values,
                attributes,
            )
        )
    return results


def _probe_whole(name: str, halves: list[Features], labels: list[Labels]) -> ProbeResult:
    (train, test), (train_labels, test_labels) = halves, labels
    return probe(
        name,
        train.values,
        train_labels.of(train.keys),
        test.values,
        test_labels.of(test.keys),
        train_labels.names,
    )
