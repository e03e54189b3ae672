"""What the built-in avatars can look like, and what each look is called.

The art is the DiceBear style "Voxel Art" by DiceBear (https://www.dicebear.com), CC0 1.0
(https://creativecommons.org/publicdomain/zero/1.0/). It was chosen by looking at eleven face styles
at 32 px: its eyes, mouth and glasses stay several pixels large, every value has a name, and flat
colours are easy to learn. Values that cannot be told apart at 32 px (noses, blush, eyebrows under a
fringe) are held fixed, and the palette sets the dark mouth off from every skin and beard (faintest,
by 20 of 255 levels, in a small face's full brown beard: one face in fifty).

A ``Face`` is a choice for every *feature* ("mouth", "hair", "side" ...). This module owns the table
of features and weights, the labels as rules over features, and the two translations: from a face to
DiceBear's options, and from the options that DiceBear says it used back to a face.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Granularity = Literal["coarse", "middle", "fine"]
Face = dict[str, str]

STYLE: Final = "voxel-art"

# Feature -> value -> weight. A value called "none" means that the part is not drawn.
WEIGHTS: Final[dict[str, dict[str, int]]] = {
    "tone": {"light": 60, "dark": 40},
    "temperature": {"warm": 50, "cool": 50},
    "size": {"small": 50, "large": 50},
    "side": {"left": 50, "right": 50},
    "height": {"high": 50, "low": 50},
    "flip": {"none": 60, "horizontal": 40},
    "skin": {"pale": 30, "tan": 30, "brown": 20, "deep": 20},
    "hair": {"black": 22, "brown": 22, "blond": 24, "red": 16, "grey": 8, "blue": 8},
    "top": {
        "none": 9,
        "short": 8,
        "bowl": 5,
        "sideSwept": 6,
        "curly": 7,
        "mohawk": 4,
        "afro": 5,
        "buns": 4,
        "bob": 6,
        "longStraight": 9,
        "partedLong": 10,
        "twinTails": 4,
        "cap": 10,
        "beanie": 7,
        "animalEars": 6,
    },
    "cloth": {"blue": 20, "white": 20, "pink": 20},
    "shirt": {"red": 20, "yellow": 20, "green": 20, "blue": 20, "grey": 20},
    "outfit": {"plain": 65, "jacket": 35},
    "beard": {"none": 68, "full": 16, "mustache": 16},
    "mouth": {"wideSmile": 26, "laugh": 20, "frown": 20, "flat": 16, "ooh": 18},
    "eyes": {"open": 52, "side": 20, "closed": 28},
    "glasses": {"none": 60, "square": 20, "round": 6, "shades": 14},
}

_COLOURS: Final = {
    "skin": {"pale": "#f5d0b0", "tan": "#dda878", "brown": "#a3683c", "deep": "#754626"},
    "hair": {
        "black": "#464152",
        "brown": "#4f2f1c",
        "blond": "#f0cf65",
        "red": "#cf4a22",
        "grey": "#d9dbe3",
        "blue": "#3f6fd8",
    },
    "cloth": {"blue": "#5577c0", "white": "#f2f2f2", "pink": "#d9588c"},
    "shirt": {
        "red": "#e03131",
        "yellow": "#fab005",
        "green": "#2fa84f",
        "blue": "#2f6fe6",
        "grey": "#5b6169",
    },
}

# Ranges leave a gap in the middle, so that "large" or "left" is a difference of a pixel or more at
# 32 px and not a threshold somewhere in a continuum.
_SCALE: Final = {"small": (1.20, 1.32), "large": (1.44, 1.56)}
_X_PERCENT: Final = {"left": (-9.0, -3.0), "right": (3.0, 9.0)}
_Y_PERCENT: Final = {"high": (4.0, 8.0), "low": (13.0, 17.0)}
_HUE_DEGREES: Final = {"warm": (0.0, 70.0), "cool": (160.0, 270.0)}
_SATURATION_VALUE: Final = {"light": (0.35, 0.95), "dark": (0.55, 0.38)}

_ALWAYS_DRAWN: Final = ("outfit", "eyes", "mouth")
_MAY_BE_NONE: Final = ("top", "beard", "glasses")
# The jacket differs from every other colour because the style forbids it to equal hair or shoes:
# otherwise changing one of them could change the jacket too.
_HELD_FIXED: Final = {
    "animationVariant": "none",
    "cheeksProbability": 0,
    "noseVariant": "block",
    "eyebrowsVariant": "flat",
    "eyebrowsProbability": 100,
    "jacketColor": "#343a40",
    "pantsColor": "#2f4160",
    "shoesColor": "#343a3f",
}

_HATS: Final = frozenset({"cap", "beanie", "animalEars"})
_LONG: Final = frozenset({"longStraight", "partedLong", "twinTails", "bob"})
_HAIRCUTS: Final = frozenset(WEIGHTS["top"]) - _HATS - {"none"}
_SEE_THROUGH: Final = frozenset({"none", "square", "round"})


@dataclass(frozen=True, slots=True)
class Attribute:
    """One binary label: 1 when every feature in ``rule`` has one of the values listed there.

    The first feature is the attribute's own; the others say when it can be seen at all (blond hair
    needs hair, closed eyes need glasses that one can see through).
    """

    name: str
    granularity: Granularity
    rule: tuple[tuple[str, frozenset[str]], ...]

    def holds(self, face: Mapping[str, str]) -> bool:
        """Whether the label of ``face`` is 1."""
        return all(face[feature] in values for feature, values in self.rule)


def _attribute(name: str, granularity: Granularity, **rule: Collection[str]) -> Attribute:
    return Attribute(name, granularity, tuple((k, frozenset(v)) for k, v in rule.items()))


ATTRIBUTES: Final[tuple[Attribute, ...]] = (
    _attribute("dark_background", "coarse", tone={"dark"}),
    _attribute("warm_background", "coarse", temperature={"warm"}),
    _attribute("large_face", "coarse", size={"large"}),
    _attribute("face_on_left", "coarse", side={"left"}),
    _attribute("face_low", "coarse", height={"low"}),
    _attribute("mirrored", "coarse", flip={"horizontal"}),
    _attribute("dark_skin", "middle", skin={"brown", "deep"}),
    _attribute("hat", "middle", top=_HATS),
    _attribute("bald", "middle", top={"none"}),
    _attribute("long_hair", "middle", top=_LONG),
    _attribute("dark_hair", "middle", hair={"black", "brown"}, top=_HAIRCUTS),
    _attribute("blond_hair", "middle", hair={"blond"}, top=_HAIRCUTS),
    _attribute("red_hair", "middle", hair={"red"}, top=_HAIRCUTS),
    _attribute("warm_clothes", "middle", shirt={"red", "yellow"}),
    _attribute("jacket", "middle", outfit={"jacket"}),
    _attribute("glasses", "fine", glasses={"square", "round", "shades"}),
    _attribute("dark_glasses", "fine", glasses={"shades"}),
    _attribute("eyes_closed", "fine", eyes={"closed"}, glasses=_SEE_THROUGH),
    _attribute("looking_sideways", "fine", eyes={"side"}, glasses=_SEE_THROUGH),
    _attribute("smiling", "fine", mouth={"wideSmile", "laugh"}),
    _attribute("frowning", "fine", mouth={"frown"}),
    _attribute("mouth_open", "fine", mouth={"laugh", "ooh"}),
    _attribute("beard", "fine", beard={"full"}),
    _attribute("moustache", "fine", beard={"mustache"}),
)


def labels_of(face: Mapping[str, str]) -> dict[str, int]:
    """Attribute name -> 0 or 1, in the order of ATTRIBUTES."""
    return {attribute.name: int(attribute.holds(face)) for attribute in ATTRIBUTES}


def options_of(
    face: Mapping[str, str], seed: str, uniform: Callable[[str], float]
) -> dict[str, Any]:
    """DiceBear options that leave nothing for DiceBear to choose.

    ``uniform(name)`` gives the number in [0, 1) that places an exact value, such as the scale,
    inside the range that the face's feature allows.
    """

    def between(name: str, bounds: tuple[float, float]) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform(f"{name}.exact")

    hue = between("hue", _HUE_DEGREES[face["temperature"]])
    options: dict[str, Any] = {
        "seed": seed,
        "backgroundColor": _hex(hue, *_SATURATION_VALUE[face["tone"]]),
        "scale": round(between("scale", _SCALE[face["size"]]), 4),
        "translateX": round(between("x", _X_PERCENT[face["side"]]), 3),
        "translateY": round(between("y", _Y_PERCENT[face["height"]]), 3),
        "flip": face["flip"],
        "skinColor": _COLOURS["skin"][face["skin"]],
        "hairColor": _COLOURS["hair"][face["hair"]],
        "hatColor": _COLOURS["cloth"][face["cloth"]],
        "shirtColor": _COLOURS["shirt"][face["shirt"]],
        **_HELD_FIXED,
    }
    options |= {f"{part}Variant": face[part] for part in _ALWAYS_DRAWN}
    for part in _MAY_BE_NONE:
        options[f"{part}Probability"] = 0 if face[part] == "none" else 100
        if face[part] != "none":
            options[f"{part}Variant"] = face[part]
    return options


def face_of(used: Mapping[str, Any]) -> Face:
    """The face that was drawn, from the options that DiceBear reports it used.

    The colour of a hat's cloth has no label and is left out.
    """
    hue, value = background_hue_and_value(used)
    tones = {tone: (v, v) for tone, (_, v) in _SATURATION_VALUE.items()}
    face = {
        "tone": _closest(value, tones),
        "temperature": _closest(hue, _HUE_DEGREES),
        "size": _closest(used["scale"], _SCALE),
        "side": _closest(used["translateX"], _X_PERCENT),
        "height": _closest(used["translateY"], _Y_PERCENT),
        "flip": used["flip"],
    }
    for feature in ("skin", "hair", "shirt"):
        names = {colour: name for name, colour in _COLOURS[feature].items()}
        face[feature] = names[used[f"{feature}Color"][0]]
    for part in (*_ALWAYS_DRAWN, *_MAY_BE_NONE):
        face[part] = used.get(f"{part}Variant", "none")
    return face


def background_hue_and_value(used: Mapping[str, Any]) -> tuple[float, float]:
    """Hue in degrees and HSV value in 0..1 of the background that was drawn."""
    red, green, blue = bytes.fromhex(used["backgroundColor"][0][1:])
    hue, _, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    return hue * 360, value


def caption_of(face: Mapping[str, str]) -> str:
    """One plain sentence that names what is visible, without a word on position or mirroring."""
    mood = {"wideSmile": "smiling ", "laugh": "laughing ", "frown": "frowning "}
    *most, last = _words(face)
    listed = f"{', '.join(most)} and {last}" if most else last
    outfit = "a jacket over a" if face["outfit"] == "jacket" else "a"
    return (
        f"A {face['size']} {mood.get(face['mouth'], '')}face with {face['skin']} skin, {listed}, "
        f"wearing {outfit} {face['shirt']} shirt, on a {face['tone']} "
        f"{face['temperature']} background."
    )


def _words(face: Mapping[str, str]) -> list[str]:
    hair = f"{'long' if face['top'] in _LONG else 'short'} {face['hair']} hair"
    tops = {"cap": "a cap", "beanie": "a beanie", "animalEars": "a hat with ears"}
    words = [(tops | {"none": "a bald head"}).get(face["top"], hair)]
    if face["beard"] != "none":
        words.append("a beard" if face["beard"] == "full" else "a moustache")
    if face["glasses"] != "none":
        words.append("dark glasses" if face["glasses"] == "shades" else "glasses")
    if face["glasses"] != "shades" and face["eyes"] != "open":
        words.append("closed eyes" if face["eyes"] == "closed" else "eyes looking sideways")
    return words


def _hex(hue_degrees: float, saturation: float, value: float) -> str:
    rgb = colorsys.hsv_to_rgb(hue_degrees / 360, saturation, value)
    return "#" + "".join(f"{round(channel * 255):02x}" for channel in rgb)


def _closest(value: float, ranges: Mapping[str, tuple[float, float]]) -> str:
    """The range that ``value`` lies in or, after rounding to 8-bit colour, beside."""
    return min(ranges, key=lambda name: abs(value - sum(ranges[name]) / 2))
