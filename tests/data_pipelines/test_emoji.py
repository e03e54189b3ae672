"""Emoji: a row is a pure function, its look and its labels are what was drawn."""

import colorsys
from collections import Counter

import numpy as np
import pytest
import simplejpeg

from data_pipelines.emoji import SIZES_PX, EmojiSample, EmojiSpec, draw_emoji
from data_pipelines.emoji_art import Art, load_art
from data_pipelines.emoji_labels import RULES, attributes_of, may_be_mirrored
from data_pipelines.emoji_packages import VENDORS
from tests.emoji_art import real_packages, small_art

SMALL = small_art()
SPLITS = ("train", "val", "test")
SPLIT_OF = {emoji.name: emoji.split for emoji in SMALL.emoji}


def pixels(sample: EmojiSample) -> np.ndarray:
    """[H, W, 3] int."""
    return simplejpeg.decode_jpeg(sample.jpeg).astype(int)


def drawn(name: str, **spec) -> list[EmojiSample]:
    """Two hundred rows of that emoji's split, those of the emoji alone."""
    rows = (draw_emoji(EmojiSpec(split=SPLIT_OF[name], **spec), SMALL, row) for row in range(200))
    codes = {v.code for e in SMALL.emoji if e.name == name for v in e.versions}
    return [sample for sample in rows if sample.metadata["code"] in codes]


@pytest.fixture(scope="module")
def art() -> Art:
    return load_art(real_packages())


def test_a_row_is_the_same_whenever_it_is_drawn_and_by_whatever_copy_of_the_art() -> None:
    spec = EmojiSpec(split=SPLIT_OF["cook"])
    first = [draw_emoji(spec, SMALL, row) for row in range(20)]
    for row in (19, 0, 7):
        assert draw_emoji(spec, small_art(), row) == first[row]
    assert len({sample.jpeg for sample in first}) == 20


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_the_image_has_the_size_asked_for_and_full_colour_detail(size_px: int) -> None:
    sample = drawn("cook", size_px=size_px)[0]
    assert simplejpeg.decode_jpeg_header(sample.jpeg) == (size_px, size_px, "YCbCr", "444")
    assert (sample.metadata["width"], sample.metadata["height"]) == (size_px, size_px)


def test_other_seeds_and_splits_give_other_images() -> None:
    name = "cook"
    assert [s.jpeg for s in drawn(name)] != [s.jpeg for s in drawn(name, seed=1)]


def test_a_split_has_only_its_own_emoji() -> None:
    for split in set(SPLIT_OF.values()):
        rows = [draw_emoji(EmojiSpec(split=split), SMALL, row) for row in range(50)]
        families = {sample.metadata["family"] for sample in rows}
        assert families == {e.family for e in SMALL.emoji if e.split == split}


def test_every_tone_and_vendor_of_an_emoji_is_drawn_about_as_often() -> None:
    tones = Counter(sample.metadata["code"] for sample in drawn("cook"))
    assert min(tones.values()) > 0.5 * max(tones.values())
    assert len(tones) == 3
    vendors = Counter(sample.metadata["classes"]["vendor"] for sample in drawn("dog"))
    assert min(vendors.values()) > 0.5 * max(vendors.values())
    assert set(vendors) == {"noto", "openmoji"}


def test_only_the_vendors_asked_for_draw() -> None:
    only = drawn("dog", vendors=("openmoji",))
    assert {sample.metadata["classes"]["vendor"] for sample in only} == {"openmoji"}
    with pytest.raises(ValueError, match=r"there is no emoji of split \w+ by twemoji"):
        draw_emoji(EmojiSpec(vendors=("twemoji",)), SMALL, 0)


@pytest.mark.parametrize("vendor", ["noto", "openmoji"])
def test_the_numbers_and_the_look_are_those_of_the_picture(vendor: str) -> None:
    """The drawings are squares: their edges say scale and place, the corners the background.

    Openmoji's margin, which these squares fill too, reaches out of the image where it is large.
    """
    margin = 72 / 62 if vendor == "openmoji" else 1
    samples = drawn("dog", size_px=128, vendors=(vendor,))
    for sample in [s for s in samples if vendor == "noto" or s.metadata["numeric"]["scale"] < 0.7]:
        found, numeric = pixels(sample), sample.metadata["numeric"]
        labels = sample.metadata["attributes"]
        square = np.abs(found - found[0, 0]).max(axis=-1) > 40
        across, down = (np.flatnonzero(square.any(axis=axis)) for axis in (0, 1))
        for places, shift in ((across, numeric["x"]), (down, numeric["y"])):
            middle, side = (places[0] + places[-1] + 1) / 2, places[-1] + 1 - places[0]
            assert side == pytest.approx(128 * numeric["scale"] * margin, abs=2)
            assert middle == pytest.approx(128 * (0.5 + shift / 100), abs=1.5)
        hue, _, value = colorsys.rgb_to_hsv(*found[0, 0] / 255)
        assert hue * 360 == pytest.approx(numeric["hue"], abs=6)
        assert labels["dark_background"] == (value < 0.7)
        assert labels["warm_background"] == (hue < 0.3)
        assert labels["large"] == (numeric["scale"] > 0.7)
        assert labels["on_left"] == (numeric["x"] < 0)
        assert labels["low"] == (numeric["y"] > 0)


