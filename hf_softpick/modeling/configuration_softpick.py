"""Configuration of the softpick transformer: Llama's fields plus the normalizer of the attention weights."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .normalizers import describe_normalizer

# Our fields, at the values with which Llama's classes compute the same.
AS_LLAMA = {"normalizer": "softmax", "sliding_window": None}
NOTE = "for AutoModelForCausalLM after `import hf_softpick`, or with trust_remote_code=True; Llama's classes would "
NOTE += "compute something else"

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@strict
class SoftpickConfig(LlamaConfig):
    """Llama's configuration with

    normalizer (`str`, default "softpick"): what the attention weights are, one of softpick, softmax,
        rectified_softmax, scaled_softpick, scaled_softmax. Part of the model's meaning and saved; how it is computed
        is `attn_implementation`.
    sliding_window (`int`, optional): a query sees itself and the sliding_window - 1 tokens before it.
    rope_parameters: rope_type default, linear, yarn or llama3. transformers chooses the frequencies of dynamic and
        longrope by the longest row of a batch and by the calls before, so that a document would depend on its company.

    Raises:
        ValueError: the normalizer is unknown, the window below 2, or rope_type dynamic or longrope.

    Source: arXiv 2504.20966; block layout and parameter names are Llama's.
    """

    model_type = "softpick"

    normalizer: str = "softpick"
    sliding_window: int | None = None

    def validate_architecture(self):
        """Part of `@strict` validation; runs by itself."""
        super().validate_architecture()
        describe_normalizer(self.normalizer)
        # transformers' cache for a window of 1 keeps every key and says that it keeps none.
        if self.sliding_window is not None and self.sliding_window < 2:
            raise ValueError(f"sliding_window is {self.sliding_window}, expected None or at least 2")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type in BATCH_DEPENDENT_ROPE:
            raise ValueError(
                f"rope_type is {rope_type!r}, whose frequencies depend on the longest row of a batch and on earlier "
                "calls, so that a document's logits would depend on its company. Use default, linear, yarn or llama3."
            )
        if not getattr(self, "is_causal", True):
            raise ValueError("is_causal is False, but SoftpickModel is causal only. Leave it out.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )

    def __post_init__(self, **kwargs):
        """The note of `to_dict` is not for this class."""
        super().__post_init__(**{name: value for name, value in kwargs.items() if name != "transformers_weights"})

    def to_dict(self):
        """The saved form. Where Llama's classes would compute something else, it names the attention, and where
        they look for the name of the weights it says why there is none: None as attn_implementation is refused too."""
        output = super().to_dict()
        if not describe_normalizer(self.normalizer).is_plain_softmax:
            output["attn_implementation"] = self.normalizer
        if any(getattr(self, name) != value for name, value in AS_LLAMA.items()):
            output["transformers_weights"] = NOTE
        return output

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Without the guard of `to_dict`, so that `from_pretrained(..., normalizer=...)` can change the normalizer."""
        if config_dict.get("attn_implementation") == config_dict.get("normalizer", cls.normalizer):
            config_dict = {name: value for name, value in config_dict.items() if name != "attn_implementation"}
        return super().from_dict(config_dict, **kwargs)


__all__ = ["SoftpickConfig"]
