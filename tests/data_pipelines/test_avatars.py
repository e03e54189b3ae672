"""Avatars: a row is a pure function, its labels are what was drawn, a change stays in its place."""

from __future__ import annotations

import colorsys
import json
from typing import Any

import dicebear
import numpy as np
import pytest
import simplejpeg

from data_pipelines import avatars
from data_pipelines.avatars import (
    ATTRIBUTES,
    SIZES_PX,
    AvatarSample,
    AvatarSpec,
    Correlation,
    attribute_granularity,
    draw_avatar,
    parse_correlation,
)

NAMES = [attribute.name for attribute in ATTRIBUTES]
OPTION_OF_FEATURE = {
    "tone": "background",
    "temperature": "background",
    "size": "scale",
    "side": "translateX",
    "height": "translateY",
}


def pixels(sample: AvatarSample) -> np.ndarray:
    """[H, W, 3] int."""
    return simplejpeg.decode_jpeg(sample.jpeg).astype(int)


def difference(one: AvatarSample, other: AvatarSample) -> np.ndarray:
    """[H, W] largest difference over the colour channels, 0..255."""
    return np.abs(pixels(one) - pixels(other)).max(axis=-1)


def labels(sample: AvatarSample) -> dict[str, int]:
    return sample.metadata["attributes"]


def sharing_a_feature_with(name: str) -> set[str]:
    features = {a.name: {feature for feature, _ in a.rule} for a in ATTRIBUTES}
    return {other for other in NAMES if features[other] & features[name]}


@pytest.fixture(scope="module")
def plain() -> list[AvatarSample]:
    return [draw_avatar(AvatarSpec(), row) for row in range(1000)]


