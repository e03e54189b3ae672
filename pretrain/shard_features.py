"""A trained encoder over one shard: raw samples in, its Parquet part out. No Ray, no commits.

Letters: B images of a batch, D dimensions of z.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.bad_samples import cause_of
from data_pipelines.decoding import DecodeError
from data_pipelines.feature_layout import INT8_LIMIT, CopiedKind, FeatureColumn, FeatureLayout
from data_pipelines.feature_part import PartOrigin, encode_part
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample
from data_pipelines.sample_reader import Sample, iter_shard
from data_pipelines.shard_index import Shard, ShardIndex
from pretrain.partition import Partition
from pretrain.trained import TrainedEncoder

CPU_BATCH = 32
"""With channels last, which is how decoded images lie, 32 to 64 are the fastest on a core."""
GPU_BATCH = 256
CALIBRATION_IMAGES = 1_024
CALIBRATION_SHARDS = 16
JSON_SAMPLES = 256
"""In which a field that is to be copied must occur."""
INT8_HEADROOM = 1.25
"""Of normal values the largest of 1,024 is 3.2 standard deviations; eight bits are used best where
four fit in. What lies beyond saturates."""
Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


class CopyError(ValueError):
    """A sample's json does not have what is to be copied from it."""


class EncoderOnDevice:
    """Images (B, H, W, 3) uint8 to z (B, D) float32, for several threads.

    On a GPU it computes compiled and in bfloat16, one batch at a time, always full ones: one shape,
    one graph. On a CPU whole shards take turns: threads that alternate batch by batch would all
    read, then all compute, then all write.
    """

    def __init__(self, trained: TrainedEncoder, *, use_gpu: bool) -> None:
        self.image_size_px = trained.image_size_px
        self.batch_size = GPU_BATCH if use_gpu else CPU_BATCH
        self._use_gpu = use_gpu
        self._encoder: Any = trained.encoder
        if use_gpu:
            self._encoder = torch.compile(trained.encoder.to("cuda", torch.bfloat16))
        self.shard_turn = nullcontext() if use_gpu else threading.Lock()
        self._batch_turn = threading.Lock() if use_gpu else nullcontext()

    def warm_up(self) -> None:
        """Compute a batch of nothing: the first call of a process is a slow one."""
        self(np.zeros((self.batch_size, self.image_size_px, self.image_size_px, 3), np.uint8))

    @torch.inference_mode()
    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
        with self._batch_turn:
            if not self._use_gpu:
                return self._encoder(images.float() / 127.5 - 1).float().numpy()
            full = images.new_zeros((self.batch_size, *images.shape[1:]))
            full[: len(images)] = images
            z = self._encoder(full.cuda().float() / 127.5 - 1)
            return z[: len(images)].float().cpu().numpy()


def columns_of(partition: Partition) -> tuple[FeatureColumn, ...]:
    """One column per subset of an encoder's partition, fine to coarse.

    Some published cuts have subsets without a dimension. A column cannot be empty, so their
    time-steps go to the column before, whose dimensions the decoder sees there too (the first
    ones to the column after), and the columns are numbered without them.
    """
    columns: list[FeatureColumn] = []
    for subset in partition.subsets:
        steps, dims = subset.timesteps, subset.dims
        if dims[0] < dims[1]:
            start = steps[0] if columns else 0
            columns.append(FeatureColumn(f"z{len(columns):03d}", (start, steps[1]), dims))
        elif columns:
            last = columns[-1]
            columns[-1] = FeatureColumn(last.name, (last.timesteps[0], steps[1]), last.dims)
    return tuple(columns)


def encode_shard(
    store: ObjectStore,
    encoder: EncoderOnDevice,
    shard: Shard,
    layout: FeatureLayout,
    origin: PartOrigin,
) -> bytes:
    """The Parquet part of one shard, without the samples that cannot be used.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
        ValueError: a feature is no finite number.
    """
    extensions = [*IMAGE_EXTENSIONS, *(["json"] if layout.copied else [])]
    usable = _Usable(layout.copied)
    batches = _batches(iter_shard(store, shard, extensions), encoder.batch_size)
    first = next(batches)  # is there before the turn comes
    decoded = (usable.decode(batch, encoder.image_size_px) for batch in chain([first], batches))
    with encoder.shard_turn:
        z = [encoder(np.stack(images)) for images in decoded if images]
    stored = [block[:, slice(*layout.dims)] for block in z]
    return encode_part(
        layout,
        origin,
        keys=usable.keys,
        rows=usable.rows,
        features=np.concatenate([np.empty((0, layout.num_dims), np.float32), *stored]),
        copied=usable.copied,
        skipped=usable.skipped,
    )


