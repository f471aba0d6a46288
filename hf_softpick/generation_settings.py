"""The generation settings of a model that others made, as far as transformers saves them."""

from typing import Any

# Read by sampling, or by beam search, alone. transformers saves no settings that set them without it.
_SAMPLING = "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
_BEAMS = "early_stopping length_penalty".split()


def usable_generation_config(raw: dict[str, Any], warnings: list[str]) -> Any | None:
    """A `GenerationConfig` that can be saved, or None where there is none.

    Settings that nothing reads (a temperature without sampling) are left out, and named in `warnings`. If the rest is
    still refused by transformers, the whole file is left out, with its reason in `warnings`.
    """
    from transformers import GenerationConfig

    idle = [] if raw.get("do_sample") is True else list(_SAMPLING)
    idle += _BEAMS if raw.get("num_beams") in (None, 1) else []
    for left_out in ([], [key for key in idle if raw.get(key) is not None]):
        try:
            found = GenerationConfig.from_dict({key: value for key, value in raw.items() if key not in left_out})
            found.validate(strict=True)
        except Exception as error:  # fields of any type reach comparisons and constructors inside
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip("- ")
            continue
        if left_out:
            warnings.append(
                f"generation_config.json: {', '.join(left_out)} left out; without do_sample or num_beams nothing "
                "reads them."
            )
        return found
    warnings.append(f"generation_config.json was left out: transformers refuses it ({reason}).")
    return None


def mend_generation_config(model: Any) -> list[str]:
    """Leave out what transformers would refuse to save of `model.generation_config`; what was left out, as sentences.

    A checkpoint may hold such settings (a temperature without sampling, as Llama-2 has) and load without a word.
    """
    warnings: list[str] = []
    if model.generation_config is not None:
        found = usable_generation_config(model.generation_config.to_dict(), warnings)
        if warnings:
            model.generation_config = found or type(model.generation_config).from_model_config(model.config)
    return warnings
