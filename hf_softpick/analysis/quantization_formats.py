"""Quantized formats by name, each made by an installed library with its own defaults. No method is ours.

bitsandbytes, optimum-quanto, torchao and GPTQ are reached through transformers' quantization configs, HQQ, which
transformers 5.23 does not apply while loading, through its own call. All keep lm_head and embeddings in float.
Importing this imports nothing heavy, so that a wrong name is told at once.
"""

import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_softpick.errors import RecipeError, UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_softpick.analysis.loading import LoadedModel

GROUP_SIZES = (128, 64, 32)
"""Weights that share one scale; the largest that divides the rows of every layer is taken."""


class QuantizationRefused(UserError):
    """A library does not quantize this model here; the message is its reason."""


class Request(NamedTuple):
    """What a library is told. dtype: of what stays in float. group_size: weights that share one scale. texts: for
    calibration, empty where the format needs none."""

    dtype: "torch.dtype"
    device: "torch.device"
    group_size: int
    tokenizer: "PreTrainedTokenizerBase"
    texts: list[str]


class Format(NamedTuple):
    """One way to store weights.

    bits: of a weight, without scales. modules: what must be importable. distribution: whose version is told.
    config: makes the quantization_config of from_pretrained, or None where `apply` quantizes a loaded model in place.
    calibrated: needs texts.
    """

    name: str
    bits: int
    modules: tuple[str, ...]
    distribution: str
    config: Callable[[Request], Any] | None = None
    apply: Callable[["PreTrainedModel", Request], None] | None = None
    calibrated: bool = False


def _transformers(name: str, **settings: Any) -> Callable[[Request], Any]:
    """Makes a config class of transformers; a setting that is a function takes the request."""

    def config(request: Request) -> Any:
        import transformers

        known = {key: value(request) if callable(value) else value for key, value in settings.items()}
        return getattr(transformers, name)(**known)

    return config


def _torchao(name: str) -> Callable[[Request], Any]:
    def config(request: Request) -> Any:
        from torchao import quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, name)())

    return config


def _torchao_int4(request: Request) -> Any:
    """The values of Int4WeightOnlyConfig in a byte each: its own packed storage needs a GPU and mslk."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup
    from transformers import TorchAoConfig

    granularity = PerGroup(request.group_size)
    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, granularity, MappingType.ASYMMETRIC))


def _hqq(bits: int) -> Callable[["PreTrainedModel", Request], None]:
    def apply(model: "PreTrainedModel", request: Request) -> None:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        class Quiet(AutoHQQHFModel):
            """quantize_model does not hand on the switch of its two progress bars."""

            @classmethod
            def patch_model(cls, *args: Any, **kwargs: Any) -> None:
                super().patch_model(*args, **kwargs, verbose=False)

        config = BaseQuantizeConfig(nbits=bits, group_size=min(64, request.group_size), axis=1)
        Quiet.quantize_model(model, quant_config=config, compute_dtype=request.dtype, device=str(request.device))

    return apply


_BITSANDBYTES = (("bitsandbytes", "accelerate"), "bitsandbytes")
_QUANTO = (("optimum.quanto", "accelerate"), "optimum-quanto")
_TORCHAO = (("torchao",), "torchao")
_HQQ = (("hqq",), "hqq")
_GPTQ = (("gptqmodel", "optimum.gptq"), "gptqmodel")
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": attrgetter("dtype")}
_GPTQ_INT4 = {"bits": 4, "dataset": attrgetter("texts")} | {n: attrgetter(n) for n in ("group_size", "tokenizer")}

FORMATS = {
    item.name: item
    for item in (
        Format("bnb-int8", 8, *_BITSANDBYTES, config=_transformers("BitsAndBytesConfig", load_in_8bit=True)),
        Format("bnb-nf4", 4, *_BITSANDBYTES, config=_transformers("BitsAndBytesConfig", **_NF4)),
        Format("quanto-int8", 8, *_QUANTO, config=_transformers("QuantoConfig", weights="int8")),
        Format("quanto-int4", 4, *_QUANTO, config=_transformers("QuantoConfig", weights="int4")),
        Format("quanto-int2", 2, *_QUANTO, config=_transformers("QuantoConfig", weights="int2")),
        Format("torchao-int8", 8, *_TORCHAO, config=_torchao("Int8WeightOnlyConfig")),
        Format("torchao-int8-dynamic", 8, *_TORCHAO, config=_torchao("Int8DynamicActivationInt8WeightConfig")),
        Format("torchao-int4", 4, *_TORCHAO, config=_torchao_int4),
        Format("hqq-int8", 8, *_HQQ, apply=_hqq(8)),
        Format("hqq-int4", 4, *_HQQ, apply=_hqq(4)),
        Format("hqq-int2", 2, *_HQQ, apply=_hqq(2)),
        Format("gptq-int4", 4, *_GPTQ, config=_transformers("GPTQConfig", **_GPTQ_INT4), calibrated=True),
    )
}


def parse_formats(names: Sequence[str]) -> list[Format]:
    """The formats that `names` mean; each may hold several, with commas between them, and "all" means all.

    Raises:
        RecipeError: an unknown name.
    """
    wanted = list(dict.fromkeys(name for part in names for name in part.split(",") if name))
    unknown = [name for name in wanted if name != "all" and name not in FORMATS]
    if unknown or not wanted:
        what = f"unknown format {', '.join(unknown)}" if unknown else "no format is named"
        raise RecipeError(f"--formats: {what}. Give all, or some of {', '.join(FORMATS)}.")
    return list(FORMATS.values()) if "all" in wanted else [FORMATS[name] for name in wanted]


def missing(item: Format) -> str | None:
    """What has to be installed for a format, None if nothing."""
    for module in item.modules:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:  # of its parent
            found = None
        if found is None:
            return f"{module} is not installed"
    return None


def library(item: Format) -> str | None:
    """Name and version of what makes a format, None where it is not installed."""
    try:
        return f"{item.distribution} {importlib.metadata.version(item.distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def load_quantized(item: Format, load: Callable[..., "LoadedModel"], request: Request) -> "LoadedModel":
    """A model in one format.

    Args:
        load: `load_model` for the model in question; takes dtype and arguments of from_pretrained.

    Raises:
        QuantizationRefused: the library does not quantize it; whatever it raises becomes the reason.
    """
    with _captured() as messages:
        try:
            if item.config is not None:
                # A torch.device, not its name: bitsandbytes takes the name "cpu" for a wish to offload.
                return load(
                    dtype=request.dtype, device_map={"": request.device}, quantization_config=item.config(request)
                )
            loaded = load(dtype=request.dtype)
            item.apply(loaded.model, request)
            return loaded._replace(model=loaded.model.eval())
        except Exception as error:  # each library has its own
            raise QuantizationRefused(_reason(error, messages)) from error


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Collect what transformers logs, and do not print it: tables of all layers, the library's error among them."""
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = transformers_logging.get_logger("transformers")
    handlers, bars = list(logger.handlers), transformers_logging.is_progress_bar_enabled()
    logger.handlers = [Collector()]
    transformers_logging.disable_progress_bar()
    try:
        yield messages
    finally:
        logger.handlers = handlers
        if bars:
            transformers_logging.enable_progress_bar()


def _reason(error: Exception, messages: Sequence[str]) -> str:
    """One line: the library's own error if transformers logged it, else what was raised."""
    logged = re.findall(r"^(\w+(?:Error|Exception): .+)$", "\n".join(messages), re.MULTILINE)
    if logged:
        return logged[-1].strip()
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
