"""CLIP's tokenizer with a vocabulary of our own: bytes, and what is often seen in captions.

Byte-pair encoding, and the symbols that it begins with, are CLIP's. The merges are learnt here
because the trainer of `tokenizers` settles ties by chance, and a model is to be made twice alike.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Merge = tuple[str, str]
END = "</w>"
"""Ends a symbol that ends a word."""
MOST_WORDS = 4096
"""Only the commonest words are learnt from."""


def clip_tokenizer(merges: Sequence[Merge], *, length: int) -> Any:
    """A CLIPTokenizer of the 256 bytes, each also as the end of a word, and of these merges.

    Args:
        length: tokens of a caption, with those of its start and end; it is cut or padded to them.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode().values()
    symbols = [*letters, *(letter + END for letter in letters), *("".join(m) for m in merges)]
    symbols = dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"])  # two ways to one
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    of: Any = CLIPTokenizer  # its annotation does not know that merges are pairs
    return of(vocabulary, list(merges), model_max_length=length)


def learn_merges(captions: Iterable[str], most: int) -> list[Merge]:
    """Up to `most` merges, the commonest pair first; of equal ones the first of the alphabet."""
    cut = clip_tokenizer((), length=2).backend_tokenizer
    counts = Counter(word for caption in captions for word in _words(caption, cut))
    spelt = {word: (*word[:-1], word[-1] + END) for word, _ in _commonest(counts, MOST_WORDS)}
    merges: list[Merge] = []
    while len(merges) < most:
        pairs: Counter[Merge] = Counter()
        for word, symbols in spelt.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(_commonest(pairs, 1)[0][0])
        spelt = {word: _merged(symbols, merges[-1]) for word, symbols in spelt.items()}
    return merges


def _words(caption: str, cut: Any) -> list[str]:
    """As CLIP's tokenizer cuts a caption, spelt in its letters for bytes."""
    normal = cut.normalizer.normalize_str(caption)
    return [word for word, _ in cut.pre_tokenizer.pre_tokenize_str(normal)]


def _commonest(counts: Counter[Any], most: int) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _merged(symbols: tuple[str, ...], merge: Merge) -> tuple[str, ...]:
    found: list[str] = []
    at = 0
    while at < len(symbols):
        step = 2 if symbols[at : at + 2] == merge else 1
        found.append("".join(symbols[at : at + step]))
        at += step
    return tuple(found)
