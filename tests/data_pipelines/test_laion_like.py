"""The raw set: a row is a pure function, a fault is really there, and all else is sound."""

import hashlib
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.decoding import DecodeError, decode_image, decode_whole
from data_pipelines.laion_like import (
    COPIES,
    FAULTS,
    SCHEMA,
    LaionRow,
    LaionSpec,
    draw_row,
    fault_of,
)

SPEC = LaionSpec(faults=0.6, rows_per_shard=10)
SOUND = LaionSpec(faults=0.0, rows_per_shard=10)
OF_THE_PICTURE = FAULTS[: FAULTS.index("no_caption")]
OF_THE_REST = FAULTS[FAULTS.index("no_caption") :]


@pytest.fixture(scope="module")
def bad() -> dict[str, LaionRow]:
    """A row with each of the faults; the last one of each among the first 100."""
    rows = {fault_of(SPEC, row)[0]: row for row in range(100)}
    return {fault: draw_row(SPEC, rows[fault]) for fault in FAULTS}


@pytest.fixture(scope="module")
def sound() -> list[LaionRow]:
    return [draw_row(SOUND, row) for row in range(40)]


def row_of(key: str) -> int:
    return int(key[:5]) * SPEC.rows_per_shard + int(key[5:])


def without_fault(row: LaionRow) -> LaionRow:
    """What this row is in a set without faults."""
    return draw_row(SOUND, row_of(row.key))


# ------------------------------------------------------------------------------------ a sound row


def test_a_row_is_the_same_whenever_and_in_whatever_order_it_is_drawn(sound: list[LaionRow]):
    for row in (31, 2):
        assert draw_row(SOUND, row) == sound[row]


def test_a_row_stays_what_it_was_in_published_sets(sound: list[LaionRow]):
    columns = sound[3].columns
    assert columns["url"] == "https://example.org/150564e4/000000003.jpg"
    assert (columns["width"], columns["height"]) == (188, 314)
    assert (columns["similarity"], columns["AESTHETIC_SCORE"]) == (0.4174, 3.6505)
    assert [fault_of(SPEC, row) for row in (7, 11, 12)] == [
        ("", None),
        ("watermark", None),
        ("near_duplicate", 10),
    ]


def test_seeds_and_rows_give_other_pictures(sound: list[LaionRow]):
    other = draw_row(LaionSpec(seed=1, faults=0.0), 0)
    assert len({row.columns["sha256"] for row in (*sound, other)}) == len(sound) + 1


def test_pictures_have_the_sizes_and_the_weight_of_the_webs(sound: list[LaionRow]):
    sizes = [(row.columns["width"], row.columns["height"]) for row in sound]
    assert all(160 <= min(size) <= 900 and max(size) <= 2 * min(size) + 1 for size in sizes)
    assert min(min(size) for size in sizes) < 220
    assert max(min(size) for size in sizes) > 650
    assert {width > height for width, height in sizes} == {True, False}
    bits = [8 * len(row.members["jpg"]) / (w * h) for row, (w, h) in zip(sound, sizes, strict=True)]
    assert 0.7 < np.mean(bits) < 2.5  # per pixel


def test_the_bytes_are_the_jpeg_that_the_columns_describe(sound: list[LaionRow]):
    for row in sound:
        columns, jpeg = row.columns, row.members["jpg"]
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(jpeg)
        assert (width, height, subsampling) == (columns["width"], columns["height"], "420")
        assert (width, height) == (columns["original_width"], columns["original_height"])
        assert decode_whole(jpeg).shape == (height, width, 3)
        assert columns["sha256"] == hashlib.sha256(jpeg).hexdigest()
        assert columns["md5"] == hashlib.md5(jpeg).hexdigest()


def test_the_centre_square_is_the_avatar_whose_attributes_and_caption_the_row_has(
    sound: list[LaionRow],
):
    for number, row in enumerate(sound[:12]):
        avatar = draw_avatar(AvatarSpec(size_px=128), number)
        assert json.loads(row.members["json"])["attributes"] == avatar.metadata["attributes"]
        assert row.members["txt"].decode() == row.columns["caption"] == avatar.metadata["caption"]
        drawn = simplejpeg.decode_jpeg(avatar.jpeg).astype(int)
        of_face = np.abs(drawn - drawn[0, 0]).max(axis=-1) > 40  # its corner is background
        found = decode_image(row.members["jpg"], 128).astype(int)
        assert np.abs(found - drawn)[of_face].mean() < 12


