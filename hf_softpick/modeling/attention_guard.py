"""How a model of another architecture is saved when its attention is not softmax, so that it never runs as softmax.

transformers does not save which attention a model ran with, and its classes run sdpa when they are told nothing, or
None. `install` makes every config.json of such a model *sealed*: the configuration lies inside, where only this module
looks. Outside lies what stops every other reader: an unknown model_type and architecture for the Auto classes and for
serving engines, and for classes that are named explicitly a sentence where each expects an integer, and one where
transformers expects the name of the weights. The folder carries this code: `trust_remote_code=True` opens it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .attention_interface import REGISTERED, register_attention
from .compat import CHOOSES_ATTENTION, READS_CONFIG, WRITES_CONFIG, attention_of, hook
from .normalizers import NORMALIZERS

logger = logging.get_logger(__name__)

OURS, SEALED = "softpick", "softpick_sealed"
GUARDED = tuple(name for name, what in NORMALIZERS.items() if not (what.parameters or what.is_softmax))
NOTE = "not readable as this architecture: its weights were trained with {} attention, and softmax would ruin them. "
NOTE += "Import hf_softpick before loading, or load through an Auto class with trust_remote_code=True"


def marked(config: PreTrainedConfig) -> str | None:
    """The normalizer that the weights of a loaded configuration were saved for; None for softmax and for our class."""
    name = getattr(config, "normalizer", None)
    return name if name in GUARDED and config.model_type != OURS else None


def unmark(config: PreTrainedConfig) -> None:
    """Let the weights be trained on with softmax, or whatever else runs them."""
    for part in _parts(config):
        if marked(part):
            del part.normalizer


def seal(config: PreTrainedConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds for the serialized form `saved` of `config`; that itself if all its attention is softmax.

    A part of a composite model that runs softpick alone is enough.
    """
    names = _name_parts(config, saved)
    if not names:
        return saved
    note = NOTE.format(" and ".join(sorted(names)))
    return {
        "architectures": [f"Softpick{name.removeprefix('Softpick')}" for name in saved.get("architectures") or [""]],
        "auto_map": {"AutoConfig": f"{Path(__file__).stem}.{SealedConfig.__name__}"},
        "model_type": SEALED,
        "transformers_version": saved.get("transformers_version"),
        "transformers_weights": note,
        "vocab_size": note,
        # In a list: transformers takes a dictionary with the model_type that it looks for, wherever one lies.
        SEALED: [saved],
    }


def unseal(saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the content of a config.json. Its architectures keep the name of no class, so that an
    engine that reads the opened configuration does not take its own implementation."""
    if saved.get("model_type") == SEALED:
        return saved[SEALED][0] | {"architectures": saved["architectures"]}
    if saved.get("attn_implementation") in GUARDED and saved.get("model_type") != OURS:
        return saved | {"normalizer": saved["attn_implementation"]}  # as version 0.1 of this package wrote it
    return saved


def install() -> None:
    """Hook transformers: configurations are sealed when written and unsealed when read, and a model whose
    configuration is marked runs its normalizer, or raises. Idempotent, also between copies of this file."""
    hook(*WRITES_CONFIG, _write)
    hook(*READS_CONFIG, _read)
    for method in CHOOSES_ATTENTION:
        hook(*method, _choose)


def watch_adapters(peft_model: Any) -> None:
    """Hook the module `peft.peft_model`: an adapter that is saved alone names its base, which may be anybody's."""
    hook(peft_model.PeftModel, "save_pretrained", _warn)


class SealedConfig(PreTrainedConfig):
    """What auto_map of a sealed config.json names; loads as the configuration inside."""

    model_type = SEALED

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As for any configuration class.

        Raises:
            ValueError: this transformers has no code of the architecture inside.
        """
        from transformers import CONFIG_MAPPING

        install()
        register_attention()
        saved, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if saved["model_type"] not in CONFIG_MAPPING:
            raise ValueError(f"transformers has no model type {saved['model_type']!r}; update, or import hf_softpick")
        return CONFIG_MAPPING[saved["model_type"]].from_dict(saved, **kwargs)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig):
            yield from _parts(part)


def _name_parts(config: PreTrainedConfig, saved: dict[str, Any]) -> set[str]:
    """Write into `saved` which part runs which normalizer; the names of all."""
    name, names = _runs(config), set()
    if name is not None:
        saved["normalizer"] = name
        names.add(name)
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig) and isinstance(saved.get(key), dict):
            names |= _name_parts(part, saved[key])
    return names


def _runs(config: PreTrainedConfig) -> str | None:
    """The normalizer that another model than ours ran, or was loaded for."""
    return None if config.model_type == OURS else marked(config) or _computes(attention_of(config))


def _computes(attention: Any) -> str | None:
    """The normalizer that an attn_implementation stands for, if another model than ours may run it; the kernel on the
    Hub has it in its repository's name."""
    if attention in GUARDED:
        return attention
    return "softpick" if isinstance(attention, str) and "/" in attention and "softpick" in attention else None


def _write(original: Callable, config: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True):
    if not any(_runs(part) for part in _parts(config)):
        return original(config, json_file_path, use_diff)
    sealed = seal(config, json.loads(config.to_json_string(use_diff=use_diff)))
    path = Path(json_file_path)
    path.write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for code in (__file__, *get_relative_import_files(__file__)):
        shutil.copyfile(code, path.with_name(Path(code).name))


def _read(original: Callable, cls: type, json_file: str | os.PathLike) -> dict[str, Any]:
    saved = original(cls, json_file)
    return unseal(saved) if isinstance(saved, dict) else saved  # what is no configuration is refused elsewhere


def _warn(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    config = getattr(model.get_base_model(), "config", None)
    parts = _parts(config) if isinstance(config, PreTrainedConfig) and config.model_type != OURS else ()
    if any(_computes(attention_of(part)) and not marked(part) for part in parts):
        logger.warning(
            "These adapters were trained with another attention than softmax, over weights that do not say so: loaded "
            "beside them, they run as softmax. Save the base model first (base.save_pretrained(FOLDER)), load it from "
            "there and adapt that, or save merge_and_unload()."
        )
    return original(model, *args, **kwargs)


def _choose(original: Callable, model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any):
    name = marked(model.config)
    if attn_implementation in REGISTERED and model.config.model_type != OURS:
        if name is not None:
            return original(model, attn_implementation, *args, **kwargs)
        raise ValueError(
            f"{type(model).__name__} cannot run with attn_implementation={attn_implementation!r}, which says how to "
            f"compute, and not what. Use one of {', '.join(map(repr, GUARDED))}."
        )
    if name is not None and attn_implementation is not None and _computes(attn_implementation) != name:
        raise ValueError(
            f"{type(model).__name__} cannot run with attn_implementation={attn_implementation!r}: these weights were "
            f"trained with {name!r}, and it computes something else. Leave it out. To train them on with softmax, "
            "load the configuration first, `del config.normalizer`, and pass it as config=..."
        )
    return original(model, attn_implementation or name, *args, **kwargs)


__all__ = ["SealedConfig", "install", "marked", "unmark", "unseal", "watch_adapters"]
