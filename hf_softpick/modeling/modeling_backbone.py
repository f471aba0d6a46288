"""The softpick transformer without a head: Llama's blocks with the attention replaced. Also Hub custom code.

Sibling imports only: `save_pretrained` copies these files beside the weights.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, initialization
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
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
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs

from .attention_interface import IMPLEMENTATIONS, REGISTERED, eager_attention_forward
from .attention_triton import TRITON, refuse
from .compat import attention_of, sequence_is_sharded
from .configuration_softpick import SoftpickConfig
from .documents import read_documents
from .normalizers import NORMALIZERS, OWN_PARAMETERS
from .softmax_masks import runs_in_engine, softmax_mask
from .visibility import VisibleKeys, check_mask, check_padding, keep_documents_apart, visible_keys

_HEADS = ("CausalLM", "QuestionAnswering", "SequenceClassification", "TokenClassification")
_AUTO_MAP = {
    "AutoConfig": "configuration_softpick.SoftpickConfig",
    "AutoModel": "modeling_softpick.SoftpickModel",
    **{f"AutoModelFor{head}": f"modeling_softpick.SoftpickFor{head}" for head in _HEADS},
}


class SoftpickAttention(LlamaAttention):
    """Llama's attention with the weights of `config.normalizer`, and that normalizer's parameters [H], float32."""

    def __init__(self, config: SoftpickConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        own = NORMALIZERS[config.normalizer].parameters
        for name in OWN_PARAMETERS:
            values = torch.full((config.num_attention_heads,), own.get(name, 0.0), dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(values) if name in own else None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        document_position: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Llama's, but for three things: queries of scaled_* are multiplied by s_h * log(n_i), "eager" is ours, and
        the window is told.

        Args:
            hidden_states: [B, T, hidden]. attention_mask: what the mask function of the implementation returned.
            document_position: int64 [B or 1, T], n_i - 2 of the scaled normalizers; position_ids if it is not told.

        Returns:
            [B, T, hidden], and the weights [B, H, T, S] or None where they are not computed.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.head_scale is not None:
            position = kwargs["position_ids"] if document_position is None else document_position
            query = _scale_queries(query, self.head_scale, position)
        implementation = attention_of(self.config)
        if implementation not in IMPLEMENTATIONS:
            # Asserted here as well: writing config._attn_implementation directly passes every check at load time.
            refuse_softmax(self.config.normalizer, implementation)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _scale_queries(query: Tensor, head_scale: Tensor, position: Tensor) -> Tensor:
    """query [B, H, T, D] times s_h * log(n_i), in its dtype; n_i = position + 2, so that no logarithm is 0."""
    if hasattr(head_scale, "to_local"):  # tensor parallelism: those of this rank's heads
        head_scale = head_scale.to_local()
    factor = (head_scale.float()[:, None] * torch.log(position[:, None].float() + 2))[..., None]
    if query.dtype in (torch.float32, torch.float64) or torch.compiler.is_compiling():  # a compiler fuses the cast
        return (query * factor).to(query.dtype)
    return _Scale.apply(query, factor)


class _Scale(torch.autograd.Function):
    """query [B, H, T, D] in 16 bits times a float32 factor [B or 1, H, T, 1], without a float32 copy of the query."""

    @staticmethod
    def forward(ctx, query: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(query, factor)
        return torch.mul(query, factor, out=torch.empty_like(query))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, factor = ctx.saved_tensors
        # float16 has no exponents for products of small numbers: they are taken relative to the largest gradient.
        largest = grad.abs().amax().clamp_min(torch.finfo(torch.float16).tiny).float()
        along = ((grad / largest) * query).sum(-1, keepdim=True, dtype=factor.dtype) * largest
        return torch.mul(grad, factor, out=torch.empty_like(query)), along.sum_to_size(factor.shape)


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
    _can_record_outputs = {"hidden_states": SoftpickDecoderLayer, "attentions": SoftpickAttention}
    # Those attentions compute softmax, which the default is not; set for each model below.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_context_parallel = False
    # Engines ask the class, before they know the normalizer: said no, they name no reason, and a softmax model could
    # not run either. A model of another normalizer refuses by name as soon as one is built for an engine.
    _supports_attention_backend = True

    def __init__(self, config: SoftpickConfig):
        config.validate_architecture()  # by itself it sees no field that was changed after the configuration was made
        normalizer = NORMALIZERS[config.normalizer]
        self._supports_sdpa = self._supports_flash_attn = self._supports_flex_attn = normalizer.is_softmax
        self._supports_attention_backend = normalizer.is_softmax
        self._keep_in_fp32_modules_strict = set(normalizer.parameters)
        PreTrainedModel.__init__(self, config)  # Llama's classes, next in line, would build their own layers

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SoftpickAttention):
            for name, value in NORMALIZERS[module.config.normalizer].parameters.items():
                initialization.constant_(getattr(module, name), value)

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
        refuse_softmax(normalizer, name)
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
            _copy_code(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """`save_pretrained(..., push_to_hub=True)` uploads before it returns."""
        _copy_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _copy_code(folder) -> None:
    entry = str(Path(__file__).with_name("modeling_softpick.py"))
    for code in (entry, *get_relative_import_files(entry)):
        shutil.copyfile(code, Path(folder, Path(code).name))


def refuse_softmax(normalizer: str, implementation: str) -> None:
    """Raise unless `normalizer` is softmax, which is all that transformers' own attention and engines compute."""
    if not NORMALIZERS[normalizer].is_softmax:
        raise ValueError(
            f"the normalizer {normalizer!r} cannot run with attn_implementation={implementation!r}, which computes "
            f"softmax. Use one of {', '.join(map(repr, IMPLEMENTATIONS))}, with transformers' own generate(): no "
            "serving engine has them."
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
        for layer in self.layers[:1]:  # what attention holds itself is one number a head: a rank has those of its own
            for name, _ in layer.self_attn.named_parameters(recurse=False):
                self.tp_plan[f"layers.*.self_attn.{name}"] = "colwise"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden] of tokens [B, T]: Llama's forward, told who sees whom.

        Args:
            attention_mask: [B, tokens so far] with 1 = a token, 0 = padding; or bool [B, 1 or H, T, S] with True =
                visible, which replaces causality, but neither the window nor the boundaries of documents.
            position_ids: int64 [B or 1, T]; a document starts wherever they restart, and documents never see each
                other, with or without a cache or an attention_mask.
            kwargs: cu_seq_lens_q, int [documents + 1] for one row without padding, and seq_idx, int [B, T], say the
                same; what is given must agree.

        Raises:
            ValueError: masks or boundaries do not fit the input, or the implementation cannot honour them.
        """
        given, implementation = input_ids if inputs_embeds is None else inputs_embeds, attention_of(self.config)
        if implementation not in IMPLEMENTATIONS and runs_in_engine(implementation, kwargs):
            if position_ids is None or (attention_mask is not None and attention_mask.ndim == 2):
                raise ValueError(
                    f"attn_implementation={implementation!r} knows by itself what each query sees, from an engine or "
                    "for want of a mask function: pass position_ids, and no 2-D attention_mask."
                )
            kwargs["document_position"] = position_ids.clamp_min(0)
        elif given is not None:
            attention_mask, position_ids, kwargs = self._read_call(
                given, attention_mask, position_ids, past_key_values, kwargs
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _read_call(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor, dict[str, Any]]:
        """What Llama's forward is called with: the mask, position_ids [B or 1, T] and further arguments.

        Llama's mask functions are told neither of documents over a cache or beside padding, nor of n_i.
        """
        implementation = attention_of(self.config)
        if kwargs.pop("is_causal", None) is False or kwargs.get("cache") is not None:
            raise ValueError(
                f"is_causal=False and a paged cache are not supported by attn_implementation={implementation!r}: the "
                "model is causal, and its keys are those of the call and of past_key_values."
            )
        (batch, length), device = given.shape[:2], given.device
        keys, key_offset, offset = length, 0, 0
        if past_key_values is not None:
            # A pipeline's stage holds some layers alone; the others' part of its cache stays empty.
            own = next((i for i, layer in enumerate(self.layers) if isinstance(layer, SoftpickDecoderLayer)), 0)
            keys, key_offset = past_key_values.get_mask_sizes(length, own)
            offset = past_key_values.get_query_offset(own)
        if isinstance(offset, Tensor):
            offset = offset.to(device)
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if padding is not None:
            if padding.dtype != torch.bool:
                check_padding(padding)
            padding = padding.to(device, torch.bool)
        query = torch.arange(length, device=device) + offset
        documents = read_documents(kwargs, batch, length, offset, position_ids, padding)
        if position_ids is None:
            position_ids = query[None] if documents is None else documents
        visible, position = visible_keys(
            length,
            keys,
            device,
            query_offset=offset,
            key_offset=key_offset,
            padding_mask=padding,
            position_ids=documents,
            sliding_window=self.config.sliding_window,
        )
        if NORMALIZERS[self.config.normalizer].scaled:
            # A shard of a row does not hold the tokens before it; positions tell of them.
            sharded = documents is not None and sequence_is_sharded()
            kwargs["document_position"] = documents if sharded else position
        if attention_mask is not None and padding is None:
            if implementation not in (*IMPLEMENTATIONS, "sdpa"):
                raise ValueError(
                    f"attn_implementation={implementation!r} does not take the attention_mask "
                    f"{tuple(attention_mask.shape)} here. Use 'auto', 'tiled', 'eager' or 'sdpa'."
                )
            mask = keep_documents_apart(check_mask(attention_mask, length, keys), documents)
            if self.config.sliding_window is not None:
                first = query[:, None] - key_offset - self.config.sliding_window + 1
                mask = mask & (torch.arange(keys, device=device) >= first)
            return (VisibleKeys(mask=mask) if implementation in REGISTERED else mask), position_ids, kwargs
        if implementation in REGISTERED:
            return visible, position_ids, kwargs
        if implementation in ("eager", "sdpa"):
            return visible.dense(length, keys, device), position_ids, kwargs
        refuse_softmax(self.config.normalizer, implementation)
        rows = torch.empty(batch, length, 0, dtype=self.dtype, device=device)
        mask, more = softmax_mask(
            self.config, visible, position, rows, padding, past_key_values, keys, position_ids, query
        )
        return mask, position_ids, {**kwargs, **more}


__all__ = ["SoftpickModel", "SoftpickPreTrainedModel"]