class _Usable:
    """Samples of a shard that can be used, in order, and why the others cannot."""

    def __init__(self, kinds: Mapping[str, CopiedKind]) -> None:
        self.keys: list[str] = []
        self.rows: list[int] = []
        self.copied: dict[str, list[Any]] = {name: [] for name in kinds}
        self.skipped: dict[int, str] = {}
        self._kinds = kinds

    def decode(self, batch: Iterable[Sample], size_px: int) -> list[NDArray[np.uint8]]:
        """The images of those of a batch that can be used."""
        images = []
        for sample in batch:
            try:
                image = decode_sample(sample, size_px)
                fields = copied_fields(sample, self._kinds)
            except (DecodeError, CopyError) as error:
                self.skipped[sample["__row__"]] = _reason(error)
                continue
            images.append(image)
            self.keys.append(sample["__key__"])
            self.rows.append(sample["__row__"])
            for name, value in fields.items():
                self.copied[name].append(value)
        return images


def copied_fields(sample: Sample, kinds: Mapping[str, CopiedKind]) -> dict[str, Any]:
    """These fields of the sample's json; None for one that is absent or null.

    Raises:
        CopyError: the json cannot be read, or a field is of another kind.
    """
    if not kinds:
        return {}
    try:
        fields = json.loads(sample.get("json", b"{}"))
        return {name: _of_kind(fields.get(name), name, kind) for name, kind in kinds.items()}
    except CopyError:
        raise
    except (ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise CopyError(f"unusable json: {error}") from error


def refuse_absent_fields(store: ObjectStore, shard: Shard, kinds: Mapping[str, CopiedKind]) -> None:
    """A misspelt name or a wrong kind, before a whole set has been encoded with it.

    Raises:
        ValueError: the first samples of the shard have json, but in none of them the field, or in
            none of that kind.
    """
    found: set[str] = set()
    errors: list[str] = []
    usable = 0
    for sample in islice(iter_shard(store, shard, ["json"]), JSON_SAMPLES):
        try:
            copied_fields(sample, kinds)
            found |= json.loads(sample.get("json", b"{}")).keys()
            usable += 1
        except CopyError as error:
            errors.append(str(error))
    if errors and not usable:
        raise ValueError(
            f"no json of the first {len(errors)} samples of {shard.url} can be copied "
            f"from, for one: {errors[0]}; give other names or kinds to --copy"
        )
    if absent := sorted(kinds.keys() - found):
        raise ValueError(
            f"no json of the first {usable} samples of {shard.url} has a field "
            f"{', '.join(absent)}; there are: {', '.join(sorted(found)) or 'none'}. Give one of "
            f"these to --copy"
        )


def _of_kind(value: Any, name: str, kind: CopiedKind) -> Any:
    kinds: dict[CopiedKind, type | tuple[type, ...]] = {
        "string": str,
        "int": int,
        "float": (int, float),
        "bool": bool,
    }
    is_bool = isinstance(value, bool)
    if value is None or (isinstance(value, kinds[kind]) and is_bool == (kind == "bool")):
        if kind == "int" and value is not None and not -(2**63) <= value < 2**63:
            raise CopyError(f"unusable json: {name} does not fit into 64 bits")
        if kind == "string" and value is not None:
            value.encode()  # half a surrogate pair is no text
        return float(value) if kind == "float" and value is not None else value
    raise CopyError(f"unusable json: {name} is a {type(value).__name__}, not a {kind}")


def measured_scales(
    store: ObjectStore,
    encoder: EncoderOnDevice,
    index: ShardIndex,
    columns: Sequence[FeatureColumn],
) -> tuple[float, ...]:
    """int8 scales per stored dimension, from the first images of shards all over the set.

    Raises:
        ValueError: no image among them can be used.
    """
    number = min(CALIBRATION_SHARDS, len(index.shards))
    shards = [index.shards[i * len(index.shards) // number] for i in range(number)]
    each = -(-CALIBRATION_IMAGES // number)
    images = [
        image for shard in shards for image in islice(_usable_images(store, encoder, shard), each)
    ]
    if not images:
        raise ValueError(
            f"int8 needs scales, and the first samples of {number} shards of {index.url} hold no "
            f"image that can be used; see `diti data verify --deep`"
        )
    z = np.concatenate([encoder(np.stack(batch)) for batch in _batches(images, encoder.batch_size)])
    largest = np.abs(z[:, columns[0].dims[0] : columns[-1].dims[1]]).max(axis=0)
    # A dimension that is 0 everywhere: any scale will do.
    largest = np.where(largest > 0, largest, 1.0).astype(np.float64)
    return tuple((largest * INT8_HEADROOM / INT8_LIMIT).tolist())


def _usable_images(
    store: ObjectStore, encoder: EncoderOnDevice, shard: Shard
) -> Iterator[NDArray[np.uint8]]:
    for sample in islice(iter_shard(store, shard, IMAGE_EXTENSIONS), CALIBRATION_IMAGES):
        try:
            yield decode_sample(sample, encoder.image_size_px)
        except DecodeError:
            continue


def _reason(error: DecodeError | CopyError) -> str:
    """Without names of places, so that copies of a set give the same parts."""
    if isinstance(error, CopyError):
        return str(error)
    return f"{cause_of(error)}: {error.__cause__ or 'no image'}"


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
