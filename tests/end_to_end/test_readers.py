"""Features are read with the README's own lines, and only the columns asked for are fetched."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from data_pipelines.feature_layout import FeatureColumn, FeatureLayout
from data_pipelines.feature_part import PartOrigin, encode_part
from data_pipelines.feature_store import open_features, publish_manifest
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, join
from pretrain.feature_dataset import FeatureDataset
from tests.faulty_proxy import FaultyProxy
from tests.feature_sets import manifest_of

README = Path(__file__).parents[2] / "README.md"
URL_IN_README = "s3://bucket/features"
COLUMNS = (
    FeatureColumn("z000", (0, 100), (0, 32)),
    FeatureColumn("z001", (100, 300), (32, 96)),
    FeatureColumn("z002", (300, 1000), (96, 512)),
)
ROWS, PARTS = 10_000, 2
VALUES = np.random.default_rng(0).standard_normal((PARTS, ROWS, 512)).astype(np.float32)


def layout(dtype: str) -> FeatureLayout:
    return FeatureLayout(COLUMNS, dtype, (4 / 127,) * 512 if dtype == "int8" else None)


def publish(store: ObjectStore, url: str, dtype: str) -> None:
    parts = {}
    for number in range(PARTS):
        name = f"laion/{number:05d}.parquet"
        parts[name] = encode_part(
            layout(dtype),
            PartOrigin("e" * 64, f"{number:05d}.tar", "a" * 64),
            keys=[f"{number:05d}{row:04d}" for row in range(ROWS)],
            rows=range(ROWS),
            features=VALUES[number],
        )
        store.write(join(url, name), parts[name])
    publish_manifest(store, url, manifest_of(layout(dtype), parts))


@pytest.fixture(scope="module", params=["float16", "int8"])
def features(request: pytest.FixtureRequest, s3: LocalS3) -> str:
    url = f"s3://{s3.bucket}/readers/{request.param}"
    publish(ObjectStore(), url, request.param)
    return url


@pytest.fixture
def proxy(s3: LocalS3) -> Iterator[FaultyProxy]:
    """The server, seen through what counts its answers' bytes."""
    counting = FaultyProxy(s3, b"(?!)", "reset")
    yield counting
    counting.close()


def readme_snippet(tool: str) -> str:
    """The lines of the README that import this tool."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if f"import {tool}" in block]
    return found


@pytest.mark.parametrize("tool", ["pyarrow", "duckdb", "polars", "open_features"])
def test_three_lines_of_the_readme_read_the_fine_part(
    tool: str, features: str, s3: LocalS3, proxy: FaultyProxy, tmp_path: Path
) -> None:
    snippet = readme_snippet("pyarrow.parquet" if tool == "pyarrow" else tool)
    assert len(snippet.strip().splitlines()) <= 3
    code = snippet.replace(URL_IN_README, features)
    check = """
import numpy as np
np.save("z.npy", np.array([np.array(row, "f4") for row in z]))
np.save("keys.npy", np.array([str(key) for key in keys]))
"""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(README.parent) if tool == "open_features" else "",
            "HOME": str(tmp_path),
            **s3.environment(),
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ENDPOINT_URL_S3": proxy.url,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    z, keys = np.load(tmp_path / "z.npy"), np.load(tmp_path / "keys.npy")
    assert keys.tolist() == [f"{n:05d}{row:04d}" for n in range(PARTS) for row in range(ROWS)]
    dtype = features.rsplit("/", 1)[-1]
    last = 96 if tool == "open_features" else 32
    expected = layout(dtype).stored(VALUES.reshape(-1, 512))[:, :last].astype(np.float32)
    if tool == "open_features" and dtype == "int8":
        expected *= np.float32(4 / 127)
    np.testing.assert_allclose(z.astype(np.float32), expected, rtol=1e-6)
    everything = sum(info.size_bytes for info in ObjectStore().list(join(features, "laion")))
    assert proxy.bytes_down < 0.5 * everything


def column_bytes(features: str, names: list[str]) -> int:
    total = 0
    for info in ObjectStore().list(join(features, "laion")):
        group = pq.ParquetFile(io.BytesIO(ObjectStore().read(info.url))).metadata.row_group(0)
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.partition(".")[0] in names:
                total += chunk.total_compressed_size
    return total


def test_bytes_at_the_server_are_in_proportion_to_the_columns(
    features: str, proxy: FaultyProxy
) -> None:
    store = ObjectStore(endpoint_url=proxy.url)
    join_columns = ["key", "shard", "row"]
    counts = []
    for timesteps, names in ((None, ["z000", "z001", "z002"]), ((0, 300), ["z000", "z001"])):
        before = proxy.bytes_down
        found = open_features(features, timesteps, store=store).arrays()
        assert [column.name for column in found.columns] == names
        counts.append((proxy.bytes_down - before, column_bytes(features, [*join_columns, *names])))
    # Beside the columns: manifest, footers, and the headers of answers.
    beside = [arrived - columns for arrived, columns in counts]
    assert beside[0] == pytest.approx(beside[1], abs=5000)
    assert 0 < beside[0] < 80_000 * (PARTS + 1)
    share = (counts[1][0] - beside[1]) / (counts[0][0] - beside[0])
    assert share == pytest.approx(96 / 512, abs=0.03)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_data_loader_gives_every_sample_once(features: str, workers: int) -> None:
    data = FeatureDataset(open_features(features, (0, 300)))
    batches = list(DataLoader(data, batch_size=700, num_workers=workers))
    assert len(data) == sum(len(batch["key"]) for batch in batches) == ROWS * PARTS
    z = {key: z for batch in batches for key, z in zip(batch["key"], batch["z"], strict=True)}
    arrays = open_features(features, (0, 300)).arrays()
    assert z.keys() == set(arrays.keys)
    for number in (0, 1, ROWS, ROWS * PARTS - 1):
        assert torch.equal(z[arrays.keys[number]], torch.from_numpy(arrays.values[number]))
    if not workers:
        assert [key for batch in batches for key in batch["key"]] == arrays.keys
