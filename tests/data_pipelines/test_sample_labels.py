"""Labels come from other people's json."""

import json
from typing import Any

import pytest

from data_pipelines.sample_labels import LabelError, attributes_in, caption_in, labels_in


def sample(value: Any) -> dict[str, Any]:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {"__key__": "k", "__url__": "u.tar", "json": text}


def test_labels_are_in_the_order_that_was_asked_for() -> None:
    found = labels_in(sample({"attributes": {"a": 1, "b": 0, "c": True}}), ("c", "b"))
    assert found.tolist() == [1, 0]
    assert found.dtype == "int8"


@pytest.mark.parametrize(
    "broken",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        {},
        {"attributes": None},
        {"attributes": [1]},
        {"attributes": {"a": 2}},
        {"attributes": {"a": "1"}},
        {"attributes": {"a": None}},
    ],
)
def test_what_is_no_label_is_refused_with_the_samples_name(broken: Any) -> None:
    with pytest.raises(LabelError, match=r"sample k of u\.tar has no labels"):
        attributes_in(sample(broken))


def test_a_sample_without_json_or_without_the_attribute_is_named() -> None:
    with pytest.raises(LabelError, match=r"sample k of u\.tar has no labels \(KeyError: 'json'"):
        labels_in({"__key__": "k", "__url__": "u.tar"}, ("a",))
    with pytest.raises(LabelError, match=r"has no attribute c; it has a, b"):
        labels_in(sample({"attributes": {"b": 1, "a": 1}}), ("a", "c"))


@pytest.mark.parametrize("broken", [b"{", b"\xff", [], {}, {"caption": None}, {"caption": " \n"}])
def test_what_is_no_caption_is_refused_with_the_samples_name(broken: Any) -> None:
    assert caption_in(sample({"caption": "a cat"})) == "a cat"
    with pytest.raises(LabelError, match=r"sample k of u\.tar has no caption"):
        caption_in(sample(broken))
    with pytest.raises(LabelError, match=r"has no caption \(KeyError: 'json'"):
        caption_in({"__key__": "k", "__url__": "u.tar"})
