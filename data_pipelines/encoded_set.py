"""What a frozen model makes of a shard set beforehand, in a shard set beside it.

    SHARDS/00000.tar     KEY.jpg ...
    ENCODED/00000.tar    KEY.safetensors: latent, mirrored, and prompt, pooled of the caption
    ENCODED/encoded.json what it was made from, and how

Both have the same samples in the same order, so a sample is found in both by one shard and row. Of
an image or caption that cannot be used there is KEY.missing with the reason instead.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from configs.loading import sealed, unsealed
from data_pipelines.decoding import NotEncodedError
from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from data_pipelines.sample_reader import Sample
from data_pipelines.shard_index import ShardIndex, read_index

MANIFEST = "encoded.json"
MEMBER = "safetensors"
MISSING = "missing"
Shapes = Mapping[str, tuple[int, ...]]
"""Of a sample's tensors, by name."""


_NEEDED_FOR = {
    "latent": "its backbone works on latents",
    "mirrored": "data.horizontal_flip",
    "prompt": "task.backbone.condition caption",
    "pooled": "task.backbone.condition caption",
}


class EncodedMismatchError(ValueError):
    """What was made beforehand is not what a run would make itself."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What decides the numbers."""

    images: str
    """Digest of the index of the shards."""
    backbone: str
    """SHA-256 over the files of the model."""
    image_size_px: int
    scaling_factor: float
    shift_factor: float
    shapes: dict[str, list[int]]
    """Of a sample's tensors, float16: `latent`; `mirrored`, of the image turned left to right;
    `prompt` and `pooled`, of its caption."""


def write_encoding(store: ObjectStore, url: str, encoding: Encoding) -> None:
    """Write the manifest of the set at `url`."""
    told = sealed(asdict(encoding))
    store.write(join(url, MANIFEST), json.dumps(told, indent=2).encode())


def read_encoding(store: ObjectStore, url: str) -> Encoding:
    """What the set at `url` was made from.

    Raises:
        ObjectMissingError: there is none.
        EncodedMismatchError: its manifest is damaged.
    """
    where = join(url, MANIFEST)
    if not store.exists(where):
        raise ObjectMissingError(
            f"{url} holds nothing that was encoded; fill it first: `diti data encode RUN.yaml "
            f"data.encoded={url}`"
        )
    try:
        return Encoding(**unsealed(json.loads(store.read(where))))
    except (ValueError, TypeError) as error:
        raise EncodedMismatchError(
            f"{where} cannot be read ({error}); make the set again with `diti data encode`"
        ) from error


def check_encoding(found: Encoding, wanted: Encoding, url: str) -> Shapes:
    """Compare a set with what a run would make itself; the shapes of what the run takes of it.

    Args:
        wanted: `shapes` has a name for all that the run takes, and [] where any shape will do.

    Raises:
        EncodedMismatchError: naming every difference.
    """
    different = [
        f"{field.name} is {value}, and the run's is {asked}"
        for field in fields(Encoding)
        if field.name != "shapes"
        and (value := getattr(found, field.name)) != (asked := getattr(wanted, field.name))
    ]
    for name, shape in wanted.shapes.items():
        if name not in found.shapes:
            different.append(f"it holds no {name!r}, which the run needs ({_NEEDED_FOR[name]})")
        elif shape and shape != found.shapes[name]:
            different.append(f"{name} has shape {found.shapes[name]}, and the run's has {shape}")
    if different:
        raise EncodedMismatchError(
            f"{url} was encoded otherwise: {'; '.join(different)}. Make it again with `diti data "
            f"encode`, into another folder"
        )
    return {name: tuple(found.shapes[name]) for name in wanted.shapes}


def beside(store: ObjectStore, index: ShardIndex, url: str | None) -> ShardIndex:
    """The shards of `index` with what is encoded of them at `url`, if it is given.

    Raises:
        ObjectMissingError: there is no such set.
        ShardMismatchError: it is of other shards.
    """
    return index if url is None else index.beside(read_index(store, url))


def pack(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A sample's member, in float16. Raises ValueError for what is no finite number there."""
    # Of an array that lies in another order, safetensors takes the bytes as they lie.
    packed = {name: np.ascontiguousarray(a, np.float16) for name, a in tensors.items()}
    if wrong := [name for name, array in packed.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{', '.join(wrong)} is no finite number in float16: is the model whole?")
    return save(packed)


def unpack(sample: Sample, shapes: Shapes) -> dict[str, NDArray[np.float16]]:
    """These tensors of a raw sample.

    Raises:
        NotEncodedError: it has none, or others.
    """
    where = f"sample {sample['__key__']} of {sample['__url__']}"
    if MEMBER not in sample:
        why = sample.get(MISSING, b"nothing is encoded of it").decode(errors="replace")
        raise NotEncodedError(f"{where} has no latent: {why}")
    try:
        found = load(sample[MEMBER])
        return {name: _checked(found[name], shape) for name, shape in shapes.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise NotEncodedError(f"{where} has no usable latent: {error}") from error


def _checked(tensor: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float16]:
    if tensor.shape != shape or tensor.dtype != np.float16:
        raise ValueError(f"{tensor.dtype} {tensor.shape} instead of float16 {shape}")
    return tensor
