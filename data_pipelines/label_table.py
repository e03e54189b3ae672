"""A file of labels -> what each image's json will hold. Every input is hostile.

Two forms are read: CSV with a line of names, and CelebA's own `list_attr_celeba.txt` (a count, a
line of names, columns set apart by spaces). The first column names the image. What the others hold
is decided by all their cells together: 0 and 1, -1 and 1, or false and true are an attribute, other
numbers are numeric, anything else is a class; a column called `caption` is the caption.
"""

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["attributes", "numeric", "classes", "caption"]

_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NO_NUMBER: Final = frozenset({"nan", "na", "n/a", "none", "null", "inf", "-inf", "+inf"})
_TRUTH: Final = {"false": 0, "true": 1}
_SHOWN_CHARACTERS: Final = 40


class LabelTableError(ValueError):
    """A file of labels that cannot be used; the message names it and the line."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column, and under which name of the json its cells go."""

    name: str
    kind: Kind

    def value_of(self, cell: str) -> int | float | str:
        if self.kind == "attributes":
            return _TRUTH[cell.lower()] if cell.lower() in _TRUTH else int(float(cell) > 0)
        return float(cell) if self.kind == "numeric" else cell


@dataclass(frozen=True, slots=True)
class LabelRow:
    """What the file says of one image, as text."""

    line: int
    image: str
    cells: tuple[str, ...]
    """As many as there are columns."""


@dataclass(frozen=True, slots=True)
class LabelTable:
    """A whole file of labels."""

    path: Path
    columns: tuple[Column, ...]
    rows: tuple[LabelRow, ...]


def described(columns: Sequence[Column], cells: Sequence[str]) -> dict[str, Any]:
    """`attributes` {name: 0 or 1}, `numeric` {name: number}, `classes` {name: text}, `caption`.

    A kind of which there is no column is left out.
    """
    found: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        if column.kind == "caption":
            found["caption"] = cell
        else:
            found.setdefault(column.kind, {})[column.name] = column.value_of(cell)
    return found


def read_label_table(path: Path) -> LabelTable:
    """Read a file of labels.

    Raises:
        FileNotFoundError: there is none.
        LabelTableError: it is not UTF-8, has lines of different length, empty cells, names that
            stand twice, or not as many lines as it says.
    """
    text = read_text(path)
    first = text.partition("\n")[0].strip()
    lines = _celeba_lines(path, text) if first.isdecimal() else _csv_lines(path, text)
    header_line, header = next(lines, (1, []))
    names = header[1:]
    _check_header(path, header_line, names)
    rows = tuple(_row(path, line, cells, header) for line, cells in lines)
    if not rows:
        raise LabelTableError(f"{path} has no line of labels below its line of names")
    columns = tuple(_column(path, at, name, rows) for at, name in enumerate(names))
    return LabelTable(path, columns, rows)


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, with or without a byte order mark.

    Raises:
        LabelTableError: it is not UTF-8; names the line.
    """
    data = path.read_bytes()
    try:
        wrong = data.index(b"\0")  # UTF-16 of plain letters would be UTF-8 of letters and zeros
    except ValueError:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wrong = error.start
    line = data.count(b"\n", 0, wrong) + 1
    raise LabelTableError(
        f"{path}, line {line}: byte {data[wrong]:#04x} is not text in UTF-8; save the file as UTF-8"
    )


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise LabelTableError(f"{path}, line {reader.line_num}: no CSV: {error}") from error


def _celeba_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The names come without one for the column of images: it is added."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    stated = int(lines[0][1])
    if stated != len(lines) - 2:
        raise LabelTableError(
            f"{path}, line 1: says {stated} images, and {max(len(lines) - 2, 0)} lines of labels "
            f"follow the line of names; is the file cut?"
        )
    header_line, names = lines[1]
    yield header_line, ["image", *names.split()]
    for number, line in lines[2:]:
        yield number, line.split()


def _check_header(path: Path, line: int, names: Sequence[str]) -> None:
    where = f"{path}, line {line}"
    if not names:
        raise LabelTableError(
            f"{where}: one column only; the first names the image, and labels follow it after "
            f"commas"
        )
    if "" in names:
        raise LabelTableError(f"{where}: column {names.index('') + 2} has no name")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LabelTableError(f"{where}: two columns are called {twice!r}")


def _row(path: Path, line: int, cells: Sequence[str], header: Sequence[str]) -> LabelRow:
    if len(cells) != len(header):
        raise LabelTableError(
            f"{path}, line {line}: {len(cells)} cells where the line of names has {len(header)}"
        )
    if "" in cells:
        name = header[cells.index("")] or "of images"
        raise LabelTableError(
            f"{path}, line {line}: nothing in column {name}; fill it, or take out line or column"
        )
    image, *labels = cells
    # Most cells repeat: 200,000 lines of 40 attributes would take half a gigabyte.
    return LabelRow(line, image.removeprefix("./"), tuple(sys.intern(cell) for cell in labels))


def _column(path: Path, at: int, name: str, rows: Sequence[LabelRow]) -> Column:
    if name == "caption":
        return Column(name, "caption")
    distinct = {row.cells[at] for row in rows}
    if {cell.lower() for cell in distinct} <= _TRUTH.keys():
        return Column(name, "attributes")
    numbers = {float(cell) for cell in distinct if _NUMBER.fullmatch(cell)}
    texts = {cell for cell in distinct if not _NUMBER.fullmatch(cell)}
    if not numbers or not all(cell.lower() in _NO_NUMBER for cell in texts):
        return Column(name, "classes")
    if texts or not all(map(math.isfinite, numbers)):
        raise _not_finite(path, at, name, rows)
    return Column(name, "attributes" if numbers <= {0, 1} or numbers <= {-1, 1} else "numeric")


def _not_finite(path: Path, at: int, name: str, rows: Iterable[LabelRow]) -> LabelTableError:
    def is_finite(cell: str) -> bool:
        return bool(_NUMBER.fullmatch(cell)) and math.isfinite(float(cell))

    row = next(row for row in rows if not is_finite(row.cells[at]))
    return LabelTableError(
        f"{path}, line {row.line}: {row.cells[at][:_SHOWN_CHARACTERS]!r} in column {name} is no "
        f"finite number, as the others are; take out the line or the column"
    )
