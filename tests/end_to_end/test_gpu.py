"""The line on a GPU, under Ray: train in bf16 with compiled parts, export."""

from pathlib import Path

import pytest
import torch

from cluster.export import export_features
from cluster.launch import launch_training
from cluster.session import ray_session
from data_pipelines.feature_store import open_features
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.preflight import run_url
from tests.tiny_run import make_run, make_shards

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
ON_GPU = ("cluster.use_gpu=true", "cluster.num_workers=1", "engine.precision=bf16")


def test_a_run_trains_and_its_features_are_those_of_a_cpu(s3_url: str, tmp_path: Path) -> None:
    store = ObjectStore()
    config = make_run(store, s3_url, *ON_GPU, "engine.compile=both")
    with ray_session(num_cpus=2, num_gpus=1):
        launch_training(config, local_dir=tmp_path)
    url = run_url(config)
    metrics = checkpoint.read_metrics(store, url, checkpoint.find(store, url, None))
    losses = [line["loss"] for line in metrics]
    assert sum(losses[-3:]) < sum(losses[:3])

    shards = join(s3_url, "test")
    make_shards(store, shards, split="test", shards=2, rows=40)
    z = {}
    for place in ("gpu", "cpu"):
        out = join(s3_url, place)
        export_features(
            store,
            run_url=url,
            shards_url=shards,
            out_url=out,
            num_workers=1,
            use_gpu=place == "gpu",
        )
        z[place] = torch.from_numpy(open_features(out).arrays().values)
    assert torch.nn.functional.cosine_similarity(z["gpu"], z["cpu"]).min() > 0.99