@pytest.fixture
def given_options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every avatar that is drawn, as they are handed to DiceBear."""
    seen: list[dict[str, Any]] = []
    real = dicebear.Avatar

    def spy(style: dicebear.Style, options: dict[str, Any]) -> dicebear.Avatar:
        seen.append(options)
        return real(style, options)

    monkeypatch.setattr(avatars.dicebear, "Avatar", spy)
    return seen


# --- one row ---------------------------------------------------------------------------------


def test_a_row_is_the_same_whenever_and_in_whatever_order_it_is_drawn(plain):
    for row in (999, 3, 500):
        assert draw_avatar(AvatarSpec(), row) == plain[row]


def test_a_row_stays_what_it_was_in_published_data_sets(plain):
    assert plain[0].metadata["caption"] == (
        "A large frowning face with deep skin, a beanie and eyes looking sideways, "
        "wearing a grey shirt, on a dark cool background."
    )
    assert plain[0].metadata["numeric"] == {"scale": 1.5337, "x": 4.403, "y": 7.034, "hue": 186.79}


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_the_image_has_the_size_asked_for_and_full_colour_detail(size_px):
    sample = draw_avatar(AvatarSpec(size_px=size_px), 0)
    assert simplejpeg.decode_jpeg_header(sample.jpeg) == (size_px, size_px, "YCbCr", "444")
    assert (sample.metadata["width"], sample.metadata["height"]) == (size_px, size_px)
    assert sample.key == "0"


def test_the_metadata_is_json(plain):
    assert json.loads(json.dumps(plain[7].metadata)) == plain[7].metadata


def test_seed_and_split_give_other_faces_and_splits_share_no_seed():
    specs = [AvatarSpec(split=split) for split in ("train", "val", "test")] + [AvatarSpec(seed=1)]
    seeds = [draw_avatar(spec, row).metadata["seed"] for spec in specs for row in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert len({draw_avatar(spec, 0).jpeg for spec in specs}) == len(specs)


def test_faces_hardly_ever_repeat(plain):
    assert len({sample.jpeg for sample in plain}) == len(plain)


# --- labels ----------------------------------------------------------------------------------


def test_every_attribute_is_neither_rare_nor_nearly_always_there(plain):
    shares = {name: np.mean([labels(sample)[name] for sample in plain]) for name in NAMES}
    assert {name: share for name, share in shares.items() if not 0.05 <= share <= 0.95} == {}
    assert len(shares) >= 15


def test_attributes_come_in_three_granularities():
    assert list(attribute_granularity()) == NAMES
    assert set(attribute_granularity().values()) == {"coarse", "middle", "fine"}


def test_labels_say_what_dicebear_drew_even_when_it_was_asked_for_something_else(monkeypatch):
    real = dicebear.Avatar
    other = {"glassesProbability": 100, "glassesVariant": "shades", "flip": "horizontal"}
    monkeypatch.setattr(avatars.dicebear, "Avatar", lambda style, o: real(style, o | other))
    drawn = [labels(draw_avatar(AvatarSpec(), row)) for row in range(20)]
    assert all(d["glasses"] and d["dark_glasses"] and d["mirrored"] for d in drawn)
    assert not any(d["eyes_closed"] or d["looking_sideways"] for d in drawn)  # behind dark glass


def test_the_background_labels_are_the_colour_in_the_picture():
    for row in range(60):
        sample = draw_avatar(AvatarSpec(size_px=128), row)
        # Half-way down, the edge that the face is shifted away from is background.
        side = -3 if sample.metadata["numeric"]["x"] < 0 else 2
        red, green, blue = pixels(sample)[60, side] / 255
        hue, _, value = colorsys.rgb_to_hsv(red, green, blue)
        assert hue * 360 == pytest.approx(sample.metadata["numeric"]["hue"], abs=6)
        assert (value < 0.6) == labels(sample)["dark_background"]


def test_captions_name_what_the_labels_say(plain):
    for sample in plain[:200]:
        caption, drawn = sample.metadata["caption"], labels(sample)
        assert ("glasses" in caption) == drawn["glasses"]
        assert ("a moustache" in caption) == drawn["moustache"]
        assert ("blond hair" in caption) == drawn["blond_hair"]
        assert ("smiling" in caption or "laughing" in caption) == drawn["smiling"]


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_one_face_with_one_attribute_turned_over_by_one_option(name, given_options):
    spec = AvatarSpec(pairs=name)
    feature = next(a.rule[0][0] for a in ATTRIBUTES if a.name == name)
    for row in range(0, 24, 2):
        one, other = draw_avatar(spec, row), draw_avatar(spec, row + 1)
        before, after = given_options[-2:]
        changed = {o for o in before.keys() | after.keys() if before.get(o) != after.get(o)}
        assert labels(one)[name] != labels(other)[name]
        assert all(option.startswith(OPTION_OF_FEATURE.get(feature, feature)) for option in changed)
        assert changed
        assert one.metadata["pair"] == {"attribute": name, "index": row // 2, "other_row": row + 1}
        assert other.metadata["pair"]["other_row"] == row


@pytest.mark.parametrize("name", NAMES)
def test_every_attribute_can_be_seen_at_32_px(name):
    spec = AvatarSpec(pairs=name)
    visible = [
        int((difference(draw_avatar(spec, row), draw_avatar(spec, row + 1)) > 20).sum())
        for row in range(0, 60, 2)
    ]
    # The one known exception is a mouth in a full dark beard: a few faces in a hundred.
    assert np.quantile(visible, 0.1) >= 3, visible


@pytest.mark.parametrize(
    ("name", "left", "top", "right", "bottom"),
    [("glasses", 26, 45, 92, 68), ("eyes_closed", 34, 46, 84, 66), ("frowning", 44, 71, 74, 87)],
)
def test_a_fine_attribute_changes_its_own_place_and_nothing_else(name, left, top, right, bottom):
    """The box is in the drawing's own 128 units, before flip, zoom and shift."""
    spec = AvatarSpec(pairs=name, size_px=128)
    for row in range(0, 60, 2):
        one, other = draw_avatar(spec, row), draw_avatar(spec, row + 1)
        numeric = one.metadata["numeric"]
        ys, xs = np.nonzero(difference(one, other) > 30)
        xs = (xs + 0.5 - numeric["x"] * 1.28 - 64) / numeric["scale"] + 64
        ys = (ys + 0.5 - numeric["y"] * 1.28 - 64) / numeric["scale"] + 64
        xs = 128 - xs if labels(one)["mirrored"] else xs
        assert len(xs) > 0
        assert left <= xs.min() <= xs.max() <= right
        assert top <= ys.min() <= ys.max() <= bottom


