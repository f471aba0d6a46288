"""Where a long document may be cut so that the ids of its pieces, one after another, are the ids of the whole."""

import re
from collections.abc import Callable, Iterator
from itertools import islice

PIECE_CHARACTERS = 2**20
"""A longer document is encoded in pieces: an encoding takes 100 times its text."""
_WINDOW = 256
_TRIES = 8
_SPACE = re.compile(r"(?<=\S) (?=\S)")
_LINE = re.compile(r"(?<=\n)(?=\S)")


def split_text(text: str, encode: Callable[[str], list[int]], limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut `text` into pieces of about `limit` characters, before a space if possible.

    A tokenizer may put a space in front of what it encodes (as SentencePiece does); then the space of the text itself
    is left out of the piece. Each cut is tried on the characters around it; where none is right, the rest stays whole.
    """
    begin = 0
    while len(text) - begin > limit:
        end, following = _cut(text, begin, limit, encode)
        yield text[begin:end]
        begin = following
    if begin < len(text) or not text:
        yield text[begin:]


def _cut(text: str, begin: int, limit: int, encode: Callable[[str], list[int]]) -> tuple[int, int]:
    """Where a piece ends, and where the next one begins."""
    for end in _candidates(text, begin, begin + limit):
        before, after = text[max(begin, end - _WINDOW) : end], text[end : end + _WINDOW]
        whole, first = encode(before + after), encode(before)
        for skipped in (0, 1) if after[0] == " " else (0,):
            if whole == first + encode(after[skipped:]):
                return end, end + skipped
    return len(text), len(text)


def _candidates(text: str, begin: int, end: int) -> Iterator[int]:
    near = max(begin + 1, end - 2**16)
    for pattern in (_SPACE, _LINE):
        yield from [match.start() for match in pattern.finditer(text, near, end + 1)][: -_TRIES - 1 : -1]
    yield from range(end, max(begin, end - _TRIES), -1)
    yield from (match.start() for match in islice(_SPACE.finditer(text, end), _TRIES))