def test_the_json_says_what_the_columns_say_but_for_the_truth(sound: list[LaionRow]):
    row = sound[5]
    described = json.loads(row.members["json"])
    described.pop("attributes")
    truth = {"fault": "", "duplicate_of": None}
    assert truth.keys().isdisjoint(described)
    assert {**described, **truth} == row.columns
    assert list(row.columns) == SCHEMA.names
    found = (described["status"], described["error_message"], described["exif"])
    assert found == ("success", None, "{}")


def test_scores_lie_where_such_sets_have_them(sound: list[LaionRow]):
    def scores(name: str) -> list[float]:
        return [row.columns[name] for row in sound]

    assert 0.15 <= min(scores("similarity")) < max(scores("similarity")) <= 0.45
    assert 3 <= min(scores("AESTHETIC_SCORE")) < max(scores("AESTHETIC_SCORE")) <= 7
    for name in ("punsafe", "pwatermark"):
        assert 0 <= min(scores(name)) < np.median(scores(name)) < 0.1
        assert max(scores(name)) < 0.45


# ---------------------------------------------------------------------------------- which row has


def test_the_share_of_faults_is_the_one_asked_for_spread_over_all_kinds():
    found = Counter(fault_of(LaionSpec(faults=0.2), row)[0] for row in range(20_000))
    assert found.total() - found[""] == pytest.approx(4000, rel=0.06)
    assert set(found) == {"", *FAULTS}
    for fault in FAULTS:
        assert found[fault] == pytest.approx(4000 / len(FAULTS), rel=0.2)


def test_the_other_rows_are_what_they_are_without_faults():
    rows = [row for row in range(30) if fault_of(SPEC, row)[0] == ""][:4]
    assert [draw_row(SPEC, row) for row in rows] == [draw_row(SOUND, row) for row in rows]


def test_copies_are_of_earlier_rows_without_a_fault_any_of_them_alike():
    spec = LaionSpec(faults=0.3)
    of = {row: source for row in range(20_000) if (source := fault_of(spec, row)[1]) is not None}
    assert all(source < row for row, source in of.items())
    assert all(fault_of(spec, source)[0] == "" for source in of.values())
    places = [source / row for row, source in of.items()]
    assert np.quantile(places, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def test_a_copy_that_finds_nothing_to_copy_is_no_fault():
    found = {fault_of(LaionSpec(faults=1.0), row)[0] for row in range(1000)}
    assert found == {"", *FAULTS} - set(COPIES)
    firsts = {fault_of(LaionSpec(seed=seed, faults=1.0), 0) for seed in range(200)}
    assert {fault for fault, _ in firsts} == {"", *FAULTS} - set(COPIES)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="share of faults must lie in 0 to 1"):
        LaionSpec(faults=share)


@pytest.mark.parametrize("rows", [0, 10_001])
def test_shards_that_keys_cannot_number_are_refused(rows: int):
    with pytest.raises(ValueError, match=f"rows per shard must be 1 to 10000, got {rows}"):
        LaionSpec(rows_per_shard=rows)


def test_a_negative_row_is_refused():
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        draw_row(SPEC, -1)


# ------------------------------------------------------------------------------------- each fault


def test_the_truth_is_in_the_columns(bad: dict[str, LaionRow]):
    for fault, row in bad.items():
        assert row.columns["fault"] == fault
        assert (row.columns["duplicate_of"] is not None) == (fault in COPIES)


@pytest.mark.parametrize("fault", OF_THE_PICTURE)
def test_a_row_with_a_bad_picture_is_sound_otherwise(bad: dict[str, LaionRow], fault: str):
    row, twin = bad[fault], without_fault(bad[fault])
    assert row.members["txt"] == twin.members["txt"]
    assert row.columns["url"] == twin.columns["url"]
    described = json.loads(row.members["json"])
    assert described["sha256"] == hashlib.sha256(row.members["jpg"]).hexdigest()
    for name in ("punsafe", "pwatermark"):
        assert described[name] == twin.columns[name]


@pytest.mark.parametrize("fault", OF_THE_REST)
def test_a_row_with_bad_text_or_scores_has_its_picture(bad: dict[str, LaionRow], fault: str):
    assert bad[fault].members["jpg"] == without_fault(bad[fault]).members["jpg"]


def test_a_truncated_jpeg_cannot_be_decoded(bad: dict[str, LaionRow]):
    whole, cut = without_fault(bad["truncated"]).members["jpg"], bad["truncated"].members["jpg"]
    assert 0.29 < len(cut) / len(whole) < 0.71
    assert whole.startswith(cut)
    with pytest.raises(DecodeError, match="damaged JPEG"):
        decode_whole(cut)


