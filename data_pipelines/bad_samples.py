"""Samples that cannot be used: what is said of them, and what takes their place.

A substitute is a pure function of the position: candidates are other samples of the same epoch, in
an order that only seed and position decide, and the first that can be used is taken. So every rank,
and every resumed run, puts the same sample there. A store that does not answer makes no sample bad.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from data_pipelines.decoding import DecodeError, NotEncodedError
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectMissingError,
    ObjectTooShortError,
)
from data_pipelines.sample_labels import LabelError
from data_pipelines.sample_mix import Order
from data_pipelines.sample_order import mix64
from data_pipelines.tar_members import ShardMismatchError

BAD_SAMPLE_ERRORS = (
    DecodeError,
    LabelError,
    ShardMismatchError,
    ObjectMissingError,
    ObjectTooShortError,
)
"""Errors that stay when the sample is read again."""
MAX_CANDIDATES = 100
DEAD_LETTERS = "dead-letters"
"""Folder of a run that holds them, an object per rank and checkpoint."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A sample that could not be used: where, and why."""

    position: int
    shard: str
    """URL of the tar."""
    row: int
    key: str
    """ "" where the member table cannot be read either; then `start` and `end` are 0."""
    start: int
    end: int
    """Bytes [start, end) of the tar hold the members that were wanted."""
    cause: str
    reason: str


class TooManyBadSamplesError(RuntimeError):
    """More samples had to be replaced than `data.error_budget` allows.

    Args:
        letters: of samples that are in no batch, because there is none for them.
    """

    def __init__(self, message: str, letters: Sequence[DeadLetter] = ()) -> None:
        super().__init__(message)
        self.letters = tuple(letters)


def cause_of(error: Exception) -> str:
    """The kind of trouble, to count by.

    Raises:
        Exception: the error itself, if it does not make a sample bad.
    """
    match error:
        case BucketMissingError():
            raise error
        case NotEncodedError():
            return "no latent"
        case DecodeError():
            return "undecodable image"
        case LabelError():
            return "unlabelled"
        case ShardMismatchError():
            return "other bytes than indexed"
        case ObjectMissingError():
            return "shard missing"
        case ObjectTooShortError():
            return "shard cut short"
        case _:
            raise error


def candidates(order: Order, position: int) -> Iterator[tuple[int, int]]:
    """(shard, row) of the samples to try at `position`: its own first, then substitutes."""
    size = order.samples_per_epoch
    yield _located(order, position)
    for attempt in range(MAX_CANDIDATES):
        other = int(mix64(order.seed, position, attempt)) % size
        yield _located(order, position - position % size + other)


def _located(order: Order, position: int) -> tuple[int, int]:
    shards, rows = order.locate(position)
    return int(shards[0]), int(rows[0])


def to_json_lines(letters: Iterable[DeadLetter]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(letter)) + "\n" for letter in letters)


def from_json_lines(text: str) -> list[DeadLetter]:
    """What `to_json_lines` was given.

    Raises:
        ValueError: a line is no dead letter.
    """
    letters = []
    for line in text.splitlines():
        try:
            letters.append(DeadLetter(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{line[:80]!r} is no dead letter ({error})") from error
    return letters


def ranked_causes(causes: Counter[str]) -> str:
    """`12 undecodable image, 3 shard missing`, most frequent first."""
    return ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
