"""Text that spells a special token, such as "</s>" on a web page, is text: no document forges a boundary."""

import json
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Ids that mean something to a program; not that of unknown text."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = {token_id for token_id in tokenizer.all_special_ids if token_id is not None}
    return (added | own) - {tokenizer.unk_token_id} | {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}


def hide_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> str:
    """tokenizer.json in which no text spells a special token: each has a name that nobody knows, and its id.

    `Tokenizer.encode_special_tokens` alone leaves the pieces of Unigram, the words of WordLevel and the merges of BPE.
    A special token of one character stays as it is, since a line end must be encoded.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = None
    model, nonce = content["model"], secrets.token_hex(8)
    vocabulary = model["vocab"]
    hidden = special_ids(tokenizer) | {tokenizer.unk_token_id} - {None}
    names: dict[str, str] = {}
    if isinstance(vocabulary, list):  # Unigram: pieces in the order of their ids
        for token_id in hidden:
            if token_id < len(vocabulary) and len(vocabulary[token_id][0]) > 1:
                names[vocabulary[token_id][0]] = f"{nonce} {token_id}"
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        names = {token: f"{nonce} {i}" for token, i in vocabulary.items() if i in hidden and len(token) > 1}
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
        model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    for token in content["added_tokens"]:
        if token["id"] in hidden:
            token["special"] = True  # the switch of the encoder asks for this alone
            token["content"] = names.get(token["content"], token["content"])
    return json.dumps(content, ensure_ascii=False)


def was_forgeable(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether format 2, which hid no names, could give text the id of a special token."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    special = special_ids(tokenizer)
    spelled = " x".join(f"{token}x {token}" for token in tokenizer.convert_ids_to_tokens(sorted(special)))
    return not special.isdisjoint(encoder.encode(spelled, add_special_tokens=False).ids)