@pytest.mark.parametrize(
    ("name", "may_follow"),
    [
        ("mirrored", set()),
        ("jacket", set()),
        ("smiling", {"frowning"}),
        ("mouth_open", {"frowning"}),
        ("dark_hair", {"blond_hair", "red_hair"}),
        ("looking_sideways", {"eyes_closed"}),
    ],
)
def test_of_the_ways_to_turn_an_attribute_over_a_pair_takes_the_least_disturbing(name, may_follow):
    spec = AvatarSpec(pairs=name)
    for row in range(0, 40, 2):
        one, other = labels(draw_avatar(spec, row)), labels(draw_avatar(spec, row + 1))
        gained, lost = ({n for n in NAMES if b[n] > a[n]} for a, b in ((one, other), (other, one)))
        # Turning it on may displace a label that excludes it; nothing else ever comes or goes.
        assert gained <= {name}
        assert lost <= ({name} if one[name] else may_follow)


# --- correlations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "hat:smiling:0.9",
        "dark_background:glasses:0.1",
        "smiling:mouth_open:0.8",
        "blond_hair:long_hair:1",
        "long_hair:blond_hair:0",
        "glasses:eyes_closed:0.95",
    ],
)
def test_the_second_attribute_follows_the_first_and_the_rest_of_the_face_stays(text, plain):
    correlation = parse_correlation(text)
    first, second = correlation.first, correlation.second
    spec = AvatarSpec(correlate=correlation)
    drawn = [labels(draw_avatar(spec, row)) for row in range(400)]
    agreement = np.mean([d[first] == d[second] for d in drawn])
    four_sigma = 4 * (correlation.probability * (1 - correlation.probability) / len(drawn)) ** 0.5
    assert agreement == pytest.approx(correlation.probability, abs=four_sigma + 1e-9)
    may_change = sharing_a_feature_with(second)
    if first in may_change:
        may_change |= sharing_a_feature_with(first)
    for correlated, sample in zip(drawn, plain, strict=False):
        changed = {name for name in NAMES if correlated[name] != labels(sample)[name]}
        assert changed <= may_change - {first}


def test_rows_that_already_agree_are_the_plain_rows(plain):
    spec = AvatarSpec(correlate=Correlation("hat", "smiling", 1.0))
    agreeing = [
        row for row in range(100) if labels(plain[row])["hat"] == labels(plain[row])["smiling"]
    ]
    assert agreeing
    assert [draw_avatar(spec, row) for row in agreeing] == [plain[row] for row in agreeing]


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AvatarSpec(style="lorelei"), r"no style 'lorelei'\. Valid: voxel-art"),
        (lambda: AvatarSpec(size_px=48), r"no size_px 48\. Valid: 32, 64, 128"),
        (lambda: AvatarSpec(split="dev"), r"no split 'dev'\. Valid: train, val, test"),  # type: ignore[arg-type]
        (lambda: AvatarSpec(pairs="glases"), r"'glases'\. Valid, nearest first: glasses, "),
        (lambda: Correlation("hatt", "glasses", 0.9), r"'hatt'\. Valid, nearest first: hat, "),
        (
            lambda: Correlation("hat", "smiling", 1.5),
            r"must lie in 0\.\.1; got 1\.5 for hat:smiling",
        ),
        (lambda: Correlation("hat", "hat", 0.9), r"hat cannot be correlated with itself"),
        (lambda: parse_correlation("hat:smiling"), r"like hat:smiling:0\.9; got 'hat:smiling'"),
        (lambda: parse_correlation("hat:smiling:x:1"), r"got 'hat:smiling:x:1'"),
        (lambda: draw_avatar(AvatarSpec(), -1), r"numbered from 0; got row -1"),
        (
            lambda: AvatarSpec(pairs="hat", correlate=Correlation("hat", "smiling", 0.9)),
            r"either pairs \(here hat\) or a correlation \(here hat:smiling\)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("first", "second"),
    [("hat", "bald"), ("beard", "moustache"), ("dark_glasses", "glasses"), ("hat", "blond_hair")],
)
def test_attributes_that_exclude_or_imply_each_other_cannot_be_correlated(first, second):
    with pytest.raises(ValueError, match=f"{second} cannot be set independently of {first}"):
        Correlation(first, second, 0.9)
