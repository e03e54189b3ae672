"""Re-encoding and a little resizing leave the hash nearly as it is; another image does not."""

import io

import numpy as np
from PIL import Image

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.decoding import decode_image
from data_pipelines.perceptual_hash import perceptual_hash


def apart(one: bytes, other: bytes) -> int:
    hashes = [perceptual_hash(decode_image(data, 128)) for data in (one, other)]
    return (hashes[0] ^ hashes[1]).bit_count()


def smaller_and_rougher(data: bytes) -> bytes:
    image, file = Image.open(io.BytesIO(data)), io.BytesIO()
    image.resize((118, 118)).save(file, "JPEG", quality=60)
    return file.getvalue()


def test_copies_are_nearer_than_other_faces() -> None:
    faces = [draw_avatar(AvatarSpec(size_px=128), row).jpeg for row in range(12)]
    copies = [apart(face, smaller_and_rougher(face)) for face in faces]
    others = [apart(one, two) for n, one in enumerate(faces) for two in faces[:n]]
    assert np.mean([distance <= 2 for distance in copies]) > 0.9
    assert min(others) > 2


def test_an_image_of_one_colour_has_a_hash() -> None:
    assert perceptual_hash(np.full((64, 64, 3), 7, np.uint8)).bit_count() < 64
