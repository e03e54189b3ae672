"""Checkpoints in object storage: one exists when its COMPLETE manifest exists.

    RUN/checkpoints/step-00000100/parts-3f9c2a10/...   what the ranks wrote
    RUN/checkpoints/step-00000100/COMPLETE.json        written last; names every part by digest
    RUN/checkpoints/latest.json                        names the newest complete one

Object stores cannot rename, so parts go below a scratch prefix that no other attempt uses, and the
manifest names it. Parts without a manifest are invisible. Each checkpoint names its parent: what a
model has really been trained on is found along the lineage, not in a log of everything ever tried.
Of an old checkpoint that `train.keep_last` no longer keeps, what it has to say of that lineage
stays under HISTORY.json; one that a run went back behind is kept as SUPERSEDED-….json.

This module reads; `publisher` writes.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from configs.loading import problems_of, sealed, unsealed
from configs.schema import RunConfig
from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from pretrain.pieces import PiecesError, assemble
from pretrain.world import World, from_first_rank

MANIFEST_NAME = "COMPLETE.json"
LATEST_NAME = "latest.json"
HISTORY_NAME = "HISTORY.json"
SUPERSEDED_PREFIX = "SUPERSEDED-"
BUFFERS_NAME = "buffers.safetensors"
METRICS_NAME = "metrics.jsonl"
RUN_NAME = "run.yaml"
FORMAT_VERSION = 3


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to the run that wants it."""


class DamagedError(CheckpointError):
    """A complete checkpoint is no longer what was published; trying again does not help."""


class _OtherVersionError(CheckpointError):
    """Of an older or newer version of this code, and whole as far as anybody knows."""


class UnreadableError(CheckpointError):
    """A manifest cannot be read, so nobody knows which files are its checkpoint's."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What COMPLETE.json says, beside the SHA-256 over all of that. `files` maps names below the
    parts to (bytes, SHA-256)."""

    step: Annotated[int, Field(ge=0)]
    images: int
    """Samples consumed: the data position."""
    parent: Annotated[str, Field(pattern=r"^step-\d{8}$")] | None
    parts: str
    config: dict[str, Any]
    index_digest: str
    backbone_sha256: str | None
    world_size: int
    code_version: str
    shapes: dict[str, list[int]]
    """Of the trained parameters; their pieces are in `files`, whatever the world size."""
    counters: dict[str, float]
    """Adam's updates, and the state of fp16's loss scale."""
    files: dict[str, tuple[int, str]]
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples of the run so far that had to be replaced, by cause."""
    backbone_card_sha256: str | None = None
    """Over what the backbone's card says."""
    format_version: int = FORMAT_VERSION

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_url(run_url: str) -> str:
    return join(run_url, "checkpoints")


def parts_url(run_url: str, manifest: Manifest) -> str:
    """Folder of a checkpoint's files."""
    return join(checkpoints_url(run_url), manifest.name, manifest.parts)


def piece_file(kind: str, rank: int) -> str:
    """Name of a rank's pieces of a kind; see `pieces`."""
    return f"{kind}/{rank:05d}.safetensors"


# --- which there are ------------------------------------------------------------------------------


def complete_steps(store: ObjectStore, run_url: str) -> list[int]:
    """Steps that have a complete checkpoint, oldest first."""
    names = [
        info.url.rsplit("/", 2)[-2]
        for info in store.list(checkpoints_url(run_url))
        if info.url.endswith("/" + MANIFEST_NAME)
    ]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))


def read_manifest(store: ObjectStore, run_url: str, step: int) -> Manifest:
    """The manifest of one complete checkpoint.

    Raises:
        ObjectMissingError: there is no complete checkpoint at that step.
        DamagedError: the manifest cannot be read.
        CheckpointError: it is of another version.
    """
    where = join(checkpoints_url(run_url), checkpoint_name(step), MANIFEST_NAME)
    try:
        return manifest_at(store, where)
    except UnreadableError as error:
        raise DamagedError(f"{error}; {instead(store, run_url, step)}") from error


