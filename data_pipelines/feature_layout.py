"""What all parts of a feature set have in common: columns, how values are stored, what is copied.

Letters: N samples, D dimensions stored.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.loading import digest_of_json

Dtype = Literal["float16", "int8", "float32"]
CopiedKind = Literal["string", "int", "float", "bool"]
VALUE_TYPES: dict[Dtype, pa.DataType] = {
    "float16": pa.float16(),
    "int8": pa.int8(),
    "float32": pa.float32(),
}
COPIED_TYPES: dict[CopiedKind, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
}
JOIN_COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)
INT8_LIMIT = 127
_COLUMN_NAME = re.compile(r"z(\d{3,})")


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """One subset of z: its time-steps and its dimensions, both half-open."""

    name: str
    timesteps: tuple[int, int]
    dims: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """What all parts of a feature set have in common.

    Raises:
        ValueError: the columns do not follow each other, or scales and dtype do not go together.
    """

    columns: tuple[FeatureColumn, ...]
    """Neighbours in the encoder's partition: all of it, or a range of its time-steps."""
    dtype: Dtype = "float16"
    scales: tuple[float, ...] | None = None
    """Of int8, per dimension stored: a value is the stored number times its scale."""
    copied: dict[str, CopiedKind] = field(default_factory=dict)
    """Columns copied from each sample's json."""

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if self.dtype not in VALUE_TYPES:
            raise ValueError(
                f"features are stored as {', '.join(VALUE_TYPES)}, not as {self.dtype!r}"
            )
        if (self.dtype == "int8") != (self.scales is not None):
            raise ValueError(f"int8 features, and no others, have scales; these are {self.dtype}")
        if self.scales is not None:
            if len(self.scales) != self.num_dims:
                raise ValueError(f"{self.num_dims} dimensions need as many scales")
            if not all(0 < np.float32(scale) < np.inf for scale in self.scales):
                raise ValueError("scales must be positive and finite, also in float32")
        for name, kind in self.copied.items():
            if kind not in COPIED_TYPES:
                raise ValueError(
                    f"column {name} cannot be copied as {kind!r}, only as {', '.join(COPIED_TYPES)}"
                )
            plain = name.lower()  # to SQL, names that differ in case only are one
            if plain in JOIN_COLUMNS.names or _COLUMN_NAME.fullmatch(plain) or "." in name:
                raise ValueError(
                    f"a copied column cannot be called {name}: features have such a one, or it "
                    f"has a dot; only fields at the top of the json can be copied"
                )

    @property
    def dims(self) -> tuple[int, int]:
        """The dimensions of z that are stored, half-open."""
        return self.columns[0].dims[0], self.columns[-1].dims[1]

    @property
    def num_dims(self) -> int:
        first, last = self.dims
        return last - first

    @property
    def schema(self) -> pa.Schema:
        copied = [pa.field(name, COPIED_TYPES[kind]) for name, kind in self.copied.items()]
        values = [pa.field(c.name, self._value_type(c), nullable=False) for c in self.columns]
        return pa.schema([*JOIN_COLUMNS, *copied, *values])

    @property
    def digest(self) -> str:
        return digest_of_json(asdict(self))

    def _value_type(self, column: FeatureColumn) -> pa.DataType:
        element = pa.field("element", VALUE_TYPES[self.dtype], nullable=False)
        return pa.list_(element, column.dims[1] - column.dims[0])

    def stored(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Features (N, D) as they are stored: rounded; int8 saturates."""
        if self.scales is not None:
            steps = np.rint(features / np.array(self.scales, np.float32))
            return np.clip(steps, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
        with np.errstate(over="ignore"):  # overflow becomes inf, and is refused
            return features.astype(self.dtype)

    def values(self, table: pa.Table, column: FeatureColumn) -> NDArray[np.float32]:
        """One column of a table of these features; float32 (N, width)."""
        values = _matrix(table[column.name]).astype(np.float32)
        if self.scales is not None:
            first = self.dims[0]
            values *= np.array(self.scales, np.float32)[
                column.dims[0] - first : column.dims[1] - first
            ]
        return values


LAYOUT_FIELDS = tuple(FeatureLayout.__dataclass_fields__)


def layout_from_json(value: dict[str, Any]) -> FeatureLayout:
    """The layout whose fields, as plain values, are among these. Raises KeyError, ValueError."""
    scales = value["scales"]
    return FeatureLayout(
        columns=tuple(
            FeatureColumn(column["name"], _range(column["timesteps"]), _range(column["dims"]))
            for column in value["columns"]
        ),
        dtype=value["dtype"],
        scales=None if scales is None else tuple(float(scale) for scale in scales),
        copied=dict(value["copied"]),
    )


def _range(value: Sequence[int]) -> tuple[int, int]:
    start, end = value
    if type(start) is not int or type(end) is not int:
        raise ValueError(f"a range must have whole numbers, not {start!r} and {end!r}")
    return start, end


def select_columns(
    columns: tuple[FeatureColumn, ...], timesteps: tuple[int, int] | None
) -> tuple[FeatureColumn, ...]:
    """Every column whose time-steps intersect the half-open range; all of them for None.

    Raises:
        ValueError: the range is empty or reaches outside the columns' time-steps.
    """
    if timesteps is None:
        return columns
    start, end = timesteps
    first, last = columns[0].timesteps[0], columns[-1].timesteps[1]
    if not first <= start < end <= last:
        raise ValueError(
            f"time-steps [{start}, {end}) cannot be selected: these features cover "
            f"[{first}, {last}), so choose {first} <= start < end <= {last}"
        )
    return tuple(c for c in columns if c.timesteps[0] < end and start < c.timesteps[1])


def check_columns(columns: tuple[FeatureColumn, ...]) -> None:
    """Raises ValueError unless each column begins where the one before it ends."""
    if not columns:
        raise ValueError("features need at least one column")
    number = _number_of(columns[0])
    timestep, dim = columns[0].timesteps[0], columns[0].dims[0]
    if number == 0:
        timestep = dim = 0
    elif min(timestep, dim) < number:
        raise ValueError(
            f"column {columns[0].name} cannot begin at time-step {timestep} and dimension {dim}: "
            f"the {number} columns before it have one of each at least"
        )
    for place, column in enumerate(columns, start=number):
        if _number_of(column) != place:
            raise ValueError(f"column {place} must be named z{place:03d}, not {column.name}")
        timestep = _end_of_range("time-steps", column.name, column.timesteps, timestep)
        dim = _end_of_range("dimensions", column.name, column.dims, dim)


def _number_of(column: FeatureColumn) -> int:
    match = _COLUMN_NAME.fullmatch(column.name)
    if match is None or column.name != f"z{int(match[1]):03d}":
        raise ValueError(f"a column must be named z000 or so, not {column.name!r}")
    return int(match[1])


def _end_of_range(what: str, name: str, half_open: tuple[int, int], expected_start: int) -> int:
    start, end = half_open
    if start != expected_start or end <= start:
        raise ValueError(
            f"{what} of column {name} must be a range from {expected_start} on, where the "
            f"column before it ends; got [{start}, {end})"
        )
    return end


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """The stored numbers of one z column, (N, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)
