"""`diti data encode` on real Ray and S3: every shard's sibling, once, and gone on with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.encode import encode_set
from cluster.session import ray_session
from configs.loading import dump_run, parse_run
from configs.schema import RunConfig
from data_pipelines.encoded_set import EncodedMismatchError, read_encoding, unpack
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_reader import iter_shard
from pretrain.diffusers_backbone import digest_of_folder
from pretrain.preflight import preflight
from tests.pretrain.test_train_diffusers import RUN
from tests.tiny_diffusers import save_pipeline
from tests.tiny_run import make_shards
from tools.cli import app


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


@pytest.fixture
def config(store: ObjectStore, s3_url: str, tmp_path: Path) -> RunConfig:
    """A run whose shards, model and latents are all in a bucket."""
    save_pipeline("stable-diffusion", tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.*"):
        store.upload(file, join(s3_url, "model", str(file.relative_to(tmp_path / "model"))))
    make_shards(store, join(s3_url, "train"), shards=3, rows=8)
    sha256 = digest_of_folder(store, join(s3_url, "model"))
    overrides = (f"data.encoded={s3_url}/encoded", "task.backbone.condition=caption")
    return parse_run(RUN.format(folder=s3_url, sha256=sha256), overrides)


def test_a_set_is_encoded_beside_its_images_and_goes_on_where_it_was(
    store: ObjectStore, config: RunConfig
) -> None:
    url = str(config.data.encoded)
    index, encoding = encode_set(config, num_workers=2)
    assert encoding.shapes == {"latent": [4, 8, 8], "prompt": [16, 16]}
    assert read_encoding(store, url) == encoding
    assert index.sizes.tolist() == [8, 8, 8]
    shapes = {name: tuple(shape) for name, shape in encoding.shapes.items()}
    assert all(
        unpack(sample, shapes) for shard in index.shards for sample in iter_shard(store, shard)
    )
    preflight(config, world_size=1)

    before = {info.url: info.etag for info in store.list(url)}
    store.delete(join(url, "index.parquet"))
    store.delete(join(url, "00001.members.parquet"))
    done: list[int] = []
    again, _ = encode_set(config, num_workers=1, on_progress=lambda state: done.append(state.done))
    assert again.digest == index.digest
    assert max(done) == 1, "only the shard whose table is missing was done again"
    assert {info.url for info in store.list(url)} == set(before)
    assert encode_set(config, num_workers=1)[0].digest == index.digest


@pytest.mark.faults
def test_a_folder_of_other_work_is_refused(store: ObjectStore, config: RunConfig) -> None:
    url = str(config.data.encoded)
    store.write(join(url, "mine.txt"), b"mine")
    with pytest.raises(EncodedMismatchError, match="holds 1 objects already"):
        encode_set(config, num_workers=1)
    store.delete(join(url, "mine.txt"))
    encode_set(config, num_workers=1)
    flipped = config.model_copy(
        update={"data": config.data.model_copy(update={"horizontal_flip": True})}
    )
    with pytest.raises(EncodedMismatchError, match="is of other work"):
        encode_set(flipped, num_workers=1)
    nowhere = config.data.model_copy(update={"encoded": None})
    with pytest.raises(ValueError, match=r"no data\.encoded"):
        encode_set(config.model_copy(update={"data": nowhere}), num_workers=1)


def test_the_command_says_what_it_made(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_run(config))
    told = CliRunner().invoke(app, ["data", "encode", str(file), "--workers", "1"])
    assert told.exit_code == 0, told.output
    assert "24 samples in 3 shards" in told.stdout
    assert "latent [4, 8, 8], prompt [16, 16] in float16" in told.stdout
    refused = CliRunner().invoke(app, ["data", "encode", str(file), "data.encoded=null"])
    assert refused.exit_code == 2
    assert "caption needs data.encoded" in refused.stderr
