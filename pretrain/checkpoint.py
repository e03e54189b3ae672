"""Checkpoints in object storage: one exists when its COMPLETE manifest exists.

    RUN/checkpoints/step-00000100/parts-3f9c2a10/...   what the ranks wrote
    RUN/checkpoints/step-00000100/COMPLETE.json        written last; names every part by digest
    RUN/checkpoints/latest.json                        names the newest complete one

Object stores cannot rename, so parts go below a scratch prefix that no other attempt uses, and the
manifest names it. Parts without a manifest are invisible. Each checkpoint names its parent: what a
model has really been trained on is found along the lineage, not in a log of everything ever tried.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.loading import problems_of
from configs.schema import RunConfig
from data_pipelines.local_files import sha256_of
from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from pretrain.world import World, from_first_rank, gather_from_ranks

MANIFEST_NAME = "COMPLETE.json"
EMA_NAME = "ema.safetensors"
WEIGHTS_NAME = "weights.safetensors"
METRICS_NAME = "metrics.jsonl"
FORMAT_VERSION = 1

MAY_CHANGE = (
    "output",
    "cluster.max_failures",
    "cluster.cpus_per_worker",
    "data.cache",
    "data.shards",
    "data.sources.*.shards",
    "data.decode_threads",
    "data.prefetch_batches",
    "engine.attention",
    "optimizer.decay_images",
    "store",
    "task.backbone.weights",
    "train.total_images",
    "train.checkpoint_every_images",
    "train.log_every_steps",
    "wandb",
)
"""Settings that may differ on resume; what they point to is compared by digest where it matters."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to the run that wants it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What COMPLETE.json says. `files` maps names below the parts to (bytes, SHA-256)."""

    step: int
    images: int
    """Samples consumed: the data position."""
    parent: str | None
    parts: str
    config: dict[str, Any]
    index_digest: str
    backbone_sha256: str | None
    world_size: int
    code_version: str
    files: dict[str, tuple[int, str]]
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples of the run so far that had to be replaced, by cause."""
    backbone_card_sha256: str | None = None
    """Over what the backbone's card says; older checkpoints do not know it."""
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def publish(
    store: ObjectStore,
    run_url: str,
    folder: Path,
    world: World,
    make_manifest: Callable[[str, dict[str, tuple[int, str]]], Manifest],
) -> Manifest:
    """Collective: upload every rank's files below `folder`, then write the manifest.

    Args:
        make_manifest: from the parts prefix and the list of files to the manifest.

    Raises:
        CheckpointError: what the store holds is not what was sent.
    """
    parts = str(from_first_rank(f"parts-{uuid.uuid4().hex[:8]}"))
    manifest = make_manifest(parts, {})
    where = join(run_url, "checkpoints", manifest.name)
    mine = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        info = store.upload(path, join(where, parts, name))
        mine[name] = (info.size_bytes, sha256_of(path))
        if info.size_bytes != path.stat().st_size:
            raise CheckpointError(
                f"{info.url} has {info.size_bytes} bytes in the store, {path.stat().st_size} were "
                f"sent; the checkpoint is not published, the one before it stays the newest"
            )
    files: dict[str, tuple[int, str]] = {}
    for other in gather_from_ranks(mine):
        assert isinstance(other, dict)
        files.update(other)
    manifest = make_manifest(parts, files)
    if world.is_first:
        _write_json(store, join(where, MANIFEST_NAME), asdict(manifest))
        _write_json(store, join(run_url, "checkpoints", "latest.json"), {"name": manifest.name})
    from_first_rank(None)  # nobody goes on before the checkpoint exists
    return manifest


def complete_steps(store: ObjectStore, run_url: str) -> list[int]:
    """Steps that have a complete checkpoint, oldest first."""
    names = [
        info.url.rsplit("/", 2)[-2]
        for info in store.list(join(run_url, "checkpoints"))
        if info.url.endswith("/" + MANIFEST_NAME)
    ]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))


def read_manifest(store: ObjectStore, run_url: str, step: int) -> Manifest:
    """The manifest of one complete checkpoint.

    Raises:
        ObjectMissingError: there is no complete checkpoint at that step.
        CheckpointError: the manifest cannot be read.
    """
    where = join(run_url, "checkpoints", checkpoint_name(step), MANIFEST_NAME)
    try:
        value = json.loads(store.read(where))
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {value['format_version']}, this code reads {FORMAT_VERSION}")
        files = {name: (int(size), str(sha)) for name, (size, sha) in value.pop("files").items()}
        return Manifest(files=files, **value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{where} cannot be read ({error}); delete it to fall back to an older checkpoint"
        ) from error


def newest(store: ObjectStore, run_url: str) -> Manifest | None:
    """The newest complete checkpoint of a run, or None when there is none."""
    steps = complete_steps(store, run_url)
    return read_manifest(store, run_url, steps[-1]) if steps else None


def newest_for_all(store: ObjectStore, run_url: str, world: World) -> Manifest | None:
    """Collective: the newest complete checkpoint as rank 0 sees it, so that all ranks agree."""
    manifest = from_first_rank(newest(store, run_url) if world.is_first else None)
    return manifest if isinstance(manifest, Manifest) else None


