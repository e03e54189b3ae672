"""What an emoji is labelled with: rules over its name, its place in Unicode's list, its skin tone.

Every attribute here holds for at least 1 % of the images. Colours have none: names say "red" only
where it tells two emoji apart (a red heart), and not of a strawberry.
"""

import re
from dataclasses import dataclass
from typing import Final

from data_pipelines.emoji_art import Emoji, Version


@dataclass(frozen=True, slots=True)
class Rule:
    """An attribute that is 1 where everything holds that is given.

    `kind` is searched in "category/subcategory", `words` are whole words of the name (both regular
    expressions), and `tones` must contain every skin tone that is drawn.
    """

    name: str
    kind: str = ""
    words: str = ""
    tones: frozenset[int] | None = None

    def holds(self, emoji: Emoji, version: Version) -> bool:
        kind = f"{emoji.category}/{emoji.subcategory}"
        words = rf"\b({self.words})\b" if self.words else ""
        toned = self.tones is None or (bool(version.tones) and self.tones.issuperset(version.tones))
        return bool(re.search(self.kind, kind) and re.search(words, version.name)) and toned


RULES: Final = (
    Rule("symbol", kind="^symbols/"),
    Rule("flag", kind="flag$"),
    Rule("button", kind="^symbols/", words="button"),
    Rule("geometric", kind="/geometric$"),
    Rule("clock", kind="/time$"),
    Rule("person", kind="/(person|family)"),
    Rule("hand", kind="/hand"),
    Rule("face", kind="/(face-|cat-face|monkey-face)"),
    Rule("animal", kind="/animal-"),
    Rule("mammal", kind="/animal-mammal$"),
    Rule("bird", kind="/animal-bird$"),
    Rule("plant", kind="/plant-"),
    Rule("food", kind="/(food-|drink$)"),
    Rule("transport", kind="/transport-(ground|water|air)$"),
    Rule("building", kind="/place-(building|religious)$"),
    Rule("sky", kind="/sky-weather$"),
    Rule("clothing", kind="/clothing$"),
    Rule("heart", words="hearts?"),
    Rule("at_work", kind="/person-role$"),
    Rule("at_sport", kind="/person-sport$"),
    Rule("several_people", kind="/family$"),
    Rule("man", kind="^people-body/", words="man|men|boy|boys|prince"),
    Rule("woman", kind="^people-body/", words="woman|women|girl|girls|princess"),
    Rule("light_skin", tones=frozenset({1, 2})),
    Rule("dark_skin", tones=frozenset({4, 5})),
    Rule("smiling", kind="/(face-|cat-face)", words=r"smiling|smile|grinning|beaming|joy|laughing"),
    Rule("sad_or_worried", kind="/face-concerned$"),
)

_MIRRORS_WELL: Final = re.compile("^(smileys-emotion|people-body|animals-nature|food-drink)$")
_SAYS_A_SIDE: Final = re.compile(r"\b(left|right|rightwards|leftwards)\b")


def attributes_of(emoji: Emoji, version: Version) -> dict[str, int]:
    """Attribute name -> 0 or 1, in the order of RULES."""
    return {rule.name: int(rule.holds(emoji, version)) for rule in RULES}


def may_be_mirrored(emoji: Emoji) -> bool:
    """Whether the mirror image is as true: a clock, a flag or a letter would become another one."""
    return bool(_MIRRORS_WELL.match(emoji.category)) and not _SAYS_A_SIDE.search(emoji.name)
