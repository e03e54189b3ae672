"""Tars made in memory, and WebDataset's own reading of them."""

import io
import tarfile
from collections.abc import Sequence

from webdataset import tariterators

Members = Sequence[tuple[str, bytes]]


def tar_of(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def headers(data: bytes) -> list[tarfile.TarInfo]:
    """Its members, where they lie."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def by_webdataset(data: bytes) -> dict[str, dict[str, bytes]]:
    """The same by WebDataset's own code."""
    files = tariterators.tar_file_expander([{"url": "u", "stream": io.BytesIO(data)}])
    return {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in tariterators.group_by_keys(files)
    }
