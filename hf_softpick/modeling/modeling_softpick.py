"""The softpick transformer with its heads: the next token, a label a row, a label a token, a span.

Also the Hub custom code of saved checkpoints, which starts here: every file of it is imported from this one. Names of
parameters and losses are those of Llama's heads in transformers.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_softpick import SoftpickConfig
from .modeling_backbone import SoftpickModel, SoftpickPreTrainedModel, refuse_softmax

logger = logging.get_logger(__name__)


class SoftpickForCausalLM(SoftpickPreTrainedModel, LlamaForCausalLM):
    """`SoftpickModel` with a language modelling head; forward, loss and generation are LlamaForCausalLM's."""

    def __init__(self, config: SoftpickConfig):
        SoftpickPreTrainedModel.__init__(self, config)
        self.model = SoftpickModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(self, attention_mask, past_key_values, inputs_embeds, **kwargs) -> Tensor | None:
        """generate()'s hook for static caches: the padding mask stays 2-D, at the cache's length so that it keeps its
        shape."""
        if attention_mask is None or attention_mask.ndim != 2:
            return attention_mask
        length, _ = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)
        return nn.functional.pad(attention_mask, (0, max(length - attention_mask.shape[1], 0)))

    def init_continuous_batching(self, *args, **kwargs):
        """transformers' own engine, whose attentions compute softmax."""
        refuse_softmax(self.config.normalizer, "paged|eager")
        return super().init_continuous_batching(*args, **kwargs)


class _Headed(SoftpickPreTrainedModel):
    # These losses are means over one call: Trainer must divide them itself when it accumulates gradients.
    accepts_loss_kwargs = False

    def __init__(self, config: SoftpickConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SoftpickModel(config)


class SoftpickForSequenceClassification(_Headed):
    """A label, several, or a number for each row, read from its last token that is not padding."""

    def __init__(self, config: SoftpickConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels] of rows [B, T], and the loss if `labels` [B] or [B, num_labels] are given.

        Raises:
            ValueError: several rows come without an attention_mask, and the configuration has no pad_token_id.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_token(input_ids, attention_mask, *hidden.shape[:2])
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last.to(hidden.device)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(self, input_ids: Tensor | None, mask: Tensor | None, batch: int, length: int) -> Tensor:
        """int64 [B] or [1]: the column of each row's last token. The mask says it, where there is one: a pad token
        that is also eos may be the last token of the text."""
        pad = self.config.pad_token_id
        if mask is not None and mask.ndim == 2:
            real = mask[:, -length:] != 0
        elif pad is None and batch > 1:
            raise ValueError(
                f"{batch} rows without an attention_mask, and config.pad_token_id is None, so their last tokens are "
                "not known. Pass the attention_mask, or set pad_token_id."
            )
        elif pad is None or input_ids is None:
            return torch.tensor([length - 1])
        else:
            eos = self.config.eos_token_id
            if pad in (eos if isinstance(eos, list) else [eos]):
                logger.warning_once(
                    "pad_token_id is eos_token_id and there is no attention_mask: an eos at the end of a text is "
                    "taken for padding. Pass the attention_mask."
                )
            real = input_ids != pad
        return (real * torch.arange(length, device=real.device)).argmax(-1)


class SoftpickForTokenClassification(GenericForTokenClassification, _Headed):
    """A label for each token; forward is transformers' own."""

    def __init__(self, config: SoftpickConfig):
        _Headed.__init__(self, config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SoftpickForQuestionAnswering(GenericForQuestionAnswering, _Headed):
    """The first and the last token of an answer; forward is transformers' own."""

    def __init__(self, config: SoftpickConfig):
        _Headed.__init__(self, config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "SoftpickForCausalLM",
    "SoftpickForQuestionAnswering",
    "SoftpickForSequenceClassification",
    "SoftpickForTokenClassification",
    "SoftpickModel",
    "SoftpickPreTrainedModel",
]
