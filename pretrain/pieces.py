"""The state of training in pieces: what each rank owns, saves, and can load at any other split.

ZeRO cuts every trained parameter, flattened, into contiguous ranges, one owner each. A checkpoint
holds such ranges under their place (`NAME@START`), so it does not matter how many ranks wrote it or
under which ZeRO stage: whoever loads it asks for the ranges that it owns now.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

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


def pack(places: Sequence[str], tensors: Sequence[Tensor]) -> bytes:
    """A safetensors file of flat ranges by their places."""
    return save_safetensors(dict(zip(places, tensors, strict=True)))


class Ranges:
    """Flat ranges of named tensors out of any number of packed files.

    Raises:
        PiecesError: a place cannot be read, or ranges overlap.
    """

    def __init__(self) -> None:
        self._of_name: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, packed: bytes) -> None:
        for place, tensor in load_safetensors(packed).items():
            name, mark, start = place.rpartition("@")
            if not mark or not start.isdecimal() or tensor.dim() != 1:
                raise PiecesError(
                    f"{place!r} of shape {tuple(tensor.shape)} is no place of a piece"
                )
            self._of_name.setdefault(name, []).append((int(start), tensor))

    @property
    def names(self) -> set[str]:
        return set(self._of_name)

    def fill(self, out: Tensor, name: str, start: int) -> bool:
        """Copy what there is of numbers [start, start + len(out)) of a tensor; whether it is all.

        Raises:
            PiecesError: two ranges claim the same number.
        """
        end, filled = start + out.numel(), 0
        for first, tensor in self._of_name.get(name, ()):
            low, high = max(start, first), min(end, first + tensor.numel())
            if low < high:
                out[low - start : high - start].copy_(tensor[low - first : high - first])
                filled += high - low
        if filled > out.numel():
            raise PiecesError(f"numbers [{start}, {end}) of {name} are there more than once")
        return filled == out.numel()


def assemble(files: Iterable[bytes], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Whole tensors of these shapes from the packed files of all ranks.

    Raises:
        PiecesError: names are missing or extra, or a tensor is not whole.
    """
    ranges = Ranges()
    for packed in files:
        ranges.add(packed)
    if ranges.names != set(shapes):
        raise PiecesError(f"other names than expected: {sorted(ranges.names ^ set(shapes))[:5]}")
    return {name: _whole(ranges, name, shape) for name, shape in shapes.items()}


def _whole(ranges: Ranges, name: str, shape: Sequence[int]) -> Tensor:
    out = torch.empty(prod(shape))
    if not ranges.fill(out, name, 0):
        raise PiecesError(f"{name} of shape {tuple(shape)} is not whole")
    return out.reshape(tuple(shape))


def fill_pieces(
    pieces: Sequence[Piece], kind: str, targets: Sequence[Tensor], files: Iterator[bytes]
) -> None:
    """Fill each piece's tensor of a kind from packed files, reading no more files than it takes.

    Raises:
        PiecesError: after the last file a piece is not whole.
    """
    ranges, missing = Ranges(), list(zip(pieces, targets, strict=True))
    while missing:
        packed = next(files, None)
        if packed is None:
            raise PiecesError(f"{kind} of {missing[0][0].place} is not there in whole")
        ranges.add(packed)
        missing = [
            (piece, target)
            for piece, target in missing
            if not ranges.fill(target, piece.name, piece.start)
        ]
