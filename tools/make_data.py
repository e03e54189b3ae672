"""`diti data make`: write a whole shard set in parallel, a process for every shard in work."""

import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.emoji import EmojiSpec, draw_emoji
from data_pipelines.emoji_art import load_art
from data_pipelines.image_import import BadImagesError, FolderShard, import_images
from data_pipelines.laion_like import SCHEMA, LaionSpec, draw_row
from data_pipelines.object_store import AlreadyExistsError, ObjectStore, join
from data_pipelines.shard_index import INDEX_NAME, Shard, ShardIndex, write_index
from data_pipelines.shard_writer import (
    ROWS_PER_SHARD_LIMIT,
    shard_name,
    write_keyed_shard,
    write_raw_shard,
    write_shard,
)

T = TypeVar("T")
WriteShard = Callable[[ObjectStore, str, int], T]
"""Writes the shard of that number below that URL. It must be picklable: it goes to a process."""
OnShard = Callable[[int], None]


def make_avatars(
    spec: AvatarSpec,
    count: int,
    store: ObjectStore,
    url: str,
    *,
    rows_per_shard: int,
    workers: int,
    on_shard: OnShard = lambda images: None,
) -> ShardIndex:
    """Write `count` avatars below `url` as shards of `rows_per_shard`, then their index.

    Raises:
        ValueError: count or rows_per_shard is not positive, or the spec is refused.
        AlreadyExistsError: there is a shard set at `url`; sets are not overwritten.
    """
    parts = _parts_of(count, rows_per_shard)
    draw_avatar(spec, 0)  # a spec that cannot be drawn is refused here, not in every worker
    if spec.pairs is not None and count % 2:
        raise ValueError(f"pairs need an even count, got {count}; the last row would have none")
    shards = [partial(_write_avatars, spec, rows) for rows in parts]
    return write_set(shards, store, url, workers=workers, on_shard=on_shard)


def make_emoji(
    spec: EmojiSpec,
    packages: Path,
    count: int,
    store: ObjectStore,
    url: str,
    *,
    rows_per_shard: int,
    workers: int,
    on_shard: OnShard = lambda images: None,
) -> ShardIndex:
    """The same with emoji, whose art is in the folder `packages` (`fetch_packages`).

    Raises:
        ValueError: as `make_avatars`.
        PackageError: a package is missing or damaged.
        AlreadyExistsError: there is a shard set at `url`.
    """
    parts = _parts_of(count, rows_per_shard)
    draw_emoji(spec, load_art(packages), 0)
    shards = [partial(_write_emoji, spec, packages, rows) for rows in parts]
    return write_set(shards, store, url, workers=workers, on_shard=on_shard)


def import_folder(
    shards: Sequence[FolderShard],
    store: ObjectStore,
    url: str,
    *,
    workers: int,
    on_shard: OnShard = lambda images: None,
) -> ShardIndex:
    """Write the images of a folder (`plan_folder`) below `url`, then their index.

    Raises:
        BadImagesError: names every image that cannot be used; then there is no index.
        AlreadyExistsError: there is a shard set at `url`.
    """
    writers = [partial(_write_images, shard) for shard in shards]
    return write_set(writers, store, url, workers=workers, on_shard=on_shard)


def make_laion_like(
    spec: LaionSpec,
    count: int,
    store: ObjectStore,
    url: str,
    *,
    workers: int,
    on_shard: OnShard = lambda images: None,
) -> Counter[str]:
    """Write `count` rows below `url` as img2dataset does; how many rows have each fault, "" none.

    Such a set is raw: there is no index, and an attempt that was interrupted cannot be told from a
    smaller set, so it is not gone on with.

    Raises:
        ValueError: count is not positive.
        AlreadyExistsError: there are tars at `url`.
    """
    parts = _parts_of(count, spec.rows_per_shard)
    if tars := _tars_at(store, url):
        raise AlreadyExistsError(
            f"{url} holds {len(tars)} tars already, first {tars[0]}; delete that folder, or choose "
            f"another one"
        )
    shards = [partial(_write_laion_like, spec, rows) for rows in parts]
    written = _write_all(shards, store, url, workers, lambda rows: on_shard(rows.total()))
    return sum(written, Counter[str]())


