"""Importing images: kept as they are, or cut out and resized; what cannot be used is all named."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipelines import decoding
from data_pipelines.image_import import (
    BadImagesError,
    Crop,
    Entry,
    FolderShard,
    Treatment,
    import_images,
    parse_crop,
)
from data_pipelines.label_table import Column


def picture(width: int, height: int) -> Image.Image:
    """Columns tell x, rows tell y: red is 2x, green is 2y."""
    x, y = np.meshgrid(np.arange(width) * 2, np.arange(height) * 2)
    return Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))


def shard(folder: Path, *names: str, treatment: Treatment = Treatment()) -> FolderShard:  # noqa: B008
    entries = tuple(Entry(name, name.partition(".")[0]) for name in names)
    return FolderShard(folder, entries, (), treatment)


def test_files_are_kept_byte_for_byte_under_their_own_ending(tmp_path: Path) -> None:
    names = ("a.JPG", "b.jpeg", "c.png", "d.webp")
    for name in names:
        picture(30, 20).save(tmp_path / name)
    found = list(import_images(shard(tmp_path, *names)))
    assert [(key, extension) for key, extension, _, _ in found] == [
        ("a", "jpg"),
        ("b", "jpeg"),
        ("c", "png"),
        ("d", "webp"),
    ]
    for (_, _, data, described), name in zip(found, names, strict=True):
        assert data == (tmp_path / name).read_bytes()
        assert described == {"path": name, "width": 30, "height": 20}


def test_labels_are_in_the_metadata(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    columns = (Column("hat", "attributes"), Column("caption", "caption"))
    labelled = FolderShard(tmp_path, (Entry("a.png", "a", ("1", "Hi")),), columns, Treatment())
    [(_, _, _, described)] = import_images(labelled)
    assert described["attributes"] == {"hat": 1}
    assert described["caption"] == "Hi"


def test_celebas_crop_is_cut_out_and_resized_with_a_filter(tmp_path: Path) -> None:
    picture(100, 120).save(tmp_path / "a.png")
    treatment = Treatment(size_px=16, crop=Crop(25, 57, 32, 32))
    [(_, extension, data, described)] = import_images(shard(tmp_path, "a.png", treatment=treatment))
    pixels = simplejpeg.decode_jpeg(data).astype(int)
    assert (extension, pixels.shape) == ("jpg", (16, 16, 3))
    assert (described["width"], described["height"]) == (16, 16)
    columns = pixels[8, 2:-2, 0] - 2 * (25 + 2 * np.arange(2, 14) + 0.5)
    rows = pixels[2:-2, 8, 1] - 2 * (57 + 2 * np.arange(2, 14) + 0.5)
    assert np.abs(columns).max() <= 3
    assert np.abs(rows).max() <= 3


def test_a_crop_alone_keeps_its_shape_and_is_of_the_upright_image(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    picture(60, 40).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.jpg", exif=turned, quality=98, subsampling=0
    )
    treatment = Treatment(crop=Crop(30, 10, 20, 12))
    [(_, _, data, _)] = import_images(shard(tmp_path, "a.jpg", treatment=treatment))
    pixels = simplejpeg.decode_jpeg(data).astype(int)
    assert pixels.shape == (12, 20, 3)
    assert np.abs(pixels[6, :, 0] - 2 * np.arange(30, 50)).max() <= 4
    assert np.abs(pixels[:, 10, 1] - 2 * np.arange(10, 22)).max() <= 4


def test_every_image_that_cannot_be_used_is_named_after_the_rest_was_looked_at(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 30 * 30)
    (tmp_path / "text.jpg").write_text("<html>")
    (tmp_path / "empty.png").touch()
    picture(31, 31).save(tmp_path / "bomb.png")
    picture(20, 20).save(tmp_path / "small.png")
    picture(30, 30).save(tmp_path / "good.png")
    names = ("text.jpg", "empty.png", "bomb.png", "small.png", "good.png")
    treatment = Treatment(crop=Crop(5, 0, 20, 20))
    found = []
    with pytest.raises(BadImagesError, match="4 of the images cannot be used") as caught:
        found += import_images(shard(tmp_path, *names, treatment=treatment))
    text, empty, bomb, small = caught.value.problems
    assert text == "text.jpg: 6 bytes that are no JPEG and none of PNG, WEBP, GIF, BMP"
    assert empty.startswith("empty.png: 0 bytes")
    assert bomb == "bomb.png: 31x31 pixels are more than the limit of 900"
    assert small == "small.png: 20x20 pixels, too few for a crop of 20x20 at left 5, top 0"


def test_a_cut_image_is_refused_even_when_it_would_only_be_kept(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:-40])
    with pytest.raises(BadImagesError, match=r"a\.jpg: damaged JPEG"):
        list(import_images(shard(tmp_path, "a.jpg")))


def test_a_long_list_of_bad_images_is_cut() -> None:
    message = str(BadImagesError([f"{n}.jpg: bad" for n in range(12)]))
    assert "12 of the images" in message
    assert message.endswith("9.jpg: bad; and 2 more")


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,2,3,4,5", "1,2,0,4", "-1,2,3,4", "a,b,c,d", "1,2,3,4 "]
)
def test_what_is_no_crop_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a crop is LEFT,TOP,WIDTH,HEIGHT"):
        parse_crop(text)


def test_a_crop_is_read_in_the_order_of_the_papers_numbers() -> None:
    assert parse_crop("25,57,128,64") == Crop(left=25, top=57, width=128, height=64)
