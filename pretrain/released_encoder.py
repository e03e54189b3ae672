# SPDX-License-Identifier: Apache-2.0
"""A published DiTi encoder, loaded and run with PyTorch alone.

    from diti_encoder import load_encoder, preprocess

    encoder = load_encoder("DIR")
    z = encoder(preprocess(pixels))  # uint8 (B, H, W, 3), RGB -> float32 (B, D)
    encoder.subsets(z)["z003"]       # one subset of z by its name
    encoder.select(z, 0, 300)        # every subset that time-steps 0 to 299 touch

`diti publish` writes DIR: `encoder.safetensors`, `encoder.json`, and this file as
`diti_encoder.py`. It imports nothing but PyTorch (2.0 or later) and the standard library (Python
3.9 or later), so it can be copied and used without the project that it comes from. The two other
files are data: nothing in them is executed, and nothing is used before it was checked.

Letters: B batch, C channels, H height, W width, L = H*W, K channels per head, D dimensions of z.
"""

from __future__ import annotations

import hashlib
import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RELEASE_NAME = "encoder.json"
WEIGHTS_NAME = "encoder.safetensors"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 2**20
"""Of encoder.json, and of the header of the weights: larger ones are not read."""
MAX_DIMENSIONS = 8
_DTYPES = {"F32": torch.float32, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ITEM_BYTES = {"F32": 4, "I64": 8}


class ReleaseError(ValueError):
    """The folder holds no release of an encoder, or one that is damaged or was changed."""


class Subset(NamedTuple):
    """A part of z: its time-steps and its dimensions, both half-open."""

    name: str
    timesteps: tuple[int, int]
    dims: tuple[int, int]


# --- what is used ---------------------------------------------------------------------------------


def load_encoder(folder: str | os.PathLike[str]) -> DitiEncoder:
    """The encoder of a published folder: on the CPU, float32, in eval mode, without gradients.

    Raises:
        ReleaseError: a file is missing, is not the one that was published, or cannot be used.
    """
    release_path, weights_path = Path(folder, RELEASE_NAME), Path(folder, WEIGHTS_NAME)
    text = _read(release_path, MAX_JSON_BYTES + 1)
    try:
        release = _parse_json(text)
        encoder = _build(release)
    except KeyError as error:
        raise ReleaseError(f"{release_path} cannot be used: it lacks {error}") from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ReleaseError(f"{release_path} cannot be used: {error}") from error
    weights = _read(weights_path)
    if (digest := hashlib.sha256(weights).hexdigest()) != release.get("weights_sha256"):
        raise ReleaseError(
            f"{weights_path} has SHA-256 {digest}, {RELEASE_NAME} beside it names "
            f"{release.get('weights_sha256')!r:.70}: they do not belong together; "
            f"copy the whole folder again"
        )
    try:
        state = _tensors(weights, encoder.network.state_dict())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"{weights_path} cannot be used: {error}") from error
    encoder.network.to_empty(device="cpu").load_state_dict(state)
    return encoder.requires_grad_(False).eval()


