"""The manifest of parts that a test made by hand."""

import hashlib
import io
import json
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.feature_layout import FeatureLayout
from data_pipelines.feature_part import PartInfo
from data_pipelines.feature_store import FeatureManifest


def manifest_of(layout: FeatureLayout, parts: dict[str, bytes], **more: Any) -> FeatureManifest:
    """With true counts and digests; moments, and what the encoder was, are made up."""
    infos = {name: _info_of(data) for name, data in parts.items()}
    fields: dict[str, Any] = {
        "encoder_sha256": "e" * 64,
        "checkpoint": "step-00000100",
        "precision": "fp32",
        "backbone_sha256": "b" * 64,
        "config": {"data": {"image_size_px": 32}},
        "source_url": "s3://diti/avatars",
        "index_digest": "d" * 64,
        "rows": sum(info.rows for info in infos.values()),
        "skipped": sum(info.skipped for info in infos.values()),
        "mean": [0.0] * layout.num_dims,
        "std": [1.0] * layout.num_dims,
    }
    return FeatureManifest(layout=layout, parts=infos, **(fields | more))


def _info_of(data: bytes) -> PartInfo:
    parquet = pq.ParquetFile(io.BytesIO(data))
    skipped = json.loads(parquet.schema_arrow.metadata[b"diti"])["skipped"]
    digest = hashlib.sha256(data).hexdigest()
    return PartInfo(parquet.metadata.num_rows, len(skipped), len(data), digest)
