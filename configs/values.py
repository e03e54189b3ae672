"""The kinds of values that settings have, and what every section of a run file does."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field

PositiveInt = Annotated[int, Field(gt=0, le=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[int, Field(gt=0, le=2**20)]
"""Of what a machine holds or runs at once."""
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def without_credentials(url: str) -> str:
    """Settings are stored beside every checkpoint, so they may hold no secret."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "holds credentials before an '@'; take them out and set the AWS_* variables instead"
        )
    return url


def plain_endpoint(url: str) -> str:
    """An endpoint is told in messages, so it holds nothing but a place. Its value is not shown."""
    if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", url):
        raise ValueError(
            "must be http://HOST:PORT or https://HOST, without a query; the AWS_* variables hold "
            "the credentials"
        )
    return url


def matching(pattern: str, rule: str) -> AfterValidator:
    """Text of a form that a person is told in words, not as a pattern."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{rule}; got {text!r}")
        return text

    return AfterValidator(check)


Name = Annotated[
    str,
    matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]*",
        "must be letters, digits, dots, dashes and underscores, and begin with a letter or digit, "
        "because it names a folder",
    ),
]
SourceName = Annotated[
    str,
    matching(
        r"[A-Za-z0-9_-]+",
        "must be letters, digits, dashes and underscores, because it stands in settings' paths",
    ),
]
Sha256 = Annotated[
    str,
    matching(
        r"[0-9a-f]{64}",
        "must be 64 hexadecimal digits in lower case, as `sha256sum FILE` prints them",
    ),
]
Endpoint = Annotated[str, AfterValidator(without_credentials), AfterValidator(plain_endpoint)]
Url = Annotated[
    str,
    AfterValidator(without_credentials),
    matching(
        r"s3://[^/]+/.+|file:///.+|[^:]+",
        "must be s3://BUCKET/PREFIX, a local path or file:///PATH",
    ),
]


def check_rising(name: str, values: Sequence[float]) -> None:
    for before, after in pairwise(values):
        if after <= before:
            raise ValueError(f"{name} must rise, got {after:g} after {before:g}")


def kind_or(default: str) -> Discriminator:
    """Tells the sections of a union apart by `kind`, which run files may leave out."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", "")

    return Discriminator(kind_of)


class Section(BaseModel):
    """A part of the schema: unknown keys refused, no coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