def preprocess(pixels_BHWC: Any) -> Tensor:
    """RGB pixels as the encoder takes them: uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1].

    Decoding, cutting out the square and resizing come before: see `preprocessing` in encoder.json.

    Args:
        pixels_BHWC: a tensor, or anything that `torch.tensor` takes, such as a NumPy array.

    Raises:
        ValueError: another dtype or shape.
    """
    pixels = pixels_BHWC if isinstance(pixels_BHWC, Tensor) else torch.tensor(pixels_BHWC)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(
            f"pixels must be uint8 of shape (images, height, width, 3), RGB; "
            f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class DitiEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], floating-point -> z (B, D) in the dtype of the weights.

    `partition` lists the subsets of z, fine to coarse; `release` is what encoder.json says.
    """

    def __init__(
        self,
        network: nn.Module,
        partition: tuple[Subset, ...],
        image_size_px: int,
        release: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        self.partition = partition
        self.image_size_px = image_size_px
        self.release = release

    @property
    def latent_dim(self) -> int:
        return self.partition[-1].dims[1]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = self.image_size_px
        if not images_BCHW.is_floating_point() or images_BCHW.shape[1:] != (3, size, size):
            raise ValueError(
                f"this encoder takes floating-point images of shape (images, 3, {size}, {size}) "
                f"in [-1, 1], got {images_BCHW.dtype} of shape {tuple(images_BCHW.shape)}; "
                f"preprocess() makes them of uint8 pixels"
            )
        # In the channels-last layout PyTorch's GroupNorm loses digits on a CPU.
        return self.network(images_BCHW.to(next(self.parameters()).dtype).contiguous())

    def subsets(self, z_BD: Tensor) -> dict[str, Tensor]:
        """Every subset by its name, fine to coarse: views of z, (B, dimensions of the subset).

        Raises:
            ValueError: z has another number of dimensions.
        """
        self._check(z_BD)
        return {subset.name: z_BD[..., slice(*subset.dims)] for subset in self.partition}

    def select(self, z_BD: Tensor, start: int, end: int) -> Tensor:
        """Every subset whose time-steps intersect [start, end), side by side: one view of z.

        Raises:
            ValueError: no such time-steps, or z has another number of dimensions.
        """
        self._check(z_BD)
        last = self.partition[-1].timesteps[1]
        if not 0 <= start < end <= last:
            raise ValueError(f"time-steps must be a range inside [0, {last}), got [{start}, {end})")
        chosen = [s for s in self.partition if s.timesteps[0] < end and start < s.timesteps[1]]
        return z_BD[..., chosen[0].dims[0] : chosen[-1].dims[1]]

    def _check(self, z_BD: Tensor) -> None:
        if z_BD.shape[-1] != self.latent_dim:
            raise ValueError(
                f"z must have {self.latent_dim} dimensions, got shape {tuple(z_BD.shape)}"
            )


# --- the networks ---------------------------------------------------------------------------------


class _GroupNorm(nn.GroupNorm):
    """GroupNorm(32), computed in float32 whatever the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        normalised = F.group_norm(input.float(), self.num_groups, weight, bias, self.eps)
        return normalised.to(input.dtype)


class _Attention(nn.Module):
    """Residual self-attention over all positions."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {channels} channels")
        self.num_heads = num_heads
        self.norm = _GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        qkv_BCL = self.qkv(self.norm(x_BCHW).flatten(2))
        # Heads first, then q, k and v inside each.
        qkv = qkv_BCL.reshape(B, self.num_heads, 3, C // self.num_heads, H * W).transpose(3, 4)
        out_BHLK = F.scaled_dot_product_attention(*qkv.unbind(2))
        out_BCL = out_BHLK.transpose(2, 3).reshape(B, C, H * W)
        return x_BCHW + self.proj_out(out_BCL).reshape(B, C, H, W)


class _ConvEncoder(nn.Module):
    """Stride-2 convolutions with one self-attention on the way, and a linear layer."""

    def __init__(
        self,
        channels: list[int],
        attention_after: int | None,
        num_heads: int | None,
        side: int,
        latent_dim: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for number, width in enumerate(channels, start=1):
            layers.append(nn.Conv2d(previous, width, 3, stride=2, padding=1))
            if number == attention_after:
                layers.append(_Attention(width, _whole(num_heads, "num_heads", 2**16)))
            layers += [_GroupNorm(width), nn.SiLU()]
            previous = width
        layers += [nn.Flatten(), nn.Linear(previous * side * side, latent_dim)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder(x_BCHW)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skip = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.skip(x_BCHW) + self.bn2(self.conv2(h)))


class _ResNet10(nn.Module):
    """Four basic blocks; z is the mean over the last one's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(
            _BasicBlock(64, 64, 1),
            _BasicBlock(64, 128, 2),
            _BasicBlock(128, 256, 2),
            _BasicBlock(256, 512, 2),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x_BCHW)))
        return self.blocks(h).mean(dim=(2, 3))


# --- encoder.json ---------------------------------------------------------------------------------


def _build(release: dict[str, Any]) -> DitiEncoder:
    """The encoder that encoder.json describes, still without memory for its weights."""
    if release["format"] != "diti-encoder" or release["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"it is of format {release['format']!r:.40} {release['format_version']!r:.40}, this "
            f"code reads 'diti-encoder' {FORMAT_VERSION}; use the {Path(__file__).name} beside it"
        )
    size = _whole(release["image_size_px"], "image_size_px", 2**14)
    latent_dim = _whole(release["latent_dim"], "latent_dim", 2**20)
    with torch.device("meta"):
        network = _network(release["architecture"], size, latent_dim)
    return DitiEncoder(network, _partition(release["subsets"], latent_dim), size, release)


