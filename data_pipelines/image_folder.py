"""A plain folder of images, with or without a file of labels: which samples it becomes.

Planning decides everything that can be decided without opening an image: which there are, in what
order, under which keys, with which labels, in which shard. `image_import` then reads them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from data_pipelines.image_import import Entry, FolderShard, Treatment, ending_of
from data_pipelines.label_table import (
    Column,
    LabelTable,
    LabelTableError,
    read_label_table,
    read_text,
)
from data_pipelines.sample_images import IMAGE_EXTENSIONS

SHARD_BYTES: Final = 256 << 20
"""Of images in one shard, which is built in memory; a single larger image still gets one."""
_NOT_UTF8: Final = re.compile("[\ud800-\udfff]")
_NOT_IN_KEYS: Final = re.compile(r"[^\w/-]")


def plan_folder(
    folder: Path,
    *,
    labels: Path | None = None,
    only: Path | None = None,
    treatment: Treatment,
    rows_per_shard: int,
) -> list[FolderShard]:
    """Every shard of the set that the folder becomes, in order.

    Args:
        labels: what `read_label_table` reads; images are named by their path below the folder,
            with or without its ending.
        only: a file with one such name a line; other images, and their labels, are left out.

    Raises:
        ValueError: no folder, no image, a name that is not UTF-8; an image without labels, labels
            without an image, or either twice.
    """
    images = find_images(folder)
    names = _Names(folder, images)
    if only is not None:
        images = _listed(names, only)
    columns: tuple[Column, ...] = ()
    cells: Mapping[str, tuple[str, ...]] = {}
    if labels is not None:
        table = read_label_table(labels)
        columns = table.columns
        cells = _cells_of(images, names, table, whole=only is None)
    keys = _keys(images)
    entries = [Entry(path, keys[path], cells.get(path, ())) for path in images]
    limit = SHARD_BYTES if treatment.keeps_files else None
    return [
        FolderShard(folder, tuple(part), columns, treatment)
        for part in _parts(folder, entries, rows_per_shard, limit)
    ]


def find_images(folder: Path) -> list[str]:
    """Paths below the folder of all jpg, jpeg, png and webp in it, sorted, with `/` in them.

    Hidden files and folders are passed over, and links to folders are not followed.

    Raises:
        ValueError: it is no folder, holds no image, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found: list[str] = []
    for where, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if ending_of(name) in IMAGE_EXTENSIONS]
        below = Path(where).relative_to(folder)
        found += [(below / name).as_posix() for name in images if not name.startswith(".")]
    if unreadable := [path for path in found if _NOT_UTF8.search(path)]:
        raise ValueError(
            f"{folder} holds the file {unreadable[0]!a}, whose name is not UTF-8; rename it"
        )
    if not found:
        raise ValueError(f"{folder} holds no image (none of {', '.join(IMAGE_EXTENSIONS)})")
    return sorted(found)


class _Names:
    """Finds an image by its path, or by its path without the ending where that is enough."""

    def __init__(self, folder: Path, images: Sequence[str]) -> None:
        self.folder = folder
        self.paths = set(images)
        self.stems: dict[str, list[str]] = {}
        for path in images:
            self.stems.setdefault(_stem(path), []).append(path)

    def find(self, name: str, source: Path, line: int) -> str | None:
        """None if there is none. Raises LabelTableError if there are several."""
        if name in self.paths:
            return name
        found = self.stems.get(name, [])
        if len(found) > 1:
            raise LabelTableError(
                f"{source}, line {line}: {name!r} may be {found[0]} or {found[1]} of "
                f"{self.folder}; write the ending too"
            )
        return found[0] if found else None


def _listed(names: _Names, only: Path) -> list[str]:
    lines: dict[str, int] = {}
    for line, name in enumerate(read_text(only).splitlines(), 1):
        if not name.strip():
            continue
        path = names.find(name.strip().removeprefix("./"), only, line)
        if path is None:
            raise LabelTableError(f"{only}, line {line}: {names.folder} has no image {name!r}")
        if path in lines:
            raise LabelTableError(f"{only}, line {line}: {path} is in line {lines[path]} already")
        lines[path] = line
    if not lines:
        raise LabelTableError(f"{only} names no image")
    return sorted(lines)


def _cells_of(
    images: Sequence[str], names: _Names, table: LabelTable, *, whole: bool
) -> dict[str, tuple[str, ...]]:
    """Labels by path; exactly one line for each image and, of a whole folder, no other line."""
    row_of = {}
    unknown = []
    for row in table.rows:
        path = names.find(row.image, table.path, row.line)
        if path is None:
            unknown.append(row)
        elif path in row_of:
            raise LabelTableError(
                f"{table.path}, line {row.line}: {path} has labels in line {row_of[path].line} "
                f"already"
            )
        else:
            row_of[path] = row
    if unknown and whole:
        raise LabelTableError(
            f"{table.path}, line {unknown[0].line}: {names.folder} has no image "
            f"{unknown[0].image!r} ({len(unknown)} such lines); take them out, or name the images "
            f"that are wanted with --only"
        )
    if missing := [path for path in images if path not in row_of]:
        raise LabelTableError(
            f"{table.path} has no line for {missing[0]} of {names.folder} ({len(missing)} such "
            f"images); label them, or name the images that are wanted with --only"
        )
    return {path: row_of[path].cells for path in images}


def _keys(images: Sequence[str]) -> dict[str, str]:
    """By path: the path without its ending, and without what a reader of tars could stumble over.

    WebDataset ends a key at the first dot. Where two would have the same, the later gets a number.
    """
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for path in images:
        plain = key = _NOT_IN_KEYS.sub("_", _stem(path))
        number = 2
        while key in taken:
            key, number = f"{plain}-{number}", number + 1
        taken.add(key)
        keys[path] = key
    return keys


def _parts(
    folder: Path, entries: Sequence[Entry], rows: int, limit_bytes: int | None
) -> Iterator[list[Entry]]:
    """Runs of at most so many entries and, if there is a limit, of files of so many bytes."""
    part: list[Entry] = []
    total = 0
    for entry in entries:
        size = 0 if limit_bytes is None else (folder / entry.path).stat().st_size
        if part and (len(part) == rows or (limit_bytes is not None and total + size > limit_bytes)):
            yield part
            part, total = [], 0
        part.append(entry)
        total += size
    yield part


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _raise(error: OSError) -> None:
    raise error
