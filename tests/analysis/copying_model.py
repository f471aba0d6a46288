"""A causal model that copies: after a text that has occurred before it continues as it did then. And tokenizers."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hf_softpick.analysis.passkey_prompts import FILLER, INTRODUCTION, NEEDLE, QUESTION

LONGEST_MATCH = 12
TEXT = [INTRODUCTION, *FILLER, NEEDLE.format(key="1203 4517 6890 23 45"), QUESTION]


class CopyConfig(PreTrainedConfig):
    model_type = "copying"
    num_hidden_layers = 1


class Memory(nn.Module):
    """Keeps the tokens themselves in the KV cache, as keys of one number."""

    def forward(self, input_ids: Tensor, past_key_values=None, **kwargs) -> BaseModelOutputWithPast:
        past_key_values = DynamicCache() if past_key_values is None else past_key_values
        keys = input_ids[:, None, :, None].float()
        seen, _ = past_key_values.update(keys, keys, 0)
        return BaseModelOutputWithPast(last_hidden_state=seen[:, 0, :, 0].long(), past_key_values=past_key_values)


class CopyModel(PreTrainedModel, GenerationMixin):
    """An exact induction head: the next token is the one after the longest earlier match of the last tokens.

    config.window: how many tokens back it sees.
    """

    config_class = CopyConfig
    base_model_prefix = "model"

    def __init__(self, config: CopyConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, 1)
        self.model = Memory()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids, attention_mask=None, past_key_values=None, logits_to_keep=0, **kwargs):
        out = self.model(input_ids, past_key_values)
        seen, new = out.last_hidden_state, input_ids.shape[1]
        real = torch.ones_like(seen) if attention_mask is None else attention_mask[:, : seen.shape[1]]
        kept = logits_to_keep or new
        logits = torch.zeros(len(seen), kept, self.config.vocab_size)
        for row in range(len(seen)):
            for place in range(kept):
                end = seen.shape[1] - kept + place
                tokens = [int(t) if r else -1 for t, r in zip(seen[row, : end + 1], real[row], strict=False)]
                guess = self.next_token(tokens[max(0, len(tokens) - self.config.window) :])
                if guess is not None:
                    logits[row, place, guess] = 10.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    @staticmethod
    def next_token(tokens: list[int]) -> int | None:
        best, guess = 0, None
        for index in range(len(tokens) - 1):
            length = 0
            while length < min(LONGEST_MATCH, index + 1) and tokens[index - length] == tokens[-1 - length] >= 0:
                length += 1
            if length > best:
                best, guess = length, tokens[index + 1]
        return guess


def copy_model(vocab_size: int, window: int = 10**6, longest: int = 512) -> CopyModel:
    return CopyModel(CopyConfig(vocab_size=vocab_size, window=window, max_position_embeddings=longest)).eval()


def _finish(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE that joins some digits, so that keys have different numbers of tokens; without padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return _finish(tokenizer, bos)


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words, punctuation and single digits, which it decodes with spaces between them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [*TEXT, "0 1 2 3 4 5 6 7 8 9"], trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    return _finish(tokenizer, bos)


def joining_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Joins across the end of the prompt: "is 1" may be one token, as where nothing splits at spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[.?\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    text = [*TEXT, *(f"The pass key is {digit}" for digit in range(10)), "0123456789"]
    alphabet = sorted(set("".join(text)))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text * 3, trainer)
    return _finish(tokenizer, bos)
