"""The image of a raw sample. Nothing here needs torch: indexing and verifying start faster."""

import numpy as np
from numpy.typing import NDArray

from data_pipelines.decoding import DecodeError, decode_image_into
from data_pipelines.sample_reader import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def decode_sample(sample: Sample, size_px: int) -> NDArray[np.uint8]:
    """The sample's image, its centre square, (H, W, 3) uint8.

    Raises:
        DecodeError: naming key and shard.
    """
    out = np.empty((size_px, size_px, 3), np.uint8)
    decode_sample_into(out, sample, place=0.5)
    return out


def decode_sample_into(out: NDArray[np.uint8], sample: Sample, place: float) -> None:
    """The same into a contiguous array of that shape.

    Args:
        place: of the square along the longer side, in [0, 1); 0.5 is the centre.

    Raises:
        DecodeError: as `decode_sample`.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            try:
                return decode_image_into(out, sample[extension], place)
            except DecodeError as error:
                raise DecodeError(
                    f"sample {sample['__key__']} of {sample['__url__']}: {error}"
                ) from error
    raise DecodeError(
        f"sample {sample['__key__']} of {sample['__url__']} has no image "
        f"(none of {', '.join(IMAGE_EXTENSIONS)} right after the first dot of its members' names)"
    )
