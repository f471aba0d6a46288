"""Documents of the offline tasks: from files in this folder or of the running Python, never from the Hub.

lm-eval calls each function with the metadata of its task; what a function does not know, it ignores.
"""

import json
import random
import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datasets import Dataset

FOLDER = Path(__file__).parent

# Of data.validation = 0.005: training counts tokens, which are not spread as bytes are.
HELDOUT_SHARE = 0.003
# hf_softpick.data.settings.DataSettings.seed
DATA_SEED = 42

DIGITS = 5
PASSKEY_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PASSKEY_SAMPLES = 4
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


def heldout(text: str | None = None, share: float = HELDOUT_SHARE, **_: Any) -> dict[str, Dataset]:
    """Documents of the file `text`, or the standard library's that the default recipe holds out: {"text"}."""
    from hf_softpick.data.settings import SourceSettings
    from hf_softpick.data.sources import open_sources

    (source,) = open_sources([SourceSettings(path=text or "stdlib")])
    records = (record.text for shard in source.shards for record in shard.read())
    documents = [document for document in records if document and not document.isspace()]
    return _test({"text": document} for document in (documents if text else first_by_hash(documents, share)))


def first_by_hash(documents: Iterable[str], share: float) -> list[str]:
    """Distinct documents in the order in which training holds them out, up to `share` of all bytes; at least one.

    The order is that of hf_softpick.data.packing.hold_out with the default seed: a prefix of it is held out whatever
    the tokenizer.
    """
    contents = [document.encode() for document in documents]
    limit = share * sum(map(len, contents))
    key = str(DATA_SEED).encode()
    hashed = {int.from_bytes(blake2b(one, digest_size=8, key=key).digest(), "little"): one for one in contents}
    chosen, size = [], 0
    for number in sorted(hashed):
        size += len(hashed[number])
        if chosen and size > limit:
            break
        chosen.append(hashed[number].decode())
    return chosen


def prose(**_: Any) -> dict[str, Dataset]:
    """Pieces of prose: {"text"}."""
    return _test(_lines("prose.jsonl"))


def cloze(**_: Any) -> dict[str, Dataset]:
    """English sentences: {"context", "choices", "gold"}."""
    return _choices("cloze.jsonl")


def code(**_: Any) -> dict[str, Dataset]:
    """Python idioms: {"context", "choices", "gold"}."""
    return _choices("code.jsonl")


def passkey(words: int = 40, **_: Any) -> dict[str, Dataset]:
    """Prompts with about `words` words of filler: {"prompt", "key", "depth"}; always the same."""
    draw = random.Random(words)
    documents = []
    for depth in PASSKEY_DEPTHS:
        for _sample in range(PASSKEY_SAMPLES):
            key = "".join(draw.choice("123456789") for _ in range(DIGITS))
            sentences, start = [], draw.randrange(len(FILLER))
            while sum(map(len, map(str.split, sentences))) < words:
                sentences.append(FILLER[(start + len(sentences)) % len(FILLER)])
            sentences.insert(round(depth * len(sentences)), f"The pass key is {key}. Remember it.")
            prompt = f"{' '.join(sentences)}\nWhat is the pass key? The pass key is"
            documents.append({"prompt": prompt, "key": key, "depth": depth})
    return _test(documents)


def first_number(answers: list[list[str]], _documents: Any) -> list[list[str]]:
    """A filter of lm-eval: the digits that each answer begins with, white space left out."""
    return [[re.match(r"\d*", re.sub(r"\s", "", answer)).group() for answer in row] for row in answers]


def _choices(name: str) -> dict[str, Dataset]:
    """Lines {"context", "right", "wrong"} with the right choice moved to a place that repeats every four lines."""
    documents = []
    for index, line in enumerate(_lines(name)):
        gold = index % (len(line["wrong"]) + 1)
        choices = [*line["wrong"][:gold], line["right"], *line["wrong"][gold:]]
        documents.append({"context": line["context"], "choices": choices, "gold": gold})
    return _test(documents)


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def _test(documents: Iterable[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(documents))}
