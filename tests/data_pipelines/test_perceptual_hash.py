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
    """The same one whatever the colour, and whatever rounds how: nothing is above nothing."""
    flat = {perceptual_hash(np.full((64, 64, 3), level, np.uint8)) for level in range(256)}
    assert flat == {0}
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.repeat((np.hypot(x, y) < 20).astype(np.uint8)[..., None] * 255, 3, axis=2)
    assert perceptual_hash(disc) == perceptual_hash(disc[::-1, ::-1])


def test_brightness_of_the_whole_is_not_looked_at() -> None:
    face = decode_image(draw_avatar(AvatarSpec(size_px=128), 0).jpeg, 128)
    assert perceptual_hash(face // 2 + 20) == perceptual_hash(face // 2 + 100)
