"""The state of training in pieces: what each rank owns, saves, and can load at any other split.

ZeRO cuts every trained parameter, flattened, into contiguous ranges, one owner each. A checkpoint
holds such ranges under their place (`NAME@START`), so it does not matter how many ranks wrote it or
under which ZeRO stage: whoever loads it asks for the ranges that it owns now.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from data_pipelines.upload_process import MemoryFile

KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
"""Of a piece: float32 weights, their average, and Adam's two moments."""


class PiecesError(ValueError):
    """A checkpoint's pieces do not make up what is asked of them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Numbers [start, start + len) of one flattened parameter; float32, live, 1-D."""

    name: str
    start: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def place(self) -> str:
        return f"{self.name}@{self.start}"

    @property
    def end(self) -> int:
        return self.start + self.weights.numel()


def tensors_of(kind: str, pieces: Sequence[Piece], averages: Sequence[Tensor]) -> Sequence[Tensor]:
    """The live tensors of one of `KINDS`, in the order of the pieces."""
    return averages if kind == "ema" else [getattr(piece, kind) for piece in pieces]


def shared_out(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Numbers of pieces that all ranks have, dealt so that each rank gets about as much: the
    largest first, each to whoever has least so far."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    held = [0] * world_size
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        rank = held.index(min(held))
        shares[rank].append(number)
        held[rank] += sizes[number]
    return [sorted(share) for share in shares]


def pack(places: Sequence[str], tensors: Sequence[Tensor]) -> MemoryFile:
    """A safetensors file of flat float32 ranges by their places.

    Put together by torch's own copies. `safetensors.torch.save` copies all of it three times, and
    holds the interpreter's lock, for which the training thread waits.
    """
    header, end = {}, 0
    for place, tensor in zip(places, tensors, strict=True):
        size = 4 * tensor.numel()
        header[place] = {
            "dtype": "F32",
            "shape": [tensor.numel()],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    packed = MemoryFile(start + end)
    packed.bytes[:start] = len(text).to_bytes(8, "little") + text
    if end:
        flat = torch.frombuffer(packed.bytes, dtype=torch.float32, offset=start)
        for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
            part.copy_(tensor)
    return packed


@dataclass(slots=True)
class _Hole:
    """A tensor to fill with numbers [start, start + len) of a named one, and what is missing."""

    start: int
    out: Tensor
    missing: int


def assemble(files: Iterable[bytes], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Whole tensors of these shapes from the packed files of all ranks.

    Raises:
        PiecesError: names are missing or extra, or a tensor is not whole.
    """
    flat = {name: torch.empty(prod(shape)) for name, shape in shapes.items()}
    holes = {name: [_Hole(0, out, out.numel())] for name, out in flat.items()}
    names: set[str] = set()
    for packed in files:
        names |= _copy(packed, holes)
    if names != set(shapes):
        raise PiecesError(f"other names than expected: {sorted(names ^ set(shapes))[:5]}")
    _check_whole(holes)
    return {name: flat[name].reshape(tuple(shape)) for name, shape in shapes.items()}


def fill_pieces(pieces: Sequence[Piece], targets: Sequence[Tensor], files: Iterable[bytes]) -> None:
    """Fill each piece's target from packed files, reading no more of them than it takes.

    Raises:
        PiecesError: after the last file a piece is not whole.
    """
    holes: dict[str, list[_Hole]] = {}
    for piece, out in zip(pieces, targets, strict=True):
        holes.setdefault(piece.name, []).append(_Hole(piece.start, out, out.numel()))
    for packed in files:
        _copy(packed, holes)
        if not any(hole.missing for of_name in holes.values() for hole in of_name):
            return
    _check_whole(holes)


def _copy(packed: bytes, holes: Mapping[str, list[_Hole]]) -> set[str]:
    """Copy out of one file what there are holes for; the names in it.

    Raises:
        PiecesError: a place cannot be read, or a number is there more than once.
    """
    names = set()
    for place, tensor in load_safetensors(packed).items():
        name, mark, first = place.rpartition("@")
        if not mark or not first.isdecimal() or tensor.dim() != 1:
            raise PiecesError(f"{place!r} of shape {tuple(tensor.shape)} is no place of a piece")
        names.add(name)
        for hole in holes.get(name, ()):
            low = max(hole.start, int(first))
            high = min(hole.start + hole.out.numel(), int(first) + tensor.numel())
            if low < high:
                part = tensor[low - int(first) : high - int(first)]
                hole.out[low - hole.start : high - hole.start].copy_(part)
                hole.missing -= high - low
            if hole.missing < 0:
                raise PiecesError(f"numbers of {name} are there more than once")
    return names


def _check_whole(holes: Mapping[str, list[_Hole]]) -> None:
    for name, of_name in holes.items():
        for hole in of_name:
            if hole.missing:
                raise PiecesError(f"{name}@{hole.start} is not whole: {hole.missing} are missing")
