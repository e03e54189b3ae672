"""`diti data make avatars`: render the built-in data set into shards, in parallel."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.object_store import AlreadyExistsError, ObjectStore, join
from data_pipelines.shard_index import INDEX_NAME, Shard, ShardIndex, write_index
from data_pipelines.shard_writer import ROWS_PER_SHARD_LIMIT, shard_name, write_shard


def make_avatars(
    spec: AvatarSpec,
    count: int,
    store: ObjectStore,
    url: str,
    *,
    rows_per_shard: int,
    workers: int,
    on_shard: Callable[[int], None] = lambda images: None,
) -> ShardIndex:
    """Write `count` avatars below `url` as shards of `rows_per_shard`, then their index.

    The result does not depend on `workers`. `on_shard` is told the images of each finished shard.

    Raises:
        ValueError: count or rows_per_shard is not positive, or the spec is refused.
        AlreadyExistsError: there is a shard set at `url`; sets are not overwritten.
    """
    if count < 1 or not 1 <= rows_per_shard <= ROWS_PER_SHARD_LIMIT:
        raise ValueError(
            f"count must be at least 1 and rows per shard 1 to {ROWS_PER_SHARD_LIMIT}, got {count} "
            f"and {rows_per_shard}"
        )
    draw_avatar(spec, 0)  # a spec that cannot be drawn is refused here, not in every worker
    if spec.pairs is not None and count % 2:
        raise ValueError(f"pairs need an even count, got {count}; the last row would have none")
    if store.exists(join(url, INDEX_NAME)):
        raise AlreadyExistsError(
            f"{url} holds a shard set already; delete that folder, or choose another one"
        )
    num_shards = math.ceil(count / rows_per_shard)
    names = {join(url, shard_name(number)) for number in range(num_shards)}
    found = [info.url for info in store.list(url) if info.url.endswith(".tar")]
    if strangers := sorted(set(found) - names):
        raise AlreadyExistsError(
            f"{url} holds {len(strangers)} tars that would not belong to this set, first "
            f"{strangers[0]}; delete that folder, or choose another one"
        )
    shards: dict[int, Shard] = {}
    # Fresh processes: the store's client must not be forked.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        with _interrupts_wait():
            tasks = {
                pool.submit(
                    _write_avatar_shard,
                    spec,
                    number,
                    range(number * rows_per_shard, min((number + 1) * rows_per_shard, count)),
                    store,
                    url,
                ): number
                for number in range(num_shards)
            }
        try:
            for task in as_completed(tasks):
                shards[tasks[task]] = task.result()
                on_shard(task.result().num_samples)
        except BaseException:  # Ctrl-C too: what has not begun is not begun any more
            pool.shutdown(cancel_futures=True)
            raise
    return write_index(store, url, [shards[number] for number in range(num_shards)])


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits, and processes started inside never hear it: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_avatar_shard(
    spec: AvatarSpec, number: int, rows: range, store: ObjectStore, url: str
) -> Shard:
    drawn = (draw_avatar(spec, row) for row in rows)
    return write_shard(store, url, number, ((face.jpeg, face.metadata) for face in drawn))
