"""`diti data repair`: which of a run's bad samples can be used by now."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from configs.schema import RunConfig
from data_pipelines.bad_samples import (
    BAD_SAMPLE_ERRORS,
    DEAD_LETTERS,
    cause_of,
    from_json_lines,
    to_json_lines,
)
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample
from data_pipelines.sample_reader import read_sample
from data_pipelines.shard_index import Shard, read_members, read_sets
from data_pipelines.tar_members import MemberTable
from pretrain import checkpoint


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of a run's dead letters."""

    mended: int
    still_bad: Counter[str]
    """By cause, as it is now."""


def repair(store: ObjectStore, run_url: str) -> Repaired:
    """Read every sample of a run's dead letters again; letters of those that pass are removed.

    A run takes no notice of its letters, so it uses a mended sample from its next epoch on.

    Raises:
        CheckpointError: there is no such run.
        ValueError: a letter is none, or the shard set is another one now.
    """
    config = checkpoint.run_of(checkpoint.find(store, run_url, None))
    shards = {shard.url: shard for shard in read_sets(store, config.data.folders).shards}
    # Letters of one shard mostly follow each other.
    members_of = lru_cache(maxsize=1)(partial(read_members, store))
    mended, still_bad = 0, Counter[str]()
    for info in store.list(join(run_url, DEAD_LETTERS)):
        letters = from_json_lines(store.read(info.url).decode())
        causes = [
            _cause_now(store, config, shards.get(letter.shard), letter.row, members_of)
            for letter in letters
        ]
        kept = [letter for letter, cause in zip(letters, causes, strict=True) if cause]
        mended += len(letters) - len(kept)
        still_bad.update(cause for cause in causes if cause)
        if not kept:
            store.delete(info.url)
        elif len(kept) < len(letters):
            store.write(info.url, to_json_lines(kept).encode())
    return Repaired(mended, still_bad)


def _cause_now(
    store: ObjectStore,
    config: RunConfig,
    shard: Shard | None,
    row: int,
    members_of: Callable[[Shard], MemberTable],
) -> str:
    """Why the sample cannot be used; "" if it can."""
    if shard is None or row >= shard.num_samples:
        return "no longer in the index"
    try:
        sample = read_sample(store, shard.url, members_of(shard), row, IMAGE_EXTENSIONS)
        decode_sample(sample, config.data.image_size_px)
    except BAD_SAMPLE_ERRORS as error:
        return cause_of(error)
    return ""
