"""Latents and captions of a run's shards, made beforehand on Ray: a tar beside each tar."""

import hashlib
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from cluster.batch import BatchFailedError
from cluster.coordinator import NamedCoordinator, Work
from cluster.launch import with_absolute_paths
from cluster.leases import QueueState
from cluster.session import last_line, ray_session
from cluster.work import run_workers, work_off
from configs.schema import RunConfig
from data_pipelines.encoded_set import (
    MANIFEST,
    EncodedMismatchError,
    Encoding,
    read_encoding,
    write_encoding,
)
from data_pipelines.object_store import ObjectStore, StoreError, join
from data_pipelines.shard_index import (
    INDEX_NAME,
    ShardIndex,
    first_ten,
    members_name,
    read_index,
    read_sets,
    shard_of_members,
    verify_listing,
    write_index,
)
from pretrain.encoded import encode_shard, encoding_of, load_encoders
from pretrain.preflight import open_store


def encode_set(
    config: RunConfig,
    *,
    num_workers: int,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> tuple[ShardIndex, Encoding]:
    """Encode into `data.encoded` what a run would encode itself, or find that it is done.

    Raises:
        ValueError: there is no `data.encoded`, or no backbone to encode for; the shards are not
            those of their index, or the folder holds what was encoded otherwise.
        BatchFailedError: a shard cannot be encoded, or the store or Ray failed; the same call goes
            on from there.
    """
    config = with_absolute_paths(config)
    url = config.data.encoded
    if url is None:
        raise ValueError("the run has no data.encoded; give a folder: data.encoded=URL")
    store = open_store(config)
    index = read_sets(store, config.data.folders)
    verify_listing(store, index)
    encoders = load_encoders(store, config, torch.device("cpu"))
    encoding = encoding_of(config, index, encoders.latents, encoders.shapes)
    _claim(store, url, encoding)
    if store.exists(join(url, INDEX_NAME)):
        return read_index(store, url), encoding
    _work_off(store, config, index, url, num_workers, on_progress)
    shards = [
        shard_of_members(url, store.read(join(url, members_name(shard.name))))[0]
        for shard in index.shards
    ]
    verify_listing(store, ShardIndex(url, shards))  # a table says that its tar was there once
    return write_index(store, url, shards), encoding


def _claim(store: ObjectStore, url: str, encoding: Encoding) -> None:
    if not store.exists(join(url, MANIFEST)):
        if found := store.list(url):
            raise EncodedMismatchError(
                f"{url} holds {len(found)} objects already, first {found[0].url}; choose another "
                f"data.encoded, or delete that folder"
            )
        write_encoding(store, url, encoding)
    elif (found := read_encoding(store, url)) != encoding:
        raise EncodedMismatchError(
            f"{url} is of other work: {found}, and this is {encoding}; choose another "
            f"data.encoded, or delete that folder"
        )


def _work_off(
    store: ObjectStore,
    config: RunConfig,
    index: ShardIndex,
    url: str,
    num_workers: int,
    on_progress: Callable[[QueueState], None],
) -> None:
    names = tuple(shard.name.removesuffix(".tar") for shard in index.shards)
    work = Work(names, url, members_name(""))
    queue = f"encode-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    num_gpus = 1 if config.cluster.use_gpu else 0
    count = min(num_workers, len(names))
    with ray_session(num_cpus=count, num_gpus=num_gpus * count):
        actor: Any = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(
            _EncodeWorker
        )
        workers = [actor.remote(store, config) for _ in range(count)]
        try:
            state, _ = run_workers(queue, store, work, workers, on_progress, config.data.folders)
        except (StoreError, RayError) as error:
            raise BatchFailedError(
                f"encoding into {url} stopped: {last_line(error)}. What is done is kept; run the "
                f"same command again to go on."
            ) from error
    if state.failures:
        causes = [f"{name}: {reason}" for name, reason in sorted(state.failures.items())]
        raise BatchFailedError(
            f"{len(causes)} of {len(names)} shards could not be encoded: {first_ten(causes)}. Mend "
            f"them and run the same command again; what is done is kept."
        )


class _EncodeWorker:
    """Loads the frozen parts once, then works until nothing is left to lease."""

    def __init__(self, store: ObjectStore, config: RunConfig) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
        self._store, self._config = store, config
        self._encoders = load_encoders(store, config, device)

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        index: ShardIndex = coordinator.ask(lambda actor: actor.index.remote())
        shards = {shard.name.removesuffix(".tar"): shard for shard in index.shards}
        url = self._config.data.encoded
        assert url is not None

        def encode(stem: str) -> None:
            encode_shard(self._store, self._encoders, shards[stem], url)

        work_off(name, coordinator, encode)