def test_arrows_point_where_they_say_and_animals_may_look_either_way() -> None:
    def filled_side(sample: EmojiSample) -> str:
        found, numeric = pixels(sample), sample.metadata["numeric"]
        middle = 128 * (0.5 + numeric["x"] / 100)
        row = found[round(128 * (0.5 + numeric["y"] / 100))]
        green = np.flatnonzero(np.abs(row - found[0, 0]).max(axis=-1) > 40)
        return "right" if green.mean() > middle else "left"

    for side in ("left", "right"):
        arrows = drawn(f"{side} arrow", size_px=128)
        assert {filled_side(sample) for sample in arrows} == {side}
        assert not any(sample.metadata["mirrored"] for sample in arrows)
    assert {sample.metadata["mirrored"] for sample in drawn("dog")} == {True, False}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size_px": 48}, "no size_px 48; there are 32, 64, 128"),
        ({"split": "all"}, "no split 'all'; there are train, val, test"),
        ({"vendors": ("noto", "apple")}, "no vendor 'apple'; there are noto, fluent"),
        ({"vendors": ()}, "at least one vendor"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmojiSpec(**wrong)


def test_negative_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows are numbered from 0, got -1"):
        draw_emoji(EmojiSpec(), SMALL, -1)


# ------------------------------------------------------------------------------------ the real art


def names_with(art: Art, attribute: str) -> set[str]:
    return {
        version.name
        for emoji in art.emoji
        for version in emoji.versions
        if attributes_of(emoji, version)[attribute]
    }


@pytest.mark.parametrize(
    ("attribute", "has", "has_not"),
    [
        ("face", {"grinning face", "cat with wry smile"}, {"dog face", "clown"}),
        ("smiling", {"beaming face with smiling eyes", "grinning cat"}, {"crying face"}),
        ("sad_or_worried", {"crying face", "anguished face"}, {"grinning face"}),
        ("woman", {"woman cook", "women with bunny ears"}, {"man cook", "ladybug"}),
        ("man", {"man cook: dark skin tone", "men wrestling"}, {"woman cook", "mango"}),
        ("dark_skin", {"waving hand: dark skin tone", "man: medium-dark skin tone, bald"},
         {"waving hand", "waving hand: medium skin tone", "dark skin tone",
          "people holding hands: light skin tone, dark skin tone"}),
        ("light_skin", {"people holding hands: light skin tone, medium-light skin tone"},
         {"people holding hands: light skin tone, medium skin tone"}),
        ("heart", {"red heart", "smiling face with heart-eyes"}, {"kiss mark"}),
        ("animal", {"poodle", "shark"}, {"grinning cat"}),
        ("food", {"red apple", "beer mug"}, {"fork and knife"}),
        ("flag", {"flag: Japan", "pirate flag"}, {"Japanese dolls"}),
    ],
)  # fmt: skip
def test_the_labels_are_what_the_names_say(art: Art, attribute, has, has_not) -> None:
    found = names_with(art, attribute)
    assert has <= found
    assert not has_not & found


@pytest.mark.parametrize("split", SPLITS)
def test_every_attribute_holds_for_one_in_a_hundred_images_or_more(art: Art, split) -> None:
    """Counted over all that can be drawn, each as likely as it is drawn; no sample is taken."""
    emoji = [emoji for emoji in art.emoji if emoji.split == split]
    shares = {
        rule.name: np.mean(
            [np.mean([rule.holds(e, version) for version in e.versions]) for e in emoji]
        )
        for rule in RULES
    }
    assert {name: share for name, share in shares.items() if not 0.01 <= share <= 0.5} == {}


def test_real_emoji_are_mirrored_only_where_nothing_becomes_false(art: Art) -> None:
    mirrored = {emoji.name for emoji in art.emoji if may_be_mirrored(emoji)}
    assert {"grinning face", "man running", "horse", "green apple"} <= mirrored
    not_true = {"twelve-thirty", "flag: Japan", "man running facing right", "right arrow", "abacus"}
    assert not mirrored & (not_true | {"right-facing fist", "backhand index pointing left"})


def test_a_real_row_stays_what_it_was_in_published_data_sets(art: Art) -> None:
    sample = draw_emoji(EmojiSpec(split="test"), art, 0)
    assert sample.metadata["caption"] == "police officer"
    assert sample.metadata["classes"]["vendor"] == "openmoji"
    assert sample.metadata["numeric"] == {
        "scale": 0.8069,
        "x": 4.9497,
        "y": 4.5501,
        "hue": 187.3453,
    }


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_real_drawing_can_be_rendered_and_seen(art: Art, vendor: str) -> None:
    """A sample of each vendor's art; a drawing that renders to nothing leaves the background."""
    for row in range(150):
        sample = draw_emoji(EmojiSpec(vendors=(vendor,)), art, row)
        found = pixels(sample)
        differs = np.abs(found - found[0, 0]).max(axis=-1) > 20
        assert differs.mean() > 0.01, sample.metadata
