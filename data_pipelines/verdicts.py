"""What became of every raw sample: a table for each raw tar, and their sum, which must add up."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.screening import Dropped, Kept
from data_pipelines.tar_members import parsing

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("outcome", pa.string()),
        ("why", pa.string()),
        ("sha256", pa.binary(32)),
        ("look", pa.uint64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of the samples of one raw tar, in its order."""

    table: pa.Table
    problem: str = ""
    """Why the tar could not be read; then nothing is known of its samples."""

    @classmethod
    def of(cls, found: Iterable[tuple[str, Kept | Dropped]]) -> "Verdicts":
        """From (key, verdict) of every sample."""
        return cls(pa.Table.from_pylist([_row(key, verdict) for key, verdict in found], _SCHEMA))

    @classmethod
    def unreadable(cls, problem: str) -> "Verdicts":
        return cls(_SCHEMA.empty_table(), problem)

    @property
    def sha256s(self) -> NDArray[np.void]:
        """Of the images that stay, half of the digest, which is unlike enough; (kept,)."""
        digests = self.table["sha256"].drop_null().to_pylist()
        return np.frombuffer(b"".join(digest[:16] for digest in digests), "V16")

    @property
    def looks(self) -> NDArray[np.uint64]:
        """Perceptual hashes of the images that stay; (kept,)."""
        return self.table["look"].drop_null().to_numpy()

    def to_parquet(self) -> bytes:
        sink = io.BytesIO()
        noted = self.table.replace_schema_metadata({"problem": self.problem})
        pq.write_table(noted, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Verdicts":
        """What `to_parquet` made. Raises ShardMismatchError for other bytes."""
        with parsing("a table of verdicts"):
            table = pq.ParquetFile(io.BytesIO(data)).read()
            problem = (table.schema.metadata or {}).get(b"problem", b"").decode()
            return cls(table.replace_schema_metadata(None).cast(_SCHEMA), problem)


def _row(key: str, verdict: Kept | Dropped) -> dict[str, Any]:
    if isinstance(verdict, Dropped):
        return {"key": key, "outcome": verdict.outcome, "why": verdict.why}
    return {
        "key": key,
        "outcome": "kept",
        "why": "",
        "sha256": verdict.sha256,
        "look": verdict.look,
    }


@dataclass(slots=True)
class Audit:
    """What became of all of them; `check` proves that none is forgotten."""

    samples: int = 0
    """In the tars that could be read."""
    kept: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    """By rule."""
    failed: Counter[str] = field(default_factory=Counter)
    """By kind of fault."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """`exact` and `near`."""
    tars: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Raw tars that could not be read, and why; nobody knows how many samples they hold."""

    def add(self, name: str, verdicts: Verdicts) -> None:
        """Count one raw tar; what stays of it counts as kept until a duplicate is found."""
        self.tars += 1
        if verdicts.problem:
            self.unreadable[name] = verdicts.problem
        outcomes = verdicts.table["outcome"].to_pylist()
        reasons = verdicts.table["why"].to_pylist()
        self.samples += len(outcomes)
        for outcome, why in zip(outcomes, reasons, strict=True):
            match outcome:
                case "filtered":
                    self.filtered[why] += 1
                case "failed":
                    self.failed[why] += 1
                case _:
                    self.kept += 1

    def take_out(self, kind: str, count: int) -> None:
        """So many of those kept are duplicates."""
        self.kept -= count
        self.duplicates[kind] += count

    def check(self, written: int) -> None:
        """Raises AssertionError unless all samples are accounted for and so many were written."""
        gone = sum(c.total() for c in (self.filtered, self.failed, self.duplicates))
        assert self.samples == self.kept + gone, f"{self} does not add up"
        assert self.kept == written, f"{written} samples were written, {self.kept} were to stay"

    def to_json(self) -> dict[str, Any]:
        counters = ("filtered", "failed", "duplicates")
        return {
            "samples": self.samples,
            "kept": self.kept,
            **{name: dict(getattr(self, name).most_common()) for name in counters},
            "tars": self.tars,
            "unreadable": self.unreadable,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Audit":
        """What `to_json` made."""
        counters = {name: Counter(data[name]) for name in ("filtered", "failed", "duplicates")}
        return cls(**{**data, **counters})