def _network(architecture: dict[str, Any], image_size_px: int, latent_dim: int) -> nn.Module:
    if architecture["kind"] == "resnet10":
        if latent_dim != 512:
            raise ValueError(f"a resnet10 has 512 dimensions, not {latent_dim}")
        return _ResNet10()
    if architecture["kind"] != "conv":
        raise ValueError(f"architecture {architecture['kind']!r:.40} is neither conv nor resnet10")
    channels = [_whole(width, "channels", 2**16) for width in architecture["channels"]]
    halvings = 2 ** len(channels)
    if not channels or image_size_px % halvings:
        raise ValueError(f"{len(channels)} halvings do not divide {image_size_px} px")
    after = architecture["attention_after"]
    if after is not None and _whole(after, "attention_after", 2**14) > len(channels):
        raise ValueError(f"attention_after {after} comes after the last of {len(channels)} layers")
    heads, side = architecture["num_heads"], image_size_px // halvings
    return _ConvEncoder(channels, after, heads, side, latent_dim)


def _partition(subsets: list[dict[str, Any]], latent_dim: int) -> tuple[Subset, ...]:
    """The subsets, which must follow on one another in time-steps and in dimensions."""
    partition: list[Subset] = []
    step = dim = 0
    for value in subsets:
        name = value["name"]
        (first_step, step_end), (first_dim, dim_end) = value["timesteps"], value["dims"]
        if (first_step, first_dim) != (step, dim) or not isinstance(name, str):
            raise ValueError(f"subset {name!r:.40} does not begin where the one before it ends")
        ends = (_whole(step_end, "a time-step", 2**20), _whole(dim_end, "a dimension", 2**20))
        if ends[0] <= step or ends[1] <= dim:
            raise ValueError(f"subset {name!r:.40} is empty")
        partition.append(Subset(name, (step, ends[0]), (dim, ends[1])))
        step, dim = ends
    if dim != latent_dim or len({subset.name for subset in partition}) != len(partition):
        raise ValueError(f"its subsets hold {dim} of {latent_dim} dimensions, or share a name")
    return tuple(partition)


def _whole(value: object, what: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{what} must be a whole number from 1 to {most}, got {value!r:.40}")
    return value


# --- files ----------------------------------------------------------------------------------------


def _read(path: Path, num_bytes: int = -1) -> bytes:
    """The first bytes of a file, or all of them."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReleaseError(
            f"{path} does not exist, so its folder holds no whole release of an encoder; "
            f"copy the whole folder"
        ) from error


def _parse_json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"its JSON is longer than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, not {type(value).__name__}")
    return value


def _tensors(data: bytes, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be exactly those that are `wanted`.

    The format: eight bytes with the length of a JSON header, little-endian; the header, which gives
    dtype, shape and place of each tensor; the tensors' bytes, one after the other.

    Raises:
        ValueError: the file is damaged, or holds other tensors.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_JSON_BYTES, len(data) - 8):
        raise ValueError(f"{len(data)} bytes cannot hold a header of {length} bytes")
    header = _parse_json(data[8 : 8 + length])
    header.pop("__metadata__", None)
    _check_places(header, len(data) - 8 - length)
    for name in sorted(header.keys() | wanted.keys()):
        found, needed = "missing", "no such tensor"
        if name in header:
            found = f"{header[name]['dtype']} {header[name]['shape']}"
        if name in wanted:
            needed = f"{_NAMES[wanted[name].dtype]} {list(wanted[name].shape)}"
        if found != needed:
            raise ValueError(f"{name[:80]!r} is {found:.80}, the encoder has {needed}")
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values = torch.frombuffer(bytearray(data[start:end]), dtype=_DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def _check_places(header: dict[str, Any], num_bytes: int) -> None:
    """ValueError unless the tensors fill the bytes behind the header, one after the other."""
    place = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _ITEM_BYTES:
            raise ValueError(
                f"{name[:80]!r} is of dtype {entry['dtype']!r:.40}, only {[*_DTYPES]} are read"
            )
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {len(shape)} dimensions")
        size = _ITEM_BYTES[entry["dtype"]] * prod(_whole(n, "a shape", 2**40) for n in shape)
        if (type(start), start, end) != (int, place, place + size) or end > num_bytes:
            raise ValueError(
                f"{name[:80]!r} of {size} bytes lies at [{start!r:.40}, {end!r:.40}) of "
                f"{num_bytes}, where [{place}, {place + size}) is free"
            )
        place = end
    if place != num_bytes:
        raise ValueError(f"{num_bytes - place} bytes at its end belong to no tensor")
