"""A trained model with its tokenizer, from a run folder, a model folder or the Hub."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_softpick
from hf_softpick.errors import CheckpointError
from hf_softpick.files import read_object
from hf_softpick.modeling.compat import attention_of
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.normalizers import NORMALIZERS
from hf_softpick.modeling.proving import prove_normalizer, refusal

FINAL = "final"


class LoadedModel(NamedTuple):
    """A model ready to be measured.

    name: short, for tables and file names. path: what was loaded, a folder or a Hub id. run: the run folder that it
    belongs to, None where there is none. add_bos: whether its tokenizer begins a prompt with BOS, as it was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str
    run: Path | None
    add_bos: bool


def locate(source: str | Path) -> tuple[str, Path | None, str]:
    """What to load, the run folder it belongs to, and a short name.

    Args:
        source: a run folder (its final/ is meant), a folder with config.json, or a Hub id.

    Raises:
        CheckpointError: a folder that holds no finished model.
    """
    path = Path(source)
    if not path.exists():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise CheckpointError(
                f"{source} is neither a folder nor a Hub id (owner/name). Give a run folder, a folder with config.json"
                ", or a Hub id."
            )
        if path.parent.is_dir():  # a mistyped folder must not become somebody's repository
            there = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())[:8]
            raise CheckpointError(
                f"there is no folder {source}; {path.parent} holds {', '.join(there) or 'no folders'}. For the Hub's "
                "repository of that name, start from another folder."
            )
        return str(source), None, str(source).replace("/", "--")
    if path.is_file():
        raise CheckpointError(f"{source} is a file. Give the folder that holds config.json and the weights.")
    if (path / "config.json").is_file():
        run = path.resolve().parent
        is_final = path.resolve().name == FINAL and (run / "recipe.yaml").is_file()
        return str(path), run if is_final else None, run.name if is_final else path.resolve().name
    if (path / FINAL / "config.json").is_file():
        return str(path / FINAL), path, path.resolve().name
    kind = (
        "a run that has not finished (no final/)" if (path / "recipe.yaml").is_file() else "no model (no config.json)"
    )
    raise CheckpointError(
        f"{source} holds {kind}. Give a finished run, or a folder with config.json, for instance one of checkpoints/."
    )


def load_model(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Load for measuring: eval mode, weights from safetensors alone.

    Args:
        source: as for `locate`.
        device: default the GPU where there is one, else the CPU.
        dtype: a torch dtype, its name, or "auto" for that of the saved weights.
        attn_implementation: default what the saved configuration says.
        **kwargs: for `from_pretrained`, for instance quantization_config.

    Raises:
        CheckpointError: nothing there can be loaded, parts of the weights are missing, or the model of another
            architecture does not run the normalizer that its configuration names.
    """
    path, run, name = locate(source)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    hf_softpick.register()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            **kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly everything for a wrong path, damaged files or no network
        if isinstance(error, KeyError) and error.args[0] in NORMALIZERS:
            raise CheckpointError(f"{source}: {refusal(config.model_type, error.args[0], error)}") from error
        reason = (str(error).strip().splitlines() or [""])[0]
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason += " If you have read and trust it, give --trust-remote-code."
        raise CheckpointError(f"{source} cannot be loaded: {type(error).__name__}: {reason}") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        # Without files some classes make a tokenizer that knows nothing.
        raise CheckpointError(f"{source} has no tokenizer. Save the one that the model was trained with beside it.")
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} has no weights for {len(missing)} parameters ({', '.join(missing[:3])}, ...), which would be "
            "random. Its config.json does not belong to its weights."
        )
    if "quantization_config" not in kwargs:
        model.to(device)
    normalizer = normalizer_of(model)
    if not NORMALIZERS[normalizer].is_plain_softmax and model.config.model_type != SoftpickConfig.model_type:
        try:
            prove_normalizer(model, normalizer)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return LoadedModel(model.eval(), tokenizer, name, path, run, begins_with_bos(tokenizer))


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a prompt; our final/ folders do as the model was trained."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def normalizer_of(model: PreTrainedModel) -> str:
    """The normalizer that `model` computes: its configuration's, or the attention's name in other architectures."""
    own = getattr(model.config, "normalizer", None)
    if own in NORMALIZERS:
        return own
    implementation = attention_of(model.config)
    return implementation if implementation in NORMALIZERS else "softmax"


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """What every result file says of the model, as plain values."""
    model = loaded.model
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    return {
        "name": loaded.name,
        "path": loaded.path,
        "architecture": type(model).__name__,
        "normalizer": normalizer_of(model),
        "attn_implementation": attention_of(model.config),
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
        "hidden_size": getattr(config, "hidden_size", None),
        "vocab_size": config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "add_bos": loaded.add_bos,
        "trained_steps": read_object(loaded.run / "finished.json").get("step") if loaded.run else None,
    }
