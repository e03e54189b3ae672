"""Raw image-text tars -> training shards, on Ray, in two passes over the data.

    raw/*.tar ──screen──> OUT-work/staged: tars of what stays, and a verdict on every sample
                             │ duplicates over all tars, the plan of the shards    (the driver)
    out/*.tar <──mix──────── OUT-work/staged, OUT-work/groups
    out/audit.json, out/index.parquet                                    (the index comes last)

Each pass goes on where it was stopped. All of it is a function of the raw tars and the
configuration, so what is done twice is done alike.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from cluster.batch import on_each
from cluster.leases import QueueState
from cluster.session import ray_session
from configs.loading import digest_of_json, sealed, unsealed
from configs.preprocess import PreprocessConfig
from data_pipelines.duplicates import repeats_exactly, repeats_nearly
from data_pipelines.object_store import AlreadyExistsError, ObjectInfo, ObjectStore, absolute, join
from data_pipelines.preprocessing import (
    PLAN,
    SHARDS,
    VERDICTS,
    mix_group,
    read_verdicts,
    screen_tar,
    shards_of_group,
    write_plan,
)
from data_pipelines.resharding import Ints, groups_of
from data_pipelines.shard_index import (
    INDEX_NAME,
    ShardIndex,
    changed_shards,
    read_index,
    write_index,
)
from data_pipelines.verdicts import Audit

AUDIT = "audit.json"
CLAIM = "preprocess.json"
_READERS = 16
OnProgress = Callable[[str, QueueState], None]
"""Told the name of the pass and the state of its queue."""


def preprocess(
    store: ObjectStore,
    config: PreprocessConfig,
    *,
    on_progress: OnProgress = lambda name, state: None,
) -> tuple[ShardIndex, Audit]:
    """Make the training shards, or find that they are made already.

    Raises:
        ValueError: there is no raw tar, or nothing stays of them.
        AlreadyExistsError: `out` or its work folder hold something else.
        BatchFailedError: the store or Ray failed; the same call goes on from there.
    """
    config = config.model_copy(update={"raw": absolute(config.raw), "out": absolute(config.out)})
    raw = [info for info in store.list(config.raw) if info.url.endswith(".tar")]
    if not raw:
        raise ValueError(f"there is no .tar below {config.raw}; check `raw`")
    digest = _claim(store, config, raw)
    if store.exists(join(config.out, INDEX_NAME)):
        _tidy(store, config)
        return read_index(store, config.out), _read_audit(store, config, digest)
    names = [info.url.removeprefix(f"{config.raw.rstrip('/')}/") for info in raw]
    with ray_session(num_cpus=config.workers):
        staged, made = (config.staged, VERDICTS), (config.groups, SHARDS)
        _pass(store, config, screen_tar, config.raw, names, staged, on_progress)
        audit, rows_kept = _without_duplicates(store, config, names)
        groups = groups_of(
            rows_kept,
            rows_per_shard=config.rows_per_shard,
            mix_shards=config.mix_shards,
            seed=config.seed,
        )
        plans = [write_plan(store, config, group, names) for group in groups]
        _pass(store, config, mix_group, config.groups, plans, made, on_progress)
    shards = [shard for name in plans for shard in shards_of_group(store, config, name)]
    audit.check(sum(shard.num_samples for shard in shards))
    _check_there(store, config, ShardIndex(config.out, shards))
    told = sealed({"work": digest, **audit.to_json()})
    store.write(join(config.out, AUDIT), json.dumps(told, indent=2).encode())
    index = write_index(store, config.out, shards)
    _tidy(store, config)
    return index, audit


def _check_there(store: ObjectStore, config: PreprocessConfig, index: ShardIndex) -> None:
    """Marks say that shards were made; somebody may have taken them away since."""
    if changed := changed_shards(store, index, store.list(config.out)):
        shard, problem = next(iter(changed.items()))
        raise ValueError(
            f"{len(changed)} shards of {config.out} are no longer what was made, first {shard.name}"
            f" {problem}; delete {config.out} and {config.work}, and begin anew"
        )


def _tidy(store: ObjectStore, config: PreprocessConfig) -> None:
    """What nobody needs any more goes; verdicts stay, to be looked up."""
    for info in (*store.list(config.staged), *store.list(config.groups)):
        if info.url.endswith((".tar", PLAN)):
            store.delete(info.url)


def _pass(
    store: ObjectStore,
    config: PreprocessConfig,
    task: Callable[[PreprocessConfig, ObjectStore, str, str], None],
    url: str,
    names: Sequence[str],
    marks: tuple[str, str],
    on_progress: OnProgress,
) -> None:
    """One of the two; pieces whose mark is there are done."""
    told = partial(on_progress, task.__name__)
    on_each(store, url, names, config.workers, partial(task, config), told, marks)


def _claim(store: ObjectStore, config: PreprocessConfig, raw: Sequence[ObjectInfo]) -> str:
    """Take the folders for this work, or see that they are of this work; its digest."""
    tars = [[info.url, info.size_bytes, info.etag] for info in raw]
    claim = {
        "config": config.model_dump(mode="json", exclude={"workers", "store"}),
        "raw": digest_of_json({"tars": tars}),
    }
    url = join(config.work, CLAIM)
    try:
        if not store.exists(url):
            _check_vacant(store, config)
        store.write(url, json.dumps(sealed(claim)).encode(), only_if_absent=True)
    except AlreadyExistsError:
        _check_claim(claim, store.read(url), config)
    return digest_of_json(claim)


def _check_vacant(store: ObjectStore, config: PreprocessConfig) -> None:
    for url in (config.out, config.work):
        if found := store.list(url):
            raise ValueError(
                f"{url} holds {len(found)} objects already, first {found[0].url}; choose another "
                f"`out`, or delete that folder if nobody needs it"
            )


def _check_claim(claim: dict[str, Any], data: bytes, config: PreprocessConfig) -> None:
    try:
        found = unsealed(json.loads(data))
    except (ValueError, TypeError) as error:
        raise AlreadyExistsError(
            f"{join(config.work, CLAIM)} is damaged ({error}); delete {config.work} and "
            f"{config.out}, and begin anew"
        ) from error
    before, now = (_settings(each["config"]) for each in (found, claim))
    changed = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if found["raw"] != claim["raw"]:
        changed.append("the raw tars are others than when it began")
    if changed:
        raise AlreadyExistsError(
            f"{config.work} is of other work: {'; '.join(changed)}. Choose another `out`, or "
            f"delete {config.work} and {config.out} and begin anew"
        )


def _settings(config: dict[str, Any], below: str = "") -> dict[str, Any]:
    """Every setting by its dotted path."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, dict)
        found |= _settings(value, f"{below}{name}.") if inner else {f"{below}{name}": value}
    return found


