"""One loader of the comparison in `loading`, as a process: batches of images from S3, nothing else.

    PYTHON loading_peers.py LOADER SETTINGS.json

Written as each library's documentation does it, in a file that imports nothing of this project at
the top, so that a peer can run in a Python of its own. It prints `begin N` after the first batches
and `end N` after the last one, N the images so far, and waits for a line each time: then the
process that started it reads how much CPU time it has taken.
"""

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE_PX = 256
WARM_BATCHES = 4
LANES = 16
"""Places that ours reads side by side: 16 windows of 128 rows mix as a buffer of 2,048 would."""


def ours(settings: dict[str, Any], first_batch: int = 0) -> Iterator[np.ndarray]:
    """This project's stream, to the end of the epoch; it knows nothing but where the shards are."""
    from configs.schema import DataConfig
    from data_pipelines.object_store import ObjectStore
    from data_pipelines.sample_order import SampleOrder
    from data_pipelines.sample_stream import open_stream
    from data_pipelines.shard_index import read_index

    store, batch = ObjectStore(), settings["batch"]
    data = DataConfig(
        shards=settings["shards"], image_size_px=SIZE_PX, decode_threads=settings["workers"]
    )
    index = read_index(store, data.folders[0])
    order = SampleOrder(index.sizes, seed=0, lanes=LANES, window_rows=data.window_rows)
    split = {"global_batch": batch, "micro_batch": batch, "rank": 0, "world_size": 1}
    batches = open_stream(store, index, order, data, **split, first_batch=first_batch)
    for _ in range(first_batch, index.num_samples // batch):
        yield next(batches).images


def webdataset(settings: dict[str, Any]) -> Iterator[np.ndarray]:
    """WebDataset's pipeline in the DataLoader, tars through curl from presigned URLs."""
    from torch.utils.data import DataLoader

    dataset = webdataset_batches(settings)
    for (images,) in DataLoader(dataset, batch_size=None, num_workers=settings["workers"]):
        yield np.asarray(images)


def webdataset_batches(settings: dict[str, Any], first_batch: int = 0) -> Any:
    """The data set itself; to get to a batch it reads, and throws away, what comes before."""
    import webdataset as wds

    dataset = wds.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
        settings["pipes"], shardshuffle=100, seed=0
    ).shuffle(1000)
    if first_batch:
        dataset = dataset.slice(first_batch * settings["batch"], 10**9)
    decoder = _decode_fast if settings["fast_codec"] else "rgb8"
    return dataset.decode(decoder).to_tuple("jpg").batched(settings["batch"])


def streaming(settings: dict[str, Any]) -> Iterator[np.ndarray]:
    """MosaicML streaming, from its own MDS copy of the same images."""
    from PIL import Image
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from streaming.base.util import (  # pyright: ignore[reportMissingImports]
        clean_stale_shared_memory,
    )
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):
        def __getitem__(self, number: int) -> np.ndarray:
            content = super().__getitem__(number)["jpg"]
            if settings["fast_codec"]:
                return _decode_fast("jpg", content)
            return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    clean_stale_shared_memory()  # of the epoch before, whose process was killed at its end
    batch = settings["batch"]
    dataset = Images(
        remote=settings["mds"], local=settings["scratch"], shuffle=True, batch_size=batch
    )
    loader = DataLoader(dataset, batch_size=batch, num_workers=settings["workers"])
    for images in loader:
        yield images.numpy()


def ray_data(settings: dict[str, Any]) -> Iterator[np.ndarray]:
    """Ray Data's `read_webdataset`."""
    import ray
    from PIL import Image
    from pyarrow.fs import S3FileSystem

    ray.init("local", num_cpus=settings["workers"], include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        if settings["fast_codec"]:
            return {"image": _decode_fast("jpg", row["jpg"])}
        return {"image": np.asarray(Image.open(io.BytesIO(row["jpg"])).convert("RGB"))}

    files = [url.removeprefix("s3://") for url in settings["tars"]]
    filesystem = S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), scheme="http"
    )
    dataset = ray.data.read_webdataset(files, filesystem=filesystem, decoder=None, shuffle="files")
    for batch in dataset.map(decode).iter_batches(batch_size=settings["batch"]):
        yield np.asarray(dict(batch)["image"])


def _decode_fast(name: str, content: bytes) -> Any:
    """Our codec, in the form that WebDataset calls decoders in."""
    import simplejpeg

    return simplejpeg.decode_jpeg(content) if name.endswith("jpg") else None


LOADERS = {"ours": ours, "webdataset": webdataset, "streaming": streaming, "ray data": ray_data}


def main() -> None:
    name, settings_file = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    images = 0
    for number, batch in enumerate(LOADERS[name](settings), start=1):
        assert batch.dtype == np.uint8, batch.dtype
        assert batch[0].size == 3 * SIZE_PX**2, batch.shape
        images += len(batch)
        if number == WARM_BATCHES:
            _stop_for_a_line(f"begin {images}")
    _stop_for_a_line(f"end {images}")


def _stop_for_a_line(said: str) -> None:
    print(said, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
