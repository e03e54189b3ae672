"""One raw sample: what it becomes, or the one reason why it goes."""

import json
import math
from typing import Any

import numpy as np
import pytest
import simplejpeg

from configs.preprocess import FiltersConfig, PreprocessConfig
from data_pipelines.decoding import decode_whole
from data_pipelines.screening import Dropped, Kept, screen

CONFIG = PreprocessConfig(raw="raw", out="train", image_size_px=64)
LIMITS: dict[str, float] = {
    "min_similarity": 0.3,
    "min_aesthetic": 5,
    "max_punsafe": 0.2,
    "max_pwatermark": 0.5,
    "min_caption_characters": 6,
    "min_side_px": 100,
    "max_aspect": 2.0,
}
SCORES = {"similarity": 0.3, "AESTHETIC_SCORE": 5, "punsafe": 0.2, "pwatermark": 0.5}


def jpeg(width: int = 200, height: int = 100) -> bytes:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.kron(coarse, np.ones((10, 10, 1), np.uint8)), quality=90)


def sample(**changes: Any) -> dict[str, Any]:
    """One that keeps every rule of LIMITS exactly; a change to None takes a member away."""
    members = {"jpg": jpeg(), "txt": b" a cat ", "json": json.dumps(SCORES).encode()} | changes
    return {
        "__key__": "7",
        "__url__": "0.tar",
        **{name: data for name, data in members.items() if data is not None},
    }


def limited(**changes: float | None) -> PreprocessConfig:
    return CONFIG.model_copy(update={"filters": FiltersConfig(**(LIMITS | changes))})


def test_a_sample_that_stays_becomes_a_square_with_its_caption_and_all_that_was_known() -> None:
    verdict = screen(sample(txt=b"a cat!"), limited())
    assert isinstance(verdict, Kept)
    assert decode_whole(verdict.members["jpg"]).shape == (64, 64, 3)
    assert verdict.members["txt"] == b"a cat!"
    assert json.loads(verdict.members["json"]) == SCORES | {
        "caption": "a cat!",
        "raw": {"tar": "0.tar", "key": "7"},
        "width": 64,
        "height": 64,
        "original_width": 200,
        "original_height": 100,
    }


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("min_similarity", {"json": json.dumps(SCORES | {"similarity": 0.29}).encode()}),
        ("min_similarity", {"json": b"{}"}),
        ("min_similarity", {"json": None}),
        ("min_aesthetic", {"json": json.dumps(SCORES | {"AESTHETIC_SCORE": True}).encode()}),
        ("max_punsafe", {"json": json.dumps(SCORES | {"punsafe": 0.21}).encode()}),
        ("max_punsafe", {"json": json.dumps(SCORES | {"punsafe": math.nan}).encode()}),
        ("max_pwatermark", {"json": json.dumps(SCORES | {"pwatermark": 1}).encode()}),
        ("min_caption_characters", {}),  # five, without its blanks
        ("min_caption_characters", {"txt": None}),
        ("min_side_px", {"txt": b"a cat!", "jpg": jpeg(200, 90)}),
        ("max_aspect", {"txt": b"a cat!", "jpg": jpeg(210, 100)}),
    ],
)
def test_the_first_rule_that_is_broken_is_named(rule: str, change: dict[str, Any]) -> None:
    assert screen(sample(**change), limited()) == Dropped("filtered", rule)


@pytest.mark.parametrize(
    ("txt", "told", "caption"),
    [
        (b"beside", '"inside"', "beside"),
        (b"beside", "null", "beside"),
        (None, '"inside"', "inside"),
        (None, "7", None),
    ],
)
def test_there_is_one_caption_and_the_text_beside_the_image_comes_first(
    txt: bytes | None, told: str, caption: str | None
) -> None:
    verdict = screen(sample(txt=txt, json=f'{{"caption": {told}}}'.encode()), CONFIG)
    assert isinstance(verdict, Kept)
    assert json.loads(verdict.members["json"]).get("caption") == caption
    assert verdict.members.get("txt") == (caption.encode() if caption else None)


@pytest.mark.parametrize("number", ["NaN", "1" + 400 * "0", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_in_json_is_no_score_and_becomes_null(number: str) -> None:
    odd = sample(json=f'{{"similarity": {number}}}'.encode())
    assert screen(odd, limited()) == Dropped("filtered", "min_similarity")
    verdict = screen(odd, CONFIG)
    assert isinstance(verdict, Kept)
    kept = json.loads(verdict.members["json"])["similarity"]
    assert kept is None or kept == int(number)


def test_a_rule_that_is_null_is_not_asked() -> None:
    bare = sample(json=None, txt=None, jpg=jpeg(400, 60))
    assert isinstance(screen(bare, CONFIG), Kept)


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("no image (jpg, jpeg, png, webp)", {"jpg": None}),
        ("undecodable image", {"jpg": b"<html>"}),
        ("undecodable image", {"jpg": jpeg()[:-200]}),
        ("undecodable image", {"jpg": b""}),
        ("too many pixels", {"jpg": jpeg()[:20]}),
        ("unreadable json", {"json": b"{"}),
        ("unreadable json", {"json": b"[]"}),
        ("unreadable json", {"json": b"[" * 100_000}),
        ("unreadable caption", {"txt": b"\xff"}),
        ("unreadable caption", {"txt": None, "json": rb'{"caption": "\ud800"}'}),
    ],
)
def test_a_fault_is_named_by_its_kind(why: str, change: dict[str, Any]) -> None:
    if why == "too many pixels":
        claimed = bytearray(jpeg())
        at = claimed.index(b"\xff\xc0")
        claimed[at + 5 : at + 9] = (20_000).to_bytes(2, "big") * 2
        change = {"jpg": bytes(claimed)}
    assert screen(sample(**change), CONFIG) == Dropped("failed", why)


def test_a_jpeg_of_the_right_size_is_kept_as_it_came() -> None:
    small = jpeg(60, 60)
    config = CONFIG.model_copy(update={"image_size_px": 60})
    verdict = screen(sample(jpg=small), config)
    assert isinstance(verdict, Kept)
    assert verdict.members["jpg"] == small
