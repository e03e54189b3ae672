"""Features of a labelled shard set without an encoder: what they hold is known."""

import numpy as np

from data_pipelines.feature_layout import FeatureColumn, FeatureLayout
from data_pipelines.feature_part import PartOrigin, encode_part
from data_pipelines.feature_store import part_name, publish_manifest
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import read_index
from tests.feature_sets import manifest_of
from tools.labels import attributes_of, read_samples

STORE = ObjectStore()
LAYOUT = FeatureLayout(
    (FeatureColumn("z000", (0, 100), (0, 4)), FeatureColumn("z001", (100, 1000), (4, 8)))
)


def export_labels(shards: str, url: str, *, encoder: str = "a" * 64) -> str:
    """Features whose first dimension is one of the labels, and noise besides."""
    index = read_index(STORE, shards)
    samples = read_samples(STORE, index)
    labels = attributes_of(samples)
    features = np.random.default_rng(0).standard_normal((len(samples), 8), np.float32)
    features[:, 0] = labels.values[:, labels.names.index("glasses")]
    [shard] = index.shards
    part = encode_part(
        LAYOUT,
        PartOrigin(encoder, shard.name, shard.sha256),
        keys=[sample["__key__"] for sample in samples],
        rows=range(len(samples)),
        features=features,
    )
    name = part_name("shards", "00000")
    STORE.write(f"{url}/{name}", part)
    more = {"encoder_sha256": encoder, "source_url": shards, "index_digest": index.digest}
    publish_manifest(STORE, url, manifest_of(LAYOUT, {name: part}, **more))
    return url