def _without_duplicates(
    store: ObjectStore, config: PreprocessConfig, names: Sequence[str]
) -> tuple[Audit, list[Ints]]:
    """The count of everything, and which of the staged rows of each tar stay."""
    audit, digests, looks = Audit(), [], []
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(partial(read_verdicts, store, config), names)
        for name, verdicts in zip(names, found, strict=True):
            audit.add(name, verdicts)
            digests.append(verdicts.sha256s)
            looks.append(verdicts.looks)
    ends = np.cumsum([len(part) for part in looks])
    stays = np.ones(ends[-1], bool)
    if config.duplicates.exact:
        stays &= repeats_exactly(np.concatenate(digests)) < 0
        audit.take_out("exact", int((~stays).sum()))
    if config.duplicates.near_bits is not None:
        others = np.flatnonzero(stays)
        near = repeats_nearly(np.concatenate(looks)[others], config.duplicates.near_bits) >= 0
        stays[others[near]] = False
        audit.take_out("near", int(near.sum()))
    if not stays.any():
        raise ValueError(
            f"nothing of the {audit.samples} samples below {config.raw} stays: "
            f"{json.dumps(audit.to_json())}; loosen `filters` or `duplicates`, with another `out`"
        )
    return audit, [np.flatnonzero(part) for part in np.split(stays, ends[:-1])]


def _read_audit(store: ObjectStore, config: PreprocessConfig, digest: str) -> Audit:
    url = join(config.out, AUDIT)
    try:
        told = unsealed(json.loads(store.read(url)))
    except (ValueError, TypeError) as error:
        raise AlreadyExistsError(f"{url} is damaged ({error}); restore it") from error
    if told.pop("work") != digest:
        raise AlreadyExistsError(f"{url} is of other work; choose another `out`")
    return Audit.from_json(told)
