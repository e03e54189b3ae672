"""Labels of a raw sample: the binary attributes that its json holds."""

import json
from collections.abc import Mapping, Sequence
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
    try:
        attributes = dict(json.loads(sample[LABELS_EXTENSION])["attributes"].items())
        if wrong := {name: value for name, value in attributes.items() if value not in (0, 1)}:
            raise ValueError(f"{wrong} is neither 0 nor 1")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise LabelError(
            f"sample {sample['__key__']} of {sample['__url__']} has no labels "
            f"({type(error).__name__}: {error}); its json needs `attributes` of 0 and 1"
        ) from error
    return attributes


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
