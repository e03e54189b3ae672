"""One resizer of the comparison in `resizing`, as a process: files of images to JPEGs of 256 px.

    PYTHON resizing_peers.py RESIZER IMAGES

In a file that imports nothing of this project at the top, so that img2dataset can run in a Python
of its own. It prints the CPU seconds of this process for all images, threads included, and how many
bytes came out.
"""

import io
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

SIZE_PX = 256
QUALITY = 95


def ours() -> Callable[[bytes], int]:
    """All that preprocessing does to a sample: resizing is a part of it."""
    from configs.preprocess import PreprocessConfig
    from data_pipelines.screening import Kept, screen

    config = PreprocessConfig(raw="raw", out="out", image_size_px=SIZE_PX, jpeg_quality=QUALITY)

    def resize(data: bytes) -> int:
        verdict = screen({"__key__": "0", "__url__": "0.tar", "jpg": data, "json": b"{}"}, config)
        assert isinstance(verdict, Kept), verdict
        return len(verdict.members["jpg"])

    return resize


def img2dataset() -> Callable[[bytes], int]:
    """Its resizer, as its command sets it up for centre squares of JPEG."""
    import cv2  # pyright: ignore[reportMissingImports]
    from img2dataset.resizer import Resizer  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(1)
    resizer = Resizer(
        image_size=SIZE_PX,
        resize_mode="center_crop",
        resize_only_if_bigger=False,
        encode_quality=QUALITY,
        encode_format="jpg",
    )

    def resize(data: bytes) -> int:
        image, width, height, *_, error = resizer(io.BytesIO(data))
        assert error is None and (width, height) == (SIZE_PX, SIZE_PX), error  # noqa: PT018
        return len(image)

    return resize


RESIZERS = {"ours": ours, "img2dataset": img2dataset}


def read_images(file: Path) -> list[bytes]:
    """What `write_images` wrote."""
    data, images, at = file.read_bytes(), [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        images.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return images


def write_images(file: Path, images: list[bytes]) -> None:
    """Each with its length before it."""
    file.write_bytes(b"".join(struct.pack("<I", len(data)) + data for data in images))


def main() -> None:
    name, file = sys.argv[1:]
    resize, images = RESIZERS[name](), read_images(Path(file))
    for data in images[:20]:  # what is made at the first call is none of the images'
        resize(data)
    begun = time.process_time()
    size = sum(resize(data) for data in images)
    print(time.process_time() - begun, size)


if __name__ == "__main__":
    main()
