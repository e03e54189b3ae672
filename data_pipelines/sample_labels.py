"""Labels of a raw sample: what its json says that the image shows.

`attributes` are 0 or 1, `numeric` are numbers, `classes` are words; each by name, each optional.
`caption` is one text.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LABELS_EXTENSION = "json"


class LabelError(ValueError):
    """A sample does not say what it should be labelled with."""


def attributes_in(sample: Mapping[str, Any]) -> dict[str, int]:
    """Everything under `attributes`, 0 or 1 by name.

    Raises:
        LabelError: there is no json, no `attributes` in it, or another value.
    """
    return _values_in(sample, "attributes", "0 or 1", lambda value: value in (0, 1))


def numbers_in(sample: Mapping[str, Any]) -> dict[str, float]:
    """Everything under `numeric`, a finite number by name.

    Raises:
        LabelError: there is no json, no `numeric` in it, or another value.
    """
    return _values_in(sample, "numeric", "a finite number", _is_number)


def classes_in(sample: Mapping[str, Any]) -> dict[str, str]:
    """Everything under `classes`, a word by name.

    Raises:
        LabelError: there is no json, no `classes` in it, or another value.
    """
    return _values_in(sample, "classes", "text", lambda value: isinstance(value, str))


def caption_in(sample: Mapping[str, Any]) -> str:
    """The text under `caption`.

    Raises:
        LabelError: there is no json, no `caption` in it, or no text.
    """
    try:
        caption = json.loads(sample[LABELS_EXTENSION])["caption"]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{caption!r} is no text")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise LabelError(
            f"sample {sample['__key__']} of {sample['__url__']} has no caption "
            f"({type(error).__name__}: {error}); its json needs `caption`, a text"
        ) from error
    return caption


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _values_in(
    sample: Mapping[str, Any], field: str, kind: str, fits: Callable[[Any], bool]
) -> dict[str, Any]:
    try:
        values = dict(json.loads(sample[LABELS_EXTENSION])[field].items())
        if wrong := {name: value for name, value in values.items() if not fits(value)}:
            raise ValueError(f"{wrong} is not {kind}")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise LabelError(
            f"sample {sample['__key__']} of {sample['__url__']} has no labels "
            f"({type(error).__name__}: {error}); its json needs `{field}`, each {kind}"
        ) from error
    return values


def labels_in(sample: Mapping[str, Any], names: Sequence[str]) -> NDArray[np.int8]:
    """These of its attributes; (A,).

    Raises:
        LabelError: it lacks one of them.
    """
    attributes = attributes_in(sample)
    if missing := [name for name in names if name not in attributes]:
        raise LabelError(
            f"sample {sample['__key__']} of {sample['__url__']} has no attribute "
            f"{', '.join(missing)}; it has {', '.join(sorted(attributes))}"
        )
    return np.array([attributes[name] for name in names], np.int8)
