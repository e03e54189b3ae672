"""Joining names with drawings, and which emoji may not be in different splits."""

from collections import Counter

import pytest

from data_pipelines.emoji_art import Art, Emoji, build_art, load_art
from tests.emoji_art import GROUPS, entry, real_packages, small_art


@pytest.fixture(scope="module")
def art() -> Art:
    return load_art(real_packages())


def by_name(art: Art) -> dict[str, Emoji]:
    return {emoji.name: emoji for emoji in art.emoji}


def test_an_emoji_has_its_tones_and_each_the_drawings_of_those_who_drew_it() -> None:
    found = by_name(small_art())
    cook = found["cook"]
    assert (cook.category, cook.subcategory, cook.tags) == ("people-body", "person", ("food",))
    assert [(v.code, v.tones) for v in cook.versions] == [
        ("1F44B", ()),
        ("1F44B-1F3FB", (1,)),
        ("1F44B-1F3FF", (5,)),
    ]
    assert list(cook.versions[0].drawings) == ["noto"]
    assert list(found["dog"].versions[0].drawings) == ["noto", "openmoji"]


def test_bare_tones_and_what_nobody_draws_are_no_emoji() -> None:
    assert list(by_name(small_art())) == [
        "cook",
        "woman cook",
        "dog",
        "wolf",
        "right arrow",
        "left arrow",
    ]


def test_openmojis_margin_is_not_counted() -> None:
    drawings = by_name(small_art())["dog"].versions[0].drawings
    noto, openmoji = drawings["noto"], drawings["openmoji"]
    assert (noto.middle, noto.width, noto.height) == ((5, 5), 10, 10)
    assert (openmoji.middle, openmoji.width, openmoji.height) == ((36, 36), 62, 62)


def test_gender_and_a_shared_drawing_make_a_family() -> None:
    families = {emoji.name: emoji.family for emoji in small_art().emoji}
    assert families == {
        "cook": "1F44B",
        "woman cook": "1F44B",
        "dog": "1F436",
        "wolf": "1F436",
        "right arrow": "27A1",
        "left arrow": "2B05",
    }


def test_links_in_a_chain_make_one_family_in_whatever_order_they_come() -> None:
    """a and c share nothing, but b shares a drawing with each of them."""
    box = {"width": 1, "height": 1, "icons": {"p": {"body": "p"}, "q": {"body": "q"}}}
    codes = {"a": ("p", ""), "b": ("p", "q"), "c": ("", "q")}
    sets = {
        vendor: (box, {code: names[at] for code, names in codes.items() if names[at]})
        for at, vendor in enumerate(("noto", "twemoji"))
    }
    for order in ("abc", "acb", "bca", "cab"):
        art = build_art([entry(code, code, 3, 34) for code in order], GROUPS, sets)
        assert len({emoji.family for emoji in art.emoji}) == 1


def test_of_every_kind_three_in_five_are_for_training() -> None:
    entries = [entry(f"{n:04X}", str(n), *kind) for n, kind in enumerate([(3, 34), (8, 90)] * 50)]
    box = {"width": 1, "height": 1, "icons": {str(n): {"body": str(n)} for n in range(100)}}
    art = build_art(entries, GROUPS, {"noto": (box, {f"{n:04X}": str(n) for n in range(100)})})
    assert Counter((emoji.category, emoji.split) for emoji in art.emoji) == {
        (category, split): count
        for category in ("animals-nature", "symbols")
        for split, count in (("train", 30), ("val", 10), ("test", 10))
    }
    first = [emoji.split for emoji in art.emoji if emoji.category == "symbols"]
    assert first[:10] != first[10:20] != first[20:30], "neighbours make no pattern"


# ------------------------------------------------------------------------------------ the real art


def test_the_real_art_has_everything_unicode_has_by_four_hands(art: Art) -> None:
    assert len(art.emoji) == 1914
    drawings = [name for e in art.emoji for v in e.versions for name in v.drawings]
    assert Counter(drawings) == {"noto": 3682, "fluent": 3139, "twemoji": 3944, "openmoji": 3944}


def test_no_real_family_and_no_real_drawing_is_in_two_splits(art: Art) -> None:
    splits: dict[str, set[str]] = {}
    for emoji in art.emoji:
        bodies = {d.body for v in emoji.versions for d in v.drawings.values()}
        for thing in bodies | {emoji.family}:
            splits.setdefault(thing, set()).add(emoji.split)
    assert {thing: found for thing, found in splits.items() if len(found) > 1} == {}
    shares = Counter(emoji.split for emoji in art.emoji)
    assert all(0.18 < shares[split] / 1914 < 0.22 for split in ("val", "test"))
    named = by_name(art)
    for one, other in [
        ("man firefighter", "woman firefighter"),
        ("flag: Norway", "flag: Svalbard & Jan Mayen"),
        ("family: man, boy", "family: woman, girl"),
    ]:
        assert named[one].family == named[other].family
    assert named["dog face"].family != named["wolf"].family


def test_the_real_splits_stay_what_they_were_in_published_data_sets(art: Art) -> None:
    test = [emoji.name for emoji in art.emoji if emoji.split == "test"]
    assert len(test) == 390
    assert test[:4] == [
        "beaming face with smiling eyes",
        "grinning face with sweat",
        "melting face",
        "smiling face with heart-eyes",
    ]