def test_bytes_that_are_no_image_are_none_to_any_decoder(bad: dict[str, LaionRow]):
    data = bad["no_image"].members["jpg"]
    with pytest.raises(DecodeError, match="no JPEG and none of"):
        decode_whole(data)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))


def test_a_wrong_extension_hides_a_png_of_the_same_picture(bad: dict[str, LaionRow]):
    row = bad["wrong_extension"]
    image = Image.open(io.BytesIO(row.members["jpg"]))
    assert image.format == "PNG"
    assert image.size == (row.columns["width"], row.columns["height"])
    original = Image.open(io.BytesIO(without_fault(row).members["jpg"]))
    assert np.array_equal(np.asarray(image), np.asarray(original))


def test_a_duplicate_has_the_bytes_and_attributes_of_another_row(bad: dict[str, LaionRow]):
    row = bad["duplicate"]
    original = draw_row(SPEC, row_of(row.columns["duplicate_of"]))
    assert original.columns["fault"] == ""
    assert row.members["jpg"] == original.members["jpg"]
    for name in ("sha256", "width", "height"):
        assert row.columns[name] == original.columns[name]
    for name in ("key", "url", "caption"):
        assert row.columns[name] != original.columns[name]
    described, of_original = (json.loads(one.members["json"]) for one in (row, original))
    assert described["attributes"] == of_original["attributes"]


def test_a_near_duplicate_looks_like_another_row_and_has_other_bytes(bad: dict[str, LaionRow]):
    row = bad["near_duplicate"]
    original = draw_row(SPEC, row_of(row.columns["duplicate_of"]))
    assert original.columns["fault"] == ""
    assert row.columns["sha256"] != original.columns["sha256"]
    for side in ("width", "height"):
        assert 0.84 < row.columns[side] / original.columns[side] < 0.96
    copy, first = (decode_image(r.members["jpg"], 64).astype(int) for r in (row, original))
    assert np.abs(copy - first).mean() < 4
    own = decode_image(without_fault(row).members["jpg"], 64).astype(int)
    assert np.abs(copy - own).mean() > 12


def test_tiny_and_extreme_pictures_are(bad: dict[str, LaionRow]):
    for fault, shorter, longest in (("tiny", 40, 80), ("extreme_aspect", 160, 2400)):
        height, width = decode_whole(bad[fault].members["jpg"]).shape[:2]
        assert shorter <= min(height, width) < max(height, width) <= longest
        if fault == "tiny":
            assert min(height, width) == 40
        else:
            assert max(height, width) == 8 * min(height, width)


def test_a_huge_jpeg_is_whole_and_small(bad: dict[str, LaionRow]):
    row = bad["huge"]
    jpeg, size = row.members["jpg"], (row.columns["width"], row.columns["height"])
    assert simplejpeg.decode_jpeg_header(jpeg)[1::-1] == size
    assert math.prod(size) > 100_000_000
    assert len(jpeg) < 500_000
    with pytest.raises(DecodeError, match="pixels are more than the limit"):
        decode_whole(jpeg)
    eighth = simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=8)
    assert eighth.shape == (size[1] // 8, size[0] // 8, 1)
    assert np.all(eighth == 128)


def test_captions_are_missing_or_empty_everywhere(bad: dict[str, LaionRow]):
    none, empty = bad["no_caption"], bad["empty_caption"]
    assert set(none.members) == {"jpg", "json"}
    assert none.columns["caption"] is json.loads(none.members["json"])["caption"] is None
    assert empty.members["txt"] == b""
    assert empty.columns["caption"] == json.loads(empty.members["json"])["caption"] == ""


def test_metadata_is_missing_or_cannot_be_parsed(bad: dict[str, LaionRow]):
    assert set(bad["no_json"].members) == {"jpg", "txt"}
    assert set(bad["broken_json"].members) == {"jpg", "txt", "json"}
    with pytest.raises(json.JSONDecodeError):
        json.loads(bad["broken_json"].members["json"])


def test_high_scores_are_in_columns_and_json(bad: dict[str, LaionRow]):
    for fault, name, other in (
        ("nsfw", "punsafe", "pwatermark"),
        ("watermark", "pwatermark", "punsafe"),
    ):
        row = bad[fault]
        assert row.columns[name] == json.loads(row.members["json"])[name] == 0.99
        assert row.columns[other] < 0.45
