"""Counting what a shard set holds, on Ray: a worker reads a tar once."""

from collections.abc import Callable
from functools import partial

from cluster.batch import on_each
from cluster.leases import QueueState
from data_pipelines.object_store import ObjectStore, absolute
from data_pipelines.sample_reader import member_sample
from data_pipelines.set_stats import SetStats
from data_pipelines.shard_index import Shard, ShardIndex, read_members


def count_set(
    store: ObjectStore,
    index: ShardIndex,
    *,
    num_workers: int,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> SetStats:
    """Statistics of every sample of a shard set.

    Raises:
        BatchFailedError: a tar is not the one that was indexed, or the store or Ray failed.
    """
    index = index.moved(absolute)
    shards = {shard.name: shard for shard in index.shards}
    task = partial(_count_one, shards)
    found = on_each(store, index.url, list(shards), num_workers, task, on_progress)
    whole = SetStats()
    for name in shards:  # sums of floats depend on their order
        whole += found[name]
    return whole


def _count_one(shards: dict[str, Shard], store: ObjectStore, url: str, name: str) -> SetStats:
    shard = shards[name]
    table, stats = read_members(store, shard), SetStats()
    with store.mapped(shard.url) as tar:
        for row in range(shard.num_samples):
            stats.add(member_sample(table, row, shard.url, tar, 0, table.extensions))
    return stats