def manifest_at(store: ObjectStore, where: str) -> Manifest:
    """The manifest in one file, whatever that is called.

    Raises:
        UnreadableError: it is not what was written.
        CheckpointError: it is of another version of this code.
    """
    data = store.read(where)
    try:
        said = dict(json.loads(data))
        version = said.get("format_version")
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise _OtherVersionError(
                f"{where} has format {version}, this code reads {FORMAT_VERSION}; use the version "
                f"of this package that wrote it, or give the run another name"
            )
        manifest = _MANIFEST.validate_json(json.dumps(unsealed(said)), strict=True)
        if manifest.name != where.split("/")[-2]:
            raise ValueError(f"it is of step {manifest.step}")
        if manifest.parent is not None and not manifest.parent < manifest.name:
            raise ValueError(f"its parent {manifest.parent} is not older than it is")
        return manifest
    except _OtherVersionError:
        raise
    except (ValueError, TypeError) as error:
        said = _said(error) if isinstance(error, ValidationError) else error
        raise UnreadableError(f"{where} cannot be read ({said})") from error


def _said(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def newest(store: ObjectStore, run_url: str) -> Manifest | None:
    """The newest complete checkpoint of a run, or None when there is none."""
    steps = complete_steps(store, run_url)
    return read_manifest(store, run_url, steps[-1]) if steps else None


def next_older(store: ObjectStore, run_url: str, step: int | None) -> int | None:
    """The step of the complete checkpoint before that at `step`, or before the newest one."""
    steps = complete_steps(store, run_url)
    older = steps[:-1] if step is None else [other for other in steps if other < step]
    return older[-1] if older else None


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


def go_back(store: ObjectStore, run_url: str, step: int) -> list[int]:
    """Make `step` the newest complete checkpoint; returns the later ones, which are superseded.

    Their files stay. Call it before the run starts, not while it goes on.

    Raises:
        CheckpointError: there is no complete checkpoint at that step.
    """
    find(store, run_url, step)
    later = [other for other in complete_steps(store, run_url) if other > step]
    mark = f"{SUPERSEDED_PREFIX}{uuid.uuid4().hex[:8]}.json"
    for other in reversed(later):
        folder = join(checkpoints_url(run_url), checkpoint_name(other))
        store.write(join(folder, mark), store.read(join(folder, MANIFEST_NAME)))
        store.delete(join(folder, MANIFEST_NAME))
    point_to(store, run_url, step)
    return later


def point_to(store: ObjectStore, run_url: str, step: int) -> None:
    """Name the newest complete checkpoint for whoever looks in from outside; nothing here asks."""
    latest = {"name": checkpoint_name(step)}
    store.write(join(checkpoints_url(run_url), LATEST_NAME), to_json(latest))


def lineage(store: ObjectStore, run_url: str, manifest: Manifest) -> list[Manifest]:
    """The checkpoints that led to this one, oldest first, itself last."""
    line = [manifest]
    while (parent := line[-1].parent) is not None:
        try:
            line.append(_whole_or_history(store, join(checkpoints_url(run_url), parent)))
        except UnreadableError as error:
            raise CheckpointError(f"{error}; restore it: what was trained is said there") from error
    return line[::-1]


def _whole_or_history(store: ObjectStore, folder: str) -> Manifest:
    try:
        return manifest_at(store, join(folder, MANIFEST_NAME))
    except ObjectMissingError:
        return manifest_at(store, join(folder, HISTORY_NAME))


# --- what is in one -------------------------------------------------------------------------------


def check_files(store: ObjectStore, run_url: str, manifest: Manifest) -> None:
    """Compare what the store lists with the manifest; nothing is read.

    Raises:
        DamagedError: a file is gone, or has another size.
    """
    base = parts_url(run_url, manifest)
    there = {info.url: info.size_bytes for info in store.list(base)}
    for name, (size, _) in manifest.files.items():
        found = there.get(join(base, name))
        if found != size:
            raise DamagedError(
                f"{join(base, name)} {'is missing' if found is None else f'has {found} bytes'}, "
                f"its manifest names {size} bytes; {instead(store, run_url, manifest.step)}"
            )


def read_file(store: ObjectStore, run_url: str, manifest: Manifest, name: str) -> bytes:
    """One file of a checkpoint, verified.

    Raises:
        CheckpointError: it is gone, or its size or digest is not what the manifest says.
    """
    where = join(parts_url(run_url, manifest), name)
    if name not in manifest.files:
        raise CheckpointError(
            f"the manifest of checkpoint {manifest.name} of {run_url} names no {name}, only "
            f"{sorted(manifest.files)}; use another checkpoint"
        )
    try:
        data = store.read(where)
    except ObjectMissingError as error:
        raise DamagedError(
            f"{where} is missing, although its manifest names it; "
            f"{instead(store, run_url, manifest.step)}"
        ) from error
    size, digest = manifest.files[name]
    found = hashlib.sha256(data).hexdigest()
    if len(data) != size or found != digest:
        raise DamagedError(
            f"{where} is damaged: {len(data)} bytes with SHA-256 {found[:12]}…, its manifest names "
            f"{size} bytes with {digest[:12]}…; {instead(store, run_url, manifest.step)}"
        )
    return data


def instead(store: ObjectStore, run_url: str, step: int) -> str:
    """What to use in place of a damaged checkpoint."""
    older = next_older(store, run_url, step)
    if older is None:
        return "restore it: there is no older complete checkpoint"
    return f"restore it, or go back to the next older complete one: --from-step {older}"


def read_pieces(
    store: ObjectStore, run_url: str, manifest: Manifest, kind: str, *, first: int = 0
) -> Iterator[bytes]:
    """The packed pieces of every rank, one file after the other, that of rank `first` first."""
    names = sorted(name for name in manifest.files if name.startswith(f"{kind}/"))
    own = piece_file(kind, first)
    for name in sorted(names, key=lambda name: name != own):
        yield read_file(store, run_url, manifest, name)


def read_tensors(
    store: ObjectStore, run_url: str, manifest: Manifest, *, ema: bool
) -> dict[str, Tensor]:
    """Every trained parameter whole, float32, and every buffer, by the model's names.

    Raises:
        CheckpointError: a part is gone or damaged.
    """
    kind = "ema" if ema else "weights"
    try:
        files = read_pieces(store, run_url, manifest, kind)
        return assemble(files, manifest.shapes) | read_buffers(store, run_url, manifest)
    except (PiecesError, SafetensorError) as error:
        raise DamagedError(
            f"the {kind} of checkpoint {manifest.name} of {run_url} cannot be used: {error}; "
            f"{instead(store, run_url, manifest.step)}"
        ) from error


def read_buffers(store: ObjectStore, run_url: str, manifest: Manifest) -> dict[str, Tensor]:
    """BatchNorm's averages; empty for models without."""
    if BUFFERS_NAME not in manifest.files:
        return {}
    return load_safetensors(read_file(store, run_url, manifest, BUFFERS_NAME))


def read_samples(store: ObjectStore, run_url: str, manifest: Manifest) -> list[tuple[int, str]]:
    """(position, key) of every sample that led to this checkpoint, sorted by position."""
    samples = []
    for ancestor in lineage(store, run_url, manifest):
        for name in ancestor.files:
            if name.startswith("samples-"):
                lines = read_file(store, run_url, ancestor, name).decode().split("\n")
                samples += [line.split("\t", 1) for line in lines if line]
    return sorted((int(position), key) for position, key in samples)


def read_metrics(store: ObjectStore, run_url: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Every line of metrics that led to this checkpoint, in order."""
    return [
        json.loads(line)
        for ancestor in lineage(store, run_url, manifest)
        if METRICS_NAME in ancestor.files
        for line in read_file(store, run_url, ancestor, METRICS_NAME).decode().splitlines()
    ]


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
            f"{'; '.join(problems_of(error, RunConfig))}. Use another checkpoint, or its own "
            f"version."
        ) from error


def to_json(value: Mapping[str, Any] | Manifest | Sequence[Any]) -> bytes:
    """How manifests and listings are written; a manifest with a digest of itself."""
    if isinstance(value, Manifest):
        value = sealed(asdict(value))
    return (json.dumps(value, indent=1) + "\n").encode()
