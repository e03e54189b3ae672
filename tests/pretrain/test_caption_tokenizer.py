"""CLIP's tokenizer with merges of our own."""

from itertools import permutations

from pretrain.caption_tokenizer import clip_tokenizer, learn_merges

CAPTIONS = ["A red cap, it's red", "a RED cup", "a red capé"]


def test_a_word_that_is_often_seen_is_one_token() -> None:
    tokenizer = clip_tokenizer(learn_merges(CAPTIONS, 100), length=16)
    assert tokenizer.tokenize("red cap, a cup") == [
        "red</w>",
        "cap</w>",
        ",</w>",
        "a</w>",
        "cup</w>",
    ]
    assert tokenizer.decode(tokenizer("red cups 12 ÿ!").input_ids[1:-1]) == "red cups 1 2 ÿ !"


def test_the_commonest_pair_comes_first_and_of_equal_ones_the_first_of_the_alphabet() -> None:
    assert learn_merges(["red red cap"], 10) == [
        ("e", "d</w>"),
        ("r", "ed</w>"),
        ("a", "p</w>"),
        ("c", "ap</w>"),
    ]
    assert learn_merges(["red red cap"], 1) == [("e", "d</w>")]
    assert len({tuple(learn_merges(order, 9)) for order in permutations(CAPTIONS)}) == 1


def test_two_ways_to_one_symbol_are_one_token() -> None:
    tokenizer = clip_tokenizer([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], length=8)
    assert sorted(tokenizer.get_vocab().values()) == list(range(512 + 3 + 2))


def test_without_merges_a_caption_is_its_bytes_cut_or_padded() -> None:
    tokenizer = clip_tokenizer((), length=8)
    padded = tokenizer(["hi", "a long caption"], padding="max_length", truncation=True).input_ids
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [len(ids) for ids in padded] == [8, 8]
    assert padded[0][0] == start
    assert padded[0][3:] == [end] * 5
    assert padded[1][-1] == end