def find(store: ObjectStore, run_url: str, step: int | None) -> Manifest:
    """The complete checkpoint at `step`, or the newest one.

    Raises:
        CheckpointError: there is none; the message lists those there are.
    """
    steps = complete_steps(store, run_url)
    if not steps:
        raise CheckpointError(
            f"{run_url} has no complete checkpoint; check the URL, or train the run first"
        )
    if step not in (None, *steps):
        raise CheckpointError(
            f"{run_url} has no complete checkpoint at step {step}; the last of {len(steps)} are "
            f"the steps {steps[-5:]}"
        )
    return read_manifest(store, run_url, steps[-1] if step is None else step)


def lineage(store: ObjectStore, run_url: str, manifest: Manifest) -> list[Manifest]:
    """The checkpoints that led to this one, oldest first, itself last."""
    line = [manifest]
    while (parent := line[-1].parent) is not None:
        line.append(read_manifest(store, run_url, int(parent.removeprefix("step-"))))
    return line[::-1]


def read_file(store: ObjectStore, run_url: str, manifest: Manifest, name: str) -> bytes:
    """One file of a checkpoint, verified.

    Raises:
        CheckpointError: it is gone, or its size or digest is not what the manifest says.
    """
    where = join(run_url, "checkpoints", manifest.name, manifest.parts, name)
    if name not in manifest.files:
        raise CheckpointError(
            f"the manifest of checkpoint {manifest.name} of {run_url} names no {name}, only "
            f"{sorted(manifest.files)}; use another checkpoint"
        )
    try:
        data = store.read(where)
    except ObjectMissingError as error:
        raise CheckpointError(
            f"{where} is missing, although its manifest names it; use an older checkpoint"
        ) from error
    size, digest = manifest.files[name]
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{where} is damaged: {len(data)} bytes, not the {size} bytes with SHA-256 {digest} "
            f"that its manifest names; use an older checkpoint"
        )
    return data


def fetch(
    store: ObjectStore, run_url: str, manifest: Manifest, folder: Path, *, below: str
) -> None:
    """Copy the verified files whose names start with `below` into a local folder."""
    for name in manifest.files:
        if name.startswith(below):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_file(store, run_url, manifest, name))


def read_samples(store: ObjectStore, run_url: str, manifest: Manifest) -> list[tuple[int, str]]:
    """(position, key) of every sample that led to this checkpoint, sorted by position."""
    samples = []
    for ancestor in lineage(store, run_url, manifest):
        for name in ancestor.files:
            if name.startswith("samples-"):
                lines = read_file(store, run_url, ancestor, name).decode().splitlines()
                samples += [line.split("\t", 1) for line in lines]
    return sorted((int(position), key) for position, key in samples)


def read_metrics(store: ObjectStore, run_url: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Every line of metrics that led to this checkpoint, in order."""
    return [
        json.loads(line)
        for ancestor in lineage(store, run_url, manifest)
        if METRICS_NAME in ancestor.files
        for line in read_file(store, run_url, ancestor, METRICS_NAME).decode().splitlines()
    ]


def check_resumable(
    manifest: Manifest,
    config: RunConfig,
    *,
    index_digest: str,
    backbone_sha256: str | None,
    backbone_card_sha256: str | None = None,
    world_size: int,
) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        CheckpointError: listing every setting that differs and both its values, or those that the
            checkpoint has and this version does not know.
    """
    card_then = manifest.backbone_card_sha256 or backbone_card_sha256
    different = [
        *(text for key, text in _differences(manifest, config).items() if not _may_change(key)),
        *_different("shard index", manifest.index_digest, index_digest),
        *_different("backbone", manifest.backbone_sha256, backbone_sha256),
        *_different("backbone's card", card_then, backbone_card_sha256),
        *_different("number of workers", manifest.world_size, world_size),
    ]
    if different:
        raise CheckpointError(
            f"run {config.name!r} has a checkpoint at step {manifest.step} made with other "
            f"settings: {'; '.join(sorted(different))}. Restore them, give the run another name, "
            f"or delete its folder{' (it is not trained yet)' if manifest.step == 0 else ''}."
        )


def changed_settings(manifest: Manifest, config: RunConfig) -> list[str]:
    """Settings that may differ on resume, and do: each with both its values."""
    differences = _differences(manifest, config)
    return [text for key, text in differences.items() if _may_change(key)]


def run_of(manifest: Manifest) -> RunConfig:
    """The configuration that a checkpoint was made with.

    Raises:
        CheckpointError: this version of the code cannot read it.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(manifest.config))
    except ValidationError as error:
        raise CheckpointError(
            f"the configuration in the manifest of checkpoint {manifest.name} cannot be used: "
            f"{'; '.join(problems_of(error))}. Use another checkpoint, or its own version."
        ) from error


def _differences(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """By setting, what it was and what it is."""
    before = _flat(run_of(manifest).model_dump(mode="json"))  # with defaults of newer settings
    now = _flat(config.model_dump(mode="json"))
    return {
        key: text
        for key in sorted(before.keys() | now.keys())
        for text in _different(key, before.get(key), now.get(key))
    }


def _different(what: str, before: Any, now: Any) -> list[str]:
    return [] if before == now else [f"{what} was {before!r}, is {now!r}"]


def _may_change(key: str) -> bool:
    return any(fnmatchcase(key, name) or fnmatchcase(key, f"{name}.*") for name in MAY_CHANGE)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= (
            _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {prefix + key: inner}
        )
    return flat


def _write_json(store: ObjectStore, url: str, value: Mapping[str, Any]) -> None:
    store.write(url, (json.dumps(value, indent=1) + "\n").encode())