def write_set(
    shards: Sequence[WriteShard[Shard]],
    store: ObjectStore,
    url: str,
    *,
    workers: int,
    on_shard: OnShard = lambda images: None,
) -> ShardIndex:
    """Write these shards below `url`, then their index. The result does not depend on `workers`.

    `on_shard` is told the images of each finished shard.

    Raises:
        BadImagesError: from all the shards together.
        AlreadyExistsError: there is a shard set at `url`; sets are not overwritten.
    """
    _check_vacant(store, url, len(shards))
    written = _write_all(shards, store, url, workers, lambda shard: on_shard(shard.num_samples))
    return write_index(store, url, written)


def _write_all(
    shards: Sequence[WriteShard[T]],
    store: ObjectStore,
    url: str,
    workers: int,
    on_written: Callable[[T], None],
) -> list[T]:
    """What the writers return, in the order of the shards.

    Raises:
        BadImagesError: from all the shards together.
    """
    written: dict[int, T] = {}
    problems: list[str] = []
    # Fresh processes: the store's client must not be forked.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        with _interrupts_wait():
            tasks = {
                pool.submit(write, store, url, number): number
                for number, write in enumerate(shards)
            }
        try:
            for task in as_completed(tasks):
                try:
                    written[tasks[task]] = task.result()
                except BadImagesError as error:  # the others are looked at, to name all at once
                    problems += error.problems
                else:
                    on_written(task.result())
        except BaseException:  # Ctrl-C too: what has not begun is not begun any more
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise BadImagesError(sorted(problems))
    return [written[number] for number in range(len(shards))]


def _parts_of(count: int, rows_per_shard: int) -> list[range]:
    """The rows of each shard."""
    if count < 1 or not 1 <= rows_per_shard <= ROWS_PER_SHARD_LIMIT:
        raise ValueError(
            f"count must be at least 1 and rows per shard 1 to {ROWS_PER_SHARD_LIMIT}, got {count} "
            f"and {rows_per_shard}"
        )
    return [
        range(number * rows_per_shard, min((number + 1) * rows_per_shard, count))
        for number in range(math.ceil(count / rows_per_shard))
    ]


def _check_vacant(store: ObjectStore, url: str, num_shards: int) -> None:
    if store.exists(join(url, INDEX_NAME)):
        raise AlreadyExistsError(
            f"{url} holds a shard set already; delete that folder, or choose another one"
        )
    names = {join(url, shard_name(number)) for number in range(num_shards)}
    if strangers := sorted(set(_tars_at(store, url)) - names):
        raise AlreadyExistsError(
            f"{url} holds {len(strangers)} tars that would not belong to this set, first "
            f"{strangers[0]}; delete that folder, or choose another one"
        )


def _tars_at(store: ObjectStore, url: str) -> list[str]:
    return [info.url for info in store.list(url) if info.url.endswith(".tar")]


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


def _write_avatars(
    spec: AvatarSpec, rows: range, store: ObjectStore, url: str, number: int
) -> Shard:
    drawn = (draw_avatar(spec, row) for row in rows)
    return write_shard(store, url, number, ((face.jpeg, face.metadata) for face in drawn))


def _write_emoji(
    spec: EmojiSpec, packages: Path, rows: range, store: ObjectStore, url: str, number: int
) -> Shard:
    art = load_art(packages)  # once in every process
    drawn = (draw_emoji(spec, art, row) for row in rows)
    return write_shard(store, url, number, ((one.jpeg, one.metadata) for one in drawn))


def _write_images(shard: FolderShard, store: ObjectStore, url: str, number: int) -> Shard:
    return write_keyed_shard(store, url, number, import_images(shard))


def _write_laion_like(
    spec: LaionSpec, rows: range, store: ObjectStore, url: str, number: int
) -> Counter[str]:
    faults = Counter[str]()

    def drawn() -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
        for row in rows:
            one = draw_row(spec, row)
            faults[one.columns["fault"]] += 1
            yield one.key, one.members, one.columns

    write_raw_shard(store, url, number, drawn(), SCHEMA)
    return faults
