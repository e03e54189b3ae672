"""Indexing and verifying shard sets on Ray: a worker reads a tar once, front to back.

A tar's line of the index stays in the metadata of its member table, so work that was stopped goes
on where it was, and a tar that was replaced since is read again. The index is written last.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.batch import on_each
from cluster.leases import QueueState
from data_pipelines.decoding import DecodeError
from data_pipelines.object_store import (
    ObjectInfo,
    ObjectMissingError,
    ObjectStore,
    absolute,
    join,
)
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample
from data_pipelines.sample_reader import member_sample
from data_pipelines.shard_index import (
    Shard,
    ShardIndex,
    changed_shards,
    index_shard,
    members_name,
    read_members,
    samples_of,
    shard_of_members,
    write_index,
)
from data_pipelines.tar_members import MemberTable, ShardMismatchError, Tar, scan_tar


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of one tar: its line of the index, or why it has none."""

    shard: Shard | None
    num_interleaved: int = 0
    """Samples that WebDataset's own reader would split; ours reads them."""
    num_without_image: int = 0
    problem: str = ""


def index_set(
    store: ObjectStore,
    url: str,
    *,
    num_workers: int,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> tuple[ShardIndex, dict[str, Indexed]]:
    """Index every tar below `url`, in order of name; also what became of each.

    Tars that are damaged or hold no sample are left out of the index.

    Raises:
        ValueError: there is no tar that can be used.
        BatchFailedError: the store or Ray failed; the same call goes on from there.
    """
    url = absolute(url)
    names = [name for name in _names_of(url, store.list(url)) if name.endswith(".tar")]
    if not names:
        raise ValueError(f"there is no .tar below {url}; check the URL")
    found = on_each(store, url, names, num_workers, _index_one, on_progress)
    shards = [shard for name in names if (shard := found[name].shard) is not None]
    if not shards:
        raise ValueError(
            f"none of the {len(names)} tars below {url} can be used; {names[0]}: "
            f"{found[names[0]].problem}"
        )
    return write_index(store, url, shards), found


def verify_set(
    store: ObjectStore,
    index: ShardIndex,
    *,
    deep: bool,
    num_workers: int,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> tuple[list[str], int]:
    """What is wrong with a shard set, one line each, and how many samples are interleaved.

    Args:
        deep: read every byte of every tar, indexed or not, and decode the images of the shards;
            otherwise the listing is looked at, a local tar is read only if it was written again,
            and no interleaved sample is seen.

    Raises:
        BatchFailedError: the store or Ray failed.
    """
    index = index.moved(absolute)
    listing = store.list(index.url)
    changed = changed_shards(store, index, listing)
    unindexed = _unindexed(index, listing)
    problems = _repeated(index) | unindexed | _without_members(index, listing)  # gravest last
    problems |= {shard.name: problem for shard, problem in changed.items()}
    interleaved = 0
    if deep:
        there = {info.url for info in listing}
        readable = (shard for shard in index.shards if {shard.url, shard.members_url} <= there)
        names = [shard.name for shard in readable] + sorted(unindexed)
        task = partial(_verify_one, {shard.name: shard for shard in index.shards})
        found = on_each(store, index.url, names, num_workers, task, on_progress)
        problems |= {name: problem for name, (problem, _) in found.items() if problem}
        interleaved = sum(count for _, count in found.values())
    return [f"{name} {problem}" for name, problem in sorted(problems.items())], interleaved


def _without_members(index: ShardIndex, listing: list[ObjectInfo]) -> dict[str, str]:
    there = {info.url for info in listing}
    return {
        shard.name: "has lost its member table; index the shard set again"
        for shard in index.shards
        if shard.members_url not in there
    }


def _unindexed(index: ShardIndex, listing: list[ObjectInfo]) -> dict[str, str]:
    known = {shard.name for shard in index.shards}
    tars = (name for name in _names_of(index.url, listing) if name.endswith(".tar"))
    return {name: "is not in the index" for name in tars if name not in known}


def _repeated(index: ShardIndex) -> dict[str, str]:
    first: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for shard in index.shards:
        if first.setdefault(shard.sha256, shard.name) != shard.name:
            repeated[shard.name] = f"holds the same bytes as {first[shard.sha256]}"
    return repeated


def _names_of(url: str, listing: list[ObjectInfo]) -> list[str]:
    return [info.url.removeprefix(url.rstrip("/") + "/") for info in listing]


def _index_one(store: ObjectStore, url: str, name: str) -> Indexed:
    info = store.stat(join(url, name))
    if (known := _known_line(store, url, name, info)) is not None:
        return known
    try:
        with store.mapped(info.url) as tar:
            return _indexed(*index_shard(store, url, name, tar, info.etag))
    except ShardMismatchError as error:
        return Indexed(None, problem=str(error))


def _indexed(shard: Shard, table: MemberTable) -> Indexed:
    return Indexed(shard, table.num_interleaved, table.num_without(IMAGE_EXTENSIONS))


def _known_line(store: ObjectStore, url: str, name: str, info: ObjectInfo) -> Indexed | None:
    """What an earlier indexing of the same tar found."""
    try:
        data = store.read(join(url, members_name(name)))
        shard, table = shard_of_members(url, data)
    except (ObjectMissingError, ShardMismatchError):
        return None
    same = (shard.name, shard.size_bytes, shard.etag) == (name, info.size_bytes, info.etag)
    return _indexed(shard, table) if same else None


def _verify_one(
    shards: dict[str, Shard], store: ObjectStore, url: str, name: str
) -> tuple[str, int]:
    """What is wrong with one tar, byte for byte ("" for nothing); its interleaved samples."""
    if (shard := shards.get(name)) is None:
        with store.mapped(join(url, name)) as tar:
            return f"is not in the index: {_why_unindexed(tar, join(url, name))}", 0
    try:
        table = read_members(store, shard)
    except (ShardMismatchError, ObjectMissingError) as error:
        return f"has no usable member table ({error})", 0
    with store.mapped(join(url, name)) as tar:
        if hashlib.sha256(tar).hexdigest() == shard.sha256:
            return _undecodable(table, tar, shard), table.num_interleaved
        try:
            return _difference(table, scan_tar(tar, join(url, name))), 0
        except ShardMismatchError as error:
            return f"was damaged: {error}", 0


def _why_unindexed(tar: Tar, url: str) -> str:
    try:
        found = samples_of(tar, url)
    except ShardMismatchError as error:
        return str(error)
    return f"it is sound and came later (samples: {len(found.keys)}); index the shard set again"


def _undecodable(table: MemberTable, tar: Tar, shard: Shard) -> str:
    """Which images cannot be decoded; they are sound copies of what was broken before."""
    reasons = []
    for row in range(shard.num_samples):
        try:
            decode_sample(member_sample(table, row, shard.url, tar, 0, table.extensions), 32)
        except DecodeError as error:
            reasons.append(str(error))
    return f"has unusable images ({len(reasons)}), first: {reasons[0]}" if reasons else ""


def _difference(before: MemberTable, now: MemberTable) -> str:
    """In what a tar's samples differ from those that were indexed."""
    lost, new = set(before.keys) - set(now.keys), set(now.keys) - set(before.keys)
    if lost or new:
        return f"was replaced (samples gone: {len(lost)}, new: {len(new)})"
    row_now = {key: row for row, key in enumerate(now.keys)}
    changed = [
        f"{key}.{extension}"
        for extension in before.extensions
        for row, key in enumerate(before.keys)
        if extension not in now.crc32s
        or before.crc32s[extension][row] != now.crc32s[extension][row_now[key]]
    ]
    first = f", first {changed[0]}" if changed else ""
    return f"was replaced (members with other content: {len(changed)}{first})"
