"""The two passes of preprocessing, each over one piece of the work; any process can do it.

screen_tar:  a raw tar -> a tar of what stays of it, and a verdict on each of its samples
mix_group:   staged tars and a plan -> the training shards of one group

Each writes what says that it is done as the last thing.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.preprocess import PreprocessConfig
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.resharding import Group
from data_pipelines.sample_reader import member_sample
from data_pipelines.screening import Dropped, Kept, screen
from data_pipelines.shard_index import Shard
from data_pipelines.shard_writer import sample_key, shard_name, write_members, write_tar
from data_pipelines.tar_members import MemberTable, ShardMismatchError, Tar, scan_tar
from data_pipelines.verdicts import Verdicts

VERDICTS = ".verdicts.parquet"
PLAN = ".plan.parquet"
SHARDS = ".shards.json"
Judged = tuple[str, Kept | Dropped]
"""Key of a sample, and what becomes of it."""


def screen_tar(config: PreprocessConfig, store: ObjectStore, url: str, name: str) -> None:
    """Stage what stays of the raw tar `name` below `url`.

    A tar that cannot be read is no error: its verdicts say so.
    """
    staged = join(config.staged, name)
    try:
        with store.mapped(join(url, name)) as tar:
            table = scan_tar(tar, join(url, name))
            verdicts = _stage(store, staged, _judged(table, tar, name, config))
    except ShardMismatchError as error:
        verdicts = Verdicts.unreadable(str(error))
    store.write(f"{staged}{VERDICTS}", verdicts.to_parquet())


def read_verdicts(store: ObjectStore, config: PreprocessConfig, name: str) -> Verdicts:
    """Of a tar that was screened. Raises ShardMismatchError for a damaged file."""
    where = join(config.staged, f"{name}{VERDICTS}")
    try:
        return Verdicts.from_parquet(store.read(where))
    except ShardMismatchError as error:
        raise ShardMismatchError(
            f"{where} is damaged ({error}); delete it and run the same command again"
        ) from error


def _judged(table: MemberTable, tar: Tar, name: str, config: PreprocessConfig) -> Iterator[Judged]:
    for row, key in enumerate(table.keys):
        yield key, screen(member_sample(table, row, name, tar, 0, table.extensions), config)


def _stage(store: ObjectStore, url: str, judged: Iterator[Judged]) -> Verdicts:
    """Write the samples that stay, numbered, as one tar."""
    verdicts: list[Judged] = []

    def kept() -> Iterator[tuple[str, dict[str, bytes]]]:
        numbers = count()
        for key, verdict in judged:
            if isinstance(verdict, Kept):
                yield f"{next(numbers):09d}", verdict.members
                verdicts.append((key, replace(verdict, members={})))  # else all are held in memory
            else:
                verdicts.append((key, verdict))

    write_tar(store, url, kept())
    return Verdicts.of(verdicts)


def write_plan(
    store: ObjectStore, config: PreprocessConfig, group: Group, names: Sequence[str]
) -> str:
    """Write which staged sample goes where; returns the group's name."""
    ends = np.array(group.ends)
    table = pa.table(
        {
            "tar": pa.array([names[tar] for tar in group.sources.tolist()]).dictionary_encode(),
            "row": group.rows,
            "shard": group.first_shard + np.searchsorted(ends, np.arange(ends[-1]), side="right"),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    name = f"{group.first_shard:06d}"
    store.write(join(config.groups, f"{name}{PLAN}"), sink.getvalue())
    return name


def mix_group(config: PreprocessConfig, store: ObjectStore, url: str, name: str) -> None:
    """Write the training shards of the group `name`, whose plan lies below `url`."""
    plan = pq.read_table(io.BytesIO(store.read(join(url, f"{name}{PLAN}"))))
    with ExitStack() as opened:
        staged: dict[str, tuple[MemberTable, Tar]] = {}
        for tar_name in plan["tar"].unique().to_pylist():
            where = join(config.staged, tar_name)
            tar = opened.enter_context(store.mapped(where))
            staged[tar_name] = scan_tar(tar, where), tar
        shards = []
        numbers = plan["shard"].to_numpy()
        for number in np.unique(numbers).tolist():
            here = plan.filter(pa.array(numbers == number))
            places = zip(here["tar"].to_pylist(), here["row"].to_pylist(), strict=True)
            samples = (
                (sample_key(number, row), _members(*staged[tar_name], staged_row, tar_name))
                for row, (tar_name, staged_row) in enumerate(places)
            )
            shards.append(write_members(store, config.out, shard_name(number), samples))
    lines = [asdict(replace(shard, folder="")) for shard in shards]
    store.write(join(url, f"{name}{SHARDS}"), json.dumps(lines).encode())


def shards_of_group(store: ObjectStore, config: PreprocessConfig, name: str) -> list[Shard]:
    """What `mix_group` wrote."""
    where = join(config.groups, f"{name}{SHARDS}")
    try:
        lines = json.loads(store.read(where))
        return [Shard(**{**line, "folder": config.out}) for line in lines]
    except (ValueError, TypeError) as error:
        raise ShardMismatchError(
            f"{where} is damaged ({error}); delete it and run the same command again"
        ) from error


def _members(table: MemberTable, tar: Tar, row: int, name: str) -> dict[str, bytes]:
    if row >= len(table.keys):
        raise ShardMismatchError(
            f"the staged tar {name} is not the one that was screened; delete its {VERDICTS} and "
            f"run the same command again"
        )
    sample = member_sample(table, row, name, tar, 0, table.extensions)
    return {extension: sample[extension] for extension in table.extensions if extension in sample}
