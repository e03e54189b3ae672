"""A run file and `key.path=value` overrides -> one frozen value, or one error.

The error lists every problem at once, each with its dotted path, the value seen and what is wrong.
YAML is read by version 1.2's rules: `1e-4` is a number, `on` is a string, a duplicate key is an
error.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from configs.preprocess import PreprocessConfig
from configs.schema import RunConfig

Config = TypeVar("Config", RunConfig, PreprocessConfig)


class ConfigError(ValueError):
    """A run file or an override is wrong; the message lists every problem."""

    def __init__(self, source: str, problems: Sequence[str], what: str = "run") -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{source} is not a valid {what}: {count}{lines}")


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2 core schema; duplicate keys refused, and aliases, which a few lines can multiply."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(
                None, None, "aliases (*name) are not taken; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_CORE_SCHEMA = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern, _first in _CORE_SCHEMA:
    for _side in (_Yaml12Loader, _QuotingDumper):
        _side.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(_pattern), [c.strip("\0") for c in _first]
        )


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """YAML 1.1 reads 010 as eight and 1_000 as a thousand; 1.2 reads decimal digits only."""
    return int(loader.construct_scalar(node))


def _floating(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", loader.construct_scalar(node).lower()))


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:float", _floating)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides in order, validate.

    Args:
        path: a YAML file.
        overrides: `key.path=value`, the value in YAML syntax (`train.total_images=1000`).

    Raises:
        ConfigError: with every problem found.
    """
    return parse_run(_text_of(path), overrides, source=str(path))


def load_preprocess(path: Path, overrides: Sequence[str] = ()) -> PreprocessConfig:
    """The same for a file of preprocessing."""
    return _parse(PreprocessConfig, _text_of(path), overrides, source=str(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error


def parse_run(text: str, overrides: Sequence[str] = (), *, source: str = "<text>") -> RunConfig:
    """The same for YAML text; `source` names it in errors."""
    return _parse(RunConfig, text, overrides, source=source)


def _parse(kind: type[Config], text: str, overrides: Sequence[str], *, source: str) -> Config:
    data = _parse_mapping(text, source)
    problems = [problem for item in overrides if (problem := _apply_override(data, item))]
    config = None
    try:
        config = kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems += problems_of(error, kind)
    except (TypeError, ValueError) as error:
        problems.append(f"holds something JSON cannot: {error}")
    if problems or config is None:
        what = "run" if kind is RunConfig else "configuration of preprocessing"
        raise ConfigError(source, problems, what)
    return config


def dump_run(config: RunConfig) -> str:
    """The resolved run as YAML; `parse_run` reads it back to an equal value."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_QuotingDumper, sort_keys=False)


def digest(config: RunConfig) -> str:
    """Of a run: equal digests mean equal runs."""
    return digest_of_json(config.model_dump(mode="json"))


def digest_of_json(value: Mapping[str, Any]) -> str:
    """SHA-256 over its JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a digest of itself, as `sha256`, so that an edit or a flipped bit is seen."""
    return {**value, "sha256": digest_of_json(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        ValueError: it has no digest, or another one: it was changed.
    """
    rest = dict(value)
    if rest.pop("sha256", None) != digest_of_json(rest):
        raise ValueError("its SHA-256 is not the one that it names: it was changed")
    return rest


def _parse_mapping(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506 (a SafeLoader subclass)
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ConfigError(source, [f"is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(data, dict):
        raise ConfigError(source, [f"must be a mapping of sections, got {type(data).__name__}"])
    return data


def _apply_override(data: dict[str, Any], item: str) -> str | None:
    """Set one value in place; returns the problem, if there is one."""
    path, separator, text = item.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        return f"override {item!r} must look like key.path=value"
    try:
        value = yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, KeyError) as error:
        return f"override {item!r} has a value that is not YAML: {' '.join(str(error).split())}"
    section = data
    for depth, key in enumerate(keys[:-1], start=1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            return f"override {item!r}: {'.'.join(keys[:depth])} is a value, not a section"
    section[keys[-1]] = value
    return None


def problems_of(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line per problem: dotted path, value seen, rule."""
    return [_describe(details, kind) for details in error.errors()]


def _describe(details: ErrorDetails, kind: type[BaseModel]) -> str:
    """`dotted.path = value: what is wrong`."""
    dotted = ".".join(str(part) for part in _without_tags(details["loc"])) or "run"
    match details["type"]:
        case "extra_forbidden":
            return f"{dotted}: unknown key{_nearest(details['loc'], kind)}"
        case "union_tag_invalid":
            context = details.get("ctx", {})
            return f"{dotted}.kind = {context['tag']!r}: must be one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{dotted}.kind: is required but missing"
        case "missing":
            needed = " ".join(f"{path}=..." for path in _required_below(details["loc"], kind))
            return f"{dotted}: is required but missing; give {needed}"
        case "string_type" if isinstance(details["input"], int | float):
            return (
                f"{dotted} = {details['input']!r}: must be text, and YAML reads this as "
                f"{'a truth value' if isinstance(details['input'], bool) else 'a number'}; quote it"
            )
        case "value_error":
            return f"{dotted}: {details['msg'].removeprefix('Value error, ')}"
        case _:
            return f"{dotted} = {details['input']!r}: {details['msg']}"


def _without_tags(location: tuple[int | str, ...]) -> list[int | str]:
    """`location` without the branch's name that pydantic puts behind each union."""
    unions = ("task", "partition", "encoder", "backbone")
    return [part for before, part in pairwise(("", *location)) if before not in unions]


def _nearest(location: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    names = list(_field_names(kind, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys are {sorted(names)}"


def _required_below(location: tuple[int | str, ...], kind: type[BaseModel]) -> list[str]:
    """Dotted paths of what a missing value, or a missing section, cannot do without."""
    dotted = ".".join(str(part) for part in _without_tags(location))
    if isinstance(location[-1], int):  # of a list that is too short
        return [dotted]
    [parent] = _sections_at(kind, location[:-1])
    sections = _sections_in(parent.model_fields[str(location[-1])].annotation)
    match [section for section in sections if not _must_be_told(section)]:
        case [section]:
            needed = [name for name, field in section.model_fields.items() if field.is_required()]
            return [f"{dotted}.{name}" for name in needed] or [dotted]
        case _:
            return [dotted]


def _field_names(model: type[BaseModel], location: Iterable[int | str]) -> Iterator[str]:
    """Field names of the section at `location`."""
    return (name for section in _sections_at(model, location) for name in section.model_fields)


def _sections_at(model: type[BaseModel], location: Iterable[int | str]) -> list[type[BaseModel]]:
    """The section at `location`, where union tags choose the branch; every branch without one."""
    sections = [model]
    for part in location:
        deeper = [
            section
            for parent in sections
            if part in parent.model_fields
            for section in _sections_in(parent.model_fields[str(part)].annotation)
        ]
        sections = deeper or [s for s in sections if _tag(s) == part] or sections
    return sections


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _must_be_told(section: type[BaseModel]) -> bool:
    """Whether only its `kind` tells it from others."""
    kind = section.model_fields.get("kind")
    return kind is not None and kind.is_required()


def _tag(section: type[BaseModel]) -> str | None:
    kind = section.model_fields.get("kind")
    return str(get_args(kind.annotation)[0]) if kind else None
