"""The generation settings of a source, as far as transformers accepts them."""

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
