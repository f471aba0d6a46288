"""The softpick transformer without a head: Llama's blocks with the attention replaced. Also Hub custom code.

Sibling imports only: `save_pretrained` copies these files beside the weights.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, initialization
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_masks import VisibleKeys, check_boundaries, check_padding, document_starts, visible_keys
from .attention_softpick import IMPLEMENTATIONS, check_mask, keep_documents_apart, run_attention
from .attention_triton import TRITON, refuse
from .configuration_softpick import SoftpickConfig
from .normalizers import NORMALIZERS

INITIAL_HEAD_SCALE = 0.3
_CODE_FILES = (
    "attention_blocks.py",
    "attention_dense.py",
    "attention_inputs.py",
    "attention_masks.py",
    "attention_softpick.py",
    "attention_tiled.py",
    "attention_triton.py",
    "configuration_softpick.py",
    "modeling_backbone.py",
    "modeling_softpick.py",
    "normalizers.py",
)
_HEADS = ("CausalLM", "QuestionAnswering", "SequenceClassification", "TokenClassification")
_AUTO_MAP = {
    "AutoConfig": "configuration_softpick.SoftpickConfig",
    "AutoModel": "modeling_softpick.SoftpickModel",
    **{f"AutoModelFor{head}": f"modeling_softpick.SoftpickFor{head}" for head in _HEADS},
}


class SoftpickAttention(LlamaAttention):
    """Llama's attention with the weights of `config.normalizer`; scaled_* adds `head_scale` [H], float32."""

    def __init__(self, config: SoftpickConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        scaled = config.normalizer.startswith("scaled_")
        scale = torch.full((config.num_attention_heads,), INITIAL_HEAD_SCALE, dtype=torch.float32) if scaled else None
        self.head_scale = None if scale is None else nn.Parameter(scale)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: "SoftpickMask",
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden] and the weights [B, H, T, S], or None where they are not computed."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask, position = attention_mask
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if self.head_scale is not None:
            # n_i = position + 2, so that the first token's logarithm is not 0.
            length_scale = self.head_scale.float()[:, None] * torch.log(position[:, None].float() + 2)
            query = query.float() * length_scale[..., None]
        if implementation in IMPLEMENTATIONS:
            output, weights = run_attention(
                query,
                key,
                value,
                mask,
                self.scaling,
                self.config.normalizer,
                implementation,
                dropout,
                bool(kwargs.get("output_attentions")),
            )
        else:
            # Asserted here as well: writing config._attn_implementation directly passes every check at load time.
            _refuse_foreign(self.config.normalizer, implementation)
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
            output, weights = interface(
                self, query.to(value.dtype), key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


# What the layers receive as attention_mask: what attention sees, and the position of each query in its document.
SoftpickMask = tuple[VisibleKeys | Tensor | None, Tensor]


class SoftpickDecoderLayer(LlamaDecoderLayer):
    """Llama's block around `SoftpickAttention`."""

    def __init__(self, config: SoftpickConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = SoftpickAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SoftpickPreTrainedModel(LlamaPreTrainedModel):
    """Loading, saving and the choice of the implementation, common to the models below."""

    config_class = SoftpickConfig
    config: SoftpickConfig
    _no_split_modules = ["SoftpickDecoderLayer"]
    _keep_in_fp32_modules_strict = {"head_scale"}
    _can_record_outputs = {"hidden_states": SoftpickDecoderLayer, "attentions": SoftpickAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SoftpickAttention) and module.head_scale is not None:
            initialization.constant_(module.head_scale, INITIAL_HEAD_SCALE)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        chosen = self._own_implementation(attn_implementation)
        return chosen or super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers' check at load time; see `_own_implementation`."""
        chosen = self._own_implementation(requested_attention)
        return chosen or super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _own_implementation(self, name: str | None) -> str | None:
        """The implementation of ours that is meant, None for one of transformers' own that computes softmax.

        Raises:
            ValueError: the name belongs to another normalizer than the model's, or the kernels cannot run this model.
        """
        normalizer = self.config.normalizer
        if name is None or name == normalizer:  # a saved config names its normalizer
            return "auto"
        if name in TRITON:
            refuse(name, self.config.head_dim)  # the device is not known before the model is moved to it
        if name in IMPLEMENTATIONS:
            return name
        if name in NORMALIZERS:
            raise ValueError(
                f"{type(self).__name__} with normalizer {normalizer!r} cannot run with attn_implementation={name!r}: "
                "the normalizer belongs to the model. Load it with normalizer=... to change what it computes."
            )
        _refuse_foreign(normalizer, name)
        return None

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers, and the code files that `trust_remote_code=True` needs; `use_cache` is saved as true.

        The files are copied here and not by `register_for_auto_class`, which under FSDP2 saves torch's code instead.
        """
        self.config.auto_map = dict(_AUTO_MAP)
        use_cache, self.config.use_cache = self.config.use_cache, True
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.use_cache = use_cache
        if is_main_process:
            for name in _CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), Path(save_directory, name))


def _refuse_foreign(normalizer: str, implementation: str) -> None:
    if normalizer.removeprefix("scaled_") != "softmax":
        raise ValueError(
            f"the normalizer {normalizer!r} cannot run with attn_implementation={implementation!r}: it is not one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, and transformers' own attention computes softmax."
        )


class SoftpickModel(SoftpickPreTrainedModel, LlamaModel):
    """Embeddings, `SoftpickDecoderLayer`s and final norm; parameter names are Llama's."""

    def __init__(self, config: SoftpickConfig):
        SoftpickPreTrainedModel.__init__(self, config)
        self.vocab_size = config.vocab_size
        # No padding_idx: padding is never seen, while a pad token that is also bos, eos or unk has a vector to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SoftpickDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden] of tokens [B, T].

        Args:
            attention_mask: [B, tokens so far] with 1 = a token, 0 = padding; or bool [B, 1 or H, T, S] with True =
                visible, which replaces causality, but neither the window nor the boundaries of documents.
            position_ids: int64 [B or 1, T]; a document starts wherever they restart, and documents never see each
                other, with or without a cache or an attention_mask.
            cu_seq_lens_q: int [documents + 1], the same for one row without padding; cu_seq_lens_k must equal it.

        Raises:
            ValueError: masks or boundaries do not fit the input, or the implementation cannot honour them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch, length, _ = inputs_embeds.shape
        offset = past_key_values.get_query_offset() if past_key_values is not None else 0
        if isinstance(offset, Tensor):
            offset = offset.to(inputs_embeds.device)
        check_boundaries(batch, cu_seq_lens_q, cu_seq_lens_k, kwargs)
        given_positions = position_ids
        if position_ids is None and cu_seq_lens_q is not None:
            position_ids = document_starts(cu_seq_lens_q, length)
        elif position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + offset)[None]

        keys, key_offset = (length, 0) if past_key_values is None else past_key_values.get_mask_sizes(length, 0)
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if padding is not None and padding.is_floating_point():
            check_padding(padding)
        visible = visible_keys(
            length,
            keys,
            inputs_embeds.device,
            query_offset=offset,
            key_offset=key_offset,
            padding_mask=None if padding is None else padding.to(inputs_embeds.device, torch.bool),
            position_ids=given_positions,
            cu_seq_lens=cu_seq_lens_q,
            sliding_window=self.config.sliding_window,
        )
        if attention_mask is not None and padding is None:
            mask = keep_documents_apart(check_mask(attention_mask, length, keys), given_positions, cu_seq_lens_q)
            if self.config.sliding_window is not None:
                query = torch.arange(length, device=mask.device) + offset - key_offset
                mask = mask & (torch.arange(keys, device=mask.device) > query[:, None] - self.config.sliding_window)
        elif self.config._attn_implementation in IMPLEMENTATIONS:
            mask = visible
        else:
            mask = self._softmax_mask(visible, inputs_embeds, attention_mask, past_key_values, keys, position_ids)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=(mask, visible.position),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _softmax_mask(self, visible, inputs_embeds, attention_mask, past_key_values, keys, position_ids):
        """The mask in the form that transformers' softmax implementation in force reads."""
        _refuse_foreign(self.config.normalizer, self.config._attn_implementation)
        if self.config._attn_implementation == "sdpa":
            return visible.dense(keys)
        packed = bool((visible.position.diff() != 1).any()) and bool((position_ids.diff() != 1).any())
        if packed and (attention_mask is not None or past_key_values is not None):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} does not keep packed documents apart when "
                "an attention_mask or a cache is given. Pass neither (use_cache=False), or use 'auto' or 'tiled'."
            )
        create = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        return create(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


__all__ = ["SoftpickModel", "SoftpickPreTrainedModel"]
