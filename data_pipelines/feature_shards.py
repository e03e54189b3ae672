"""Features as WebDataset tars: a modality of its own beside the image shards, under their names.

images/00007.tar     000070123.jpg   000070123.json
features/00007.tar   000070123.z.npy
"""

import io

import numpy as np
from webdataset.writer import TarWriter

from data_pipelines.feature_store import FeatureSet, tar_of
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import Shard, publish_shard

MEMBER = "z.npy"


def write_feature_shard(
    store: ObjectStore, features: FeatureSet, name: str, out_url: str
) -> Shard | None:
    """Publish the tar of one part; returns its line of the index, None for a part without rows.

    Each member is a NumPy file: the columns that `features` was opened for, float16 (d,) where
    they are stored so, else float32. A sample that has no features has no member.
    """
    part = features.part(name)
    if not part.keys:
        return None
    dtype = np.float16 if features.manifest.layout.dtype == "float16" else np.float32
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="diti", group="diti") as tar:
        for key, z in zip(part.keys, part.values.astype(dtype), strict=True):
            content = io.BytesIO()
            np.save(content, z, allow_pickle=False)
            tar.write({"__key__": key, MEMBER: content.getvalue()})
    return publish_shard(store, out_url, tar_of(name), buffer.getvalue())
