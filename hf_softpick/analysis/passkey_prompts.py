"""Prompts of passkey retrieval: filler text of a given number of tokens with a number hidden at a given depth.

The task is that of Mohtashami and Jaggi (arXiv 2305.16300). Prompts are the same for the same tokenizer, length,
depth, sample and seed; the tokenizer is only read, never extended.
"""

import bisect
import itertools
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hf_softpick.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 5
INTRODUCTION = "Find the pass key in this text and remember it."
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "The pass key is {key}. Remember it."
QUESTION = "What is the pass key? The pass key is"


class Prompt(NamedTuple):
    """One prompt. ids: its tokens, BOS included where prompts begin with it. depth: where the key is, as asked."""

    text: str
    ids: list[int]
    key: str
    distractors: list[str]
    depth: float


class TooShort(ValueError):
    """Not even a prompt without filler has room for the answer."""


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, add_bos: bool) -> list[int]:
    """Token ids of `text`, after BOS if `add_bos`; never EOS or anything else that the tokenizer may add."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [tokenizer.bos_token_id, *ids] if add_bos else ids


def only_digits(answer: str) -> str:
    """The first number of a decoded answer; some tokenizers decode it with spaces between its digits."""
    found = re.search(r"\d+", re.sub(r"\s", "", answer))
    return found.group() if found else ""


def answer_tokens(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """How many new tokens hold any key: the most of 64 keys, and one more, which shows where the number ends.

    Raises:
        CheckpointError: the tokenizer cannot write digits, or knows ids that the model does not.
    """
    draw = random.Random(0)
    most = 0
    for _ in range(64):
        key = _key(draw)
        ids = tokenizer(f" {key}", add_special_tokens=False).input_ids
        if only_digits(tokenizer.decode(ids)) != key:
            raise CheckpointError(
                f"the tokenizer turns {key!r} into {tokenizer.decode(ids)!r}: it cannot write numbers, so the model "
                "cannot be asked for one."
            )
        most = max(most, len(ids))
    if (largest := max(tokenizer(f"{INTRODUCTION} {NEEDLE} {QUESTION} {' '.join(FILLER)}").input_ids)) >= vocab_size:
        raise CheckpointError(f"the tokenizer gives id {largest}, but the model has {vocab_size}. They do not match.")
    return most + 1


def build_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    add_bos: bool,
    length: int,
    depth: float,
    room: int,
    *,
    sample: int,
    distractors: int = 0,
    seed: int = 0,
) -> Prompt:
    """The longest prompt that leaves `room` of `length` tokens free; fewer than a word's tokens are wasted.

    Args:
        depth: 0 puts the key before the filler, 1 after it, otherwise at the nearest end of a sentence.
        sample: number of the prompt within its length and depth; key and filler differ.
        distractors: other keys that the text does not contain, drawn alike.

    Raises:
        TooShort: `length` has no room for introduction, key, question and answer.
    """
    draw = random.Random(f"{seed} {length} {depth} {sample}")
    keys: list[str] = []
    while len(keys) <= distractors:
        if (key := _key(draw)) not in keys:
            keys.append(key)
    start = draw.randrange(len(FILLER))

    def candidate(words: int) -> tuple[str, list[int]]:
        text = _text(words, start, depth, keys[0])
        return text, encode(tokenizer, text, add_bos)

    def size(words: int) -> int:
        return len(candidate(words)[1])

    if (shortest := size(0)) > length - room:
        raise TooShort(f"a prompt without filler has {shortest} tokens, and {room} are kept for the answer")
    least, most = 0, 64
    while size(most) <= length - room:
        least, most = most, 2 * most
    too_many = bisect.bisect_right(range(most), length - room, lo=least + 1, key=size)
    return Prompt(*candidate(too_many - 1), keys[0], keys[1:], depth)


def _key(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _text(words: int, start: int, depth: float, key: str) -> str:
    filler, ends = _filler(words, start)
    place = min(ends, key=lambda end: abs(end - depth * words))
    middle = [*filler[:place], NEEDLE.format(key=key), *filler[place:]]
    return f"{INTRODUCTION}\n{' '.join(middle)}\n{QUESTION}"


def _filler(words: int, start: int) -> tuple[Sequence[str], list[int]]:
    """The first `words` words of the sentences from number `start` on, and the places between sentences."""
    filler: list[str] = []
    ends = [0, words]
    sentences = itertools.islice(itertools.cycle(FILLER), start, None)
    while len(filler) < words:
        filler += next(sentences).split()
        ends.append(min(len(filler), words))
    return filler[:words], ends
