"""What a model to go on from (`model.from`) must agree with: length of the rows, tokenizer, packed documents."""

import logging

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_softpick.modeling.proving import isolates_documents
from hf_softpick.training.recipe_model import ModelSettings

logger = logging.getLogger(__name__)

# What architectures call the longest sequence that they have positions for.
_LENGTHS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "context_length")


def apply_settings(config: PreTrainedConfig, settings: ModelSettings, seq_len: int) -> None:
    """Put the fields that may stand beside `model.from` into `config`, which is saved with the model.

    Raises:
        ValueError: the architecture has no place for one of them, or rows of `seq_len` tokens are too long for it.
    """
    config = config.get_text_config(decoder=True)
    changes = settings.model_dump(include={"max_position_embeddings", "attention_dropout"}, exclude_none=True)
    if settings.rope_parameters is not None:
        saved = getattr(config, "rope_parameters", None)
        if not saved or "rope_type" not in saved:
            raise ValueError(
                f"{config.model_type} has no rope_parameters that hold for all its layers; leave them out."
            )
        # How much of a head rotates is a matter of the weights.
        kept = {name: saved[name] for name in ("partial_rotary_factor",) if name in saved}
        changes["rope_parameters"] = kept | settings.rope_parameters.model_dump(exclude_none=True)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(f"{config.model_type} has no {name}; leave model.{name} out.")
        setattr(config, name, value)
    longest = next(
        (size for name in _LENGTHS if isinstance(size := getattr(config, name, None), int) and size > 0), None
    )
    if longest is not None and seq_len > longest:
        raise ValueError(
            f"data.seq_len is {seq_len}, but the model has positions for {longest} tokens. Lower it, or extend "
            f"rotary positions by model.max_position_embeddings={seq_len} (and model.rope_parameters)."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one for each kind of layer, in some
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            short = kind["original_max_position_embeddings"]
            if seq_len > short:
                raise ValueError(
                    f"data.seq_len is {seq_len}, and beyond {short} tokens rope_type 'longrope' chooses the positions "
                    "of a whole batch by its longest document. Lower it, or set model.rope_parameters."
                )


def fit_vocabulary(model: PreTrainedModel, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is not the model's, add the rows that `model.vocab_size` asks for, let all rows learn.

    New rows are drawn as transformers draws them, around the mean of the old ones.

    Raises:
        ValueError: ids mean other tokens than the model was trained on, or it has no rows for some of them.
    """
    _compare_vocabularies(settings, tokenizer)
    rows, wanted, needed = model.get_input_embeddings().num_embeddings, settings.vocab_size, id_count(tokenizer)
    if max(rows, wanted or 0) < needed:
        raise ValueError(
            f"the model has {rows} embeddings, but the tokenizer has {needed} tokens. Set model.vocab_size={needed} "
            "(or more) to add new ones, or use the tokenizer that belongs to the model."
        )
    if wanted is not None and wanted < rows:
        raise ValueError(f"model.vocab_size is {wanted}, but the model has {rows} embeddings, and none is taken away.")
    if wanted is not None and wanted > rows:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "model.vocab_size adds embeddings, which ZeRO-3 has sharded already. Save the larger model once "
                "(resize_token_embeddings, save_pretrained) and go on from that folder, or use another strategy."
            )
        logger.info("%s: %d embeddings are added to %d.", settings.from_, wanted - rows, rows)
        model.resize_token_embeddings(wanted, mean_resizing=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # It zeroes the gradient of a row, which may be that of BOS, EOS or the last token. Packed rows need none.
            module.padding_idx = None


def check_isolation(model: PreTrainedModel, normalizer: str) -> None:
    """Refuse packed documents that change each other.

    Raises:
        ValueError: they do.
    """
    if not isolates_documents(model, normalizer):
        raise ValueError(
            f"{type(model).__name__} with normalizer {normalizer!r} does not keep packed documents apart: in a row "
            "a document has other logits than alone, through recurrent or convolutional layers, positions or the "
            "attention. Set data.packing=one_document to give each a row of its own, or data.isolate_documents=false "
            "to let documents see each other."
        )


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings that a tokenizer needs; more than len(tokenizer) where its ids have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _compare_vocabularies(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        source = AutoTokenizer.from_pretrained(settings.from_, revision=settings.revision, trust_remote_code=False)
        theirs = source.get_vocab()
    except Exception as error:  # transformers raises nearly everything for a folder without a tokenizer
        theirs, why = {}, f": {(str(error).strip().splitlines() or [''])[0]}"
    else:
        # Without files some classes make a tokenizer that knows nothing.
        theirs, why = ({}, "") if len(theirs) <= len(source.all_special_ids) else (theirs, "")
    if not theirs:
        logger.warning(
            "%s has no tokenizer to compare ours with; ids are taken to mean the same%s", settings.from_, why
        )
        return
    tokens = {token_id: token for token, token_id in theirs.items()}
    ours = tokenizer.get_vocab().items()
    other = sorted((i, token) for token, i in ours if theirs.get(token, i) != i or tokens.get(i, token) != token)
    if other:
        token_id, token = other[0]
        there = f"is {tokens[token_id]!r}" if token_id in tokens else f"is unknown, and that token is {theirs[token]}"
        raise ValueError(
            f"the tokenizer is not that of the model: {len(other)} of its {len(ours)} tokens have other ids, first "
            f"{token_id}, which is {token!r} here and {there} there. Set tokenizer.from to {settings.from_}; "
            "tokens may be added behind its own."
        )
