"""What the measuring commands of this folder share: options for models and text, the place of results.

    parser = argparse.ArgumentParser(...)
    add_number(parser, "--limit", "documents")       an option that takes an integer
    add_sample_arguments(parser)                     --data, --split, --text-column, --data-name, --seq-len, --samples
    add_model_arguments(parser)                      MODEL..., --out, --device, --dtype, --attn-implementation, ...
    options = parser.parse_args(arguments)
    return exit_code(lambda: measure(options), debug=options.debug)        hf_softpick.commands.exit_code

    check_text(options, model)                       what is wrong with the text is said before the model is loaded
    loaded = load(options, model)                    analysis.loading.LoadedModel
    samples = samples_for(options, loaded)           analysis.samples.Samples
    path = report_folder(options, loaded.path, ...)  where results go

A script of this folder is run as `python eval/NAME.py`, so that `import common` finds this file. Nothing heavy is
imported before an option is used.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_softpick.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from hf_softpick.analysis.loading import LoadedModel
    from hf_softpick.analysis.samples import Samples
    from hf_softpick.data.settings import DataSettings, SourceSettings, TokenizerSettings

DEFAULT_SEQ_LEN = 512


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL [MODEL ...] and how to load them, --out and --debug."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a run folder, a model folder or a Hub id")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results; default report/ of the run, else report/NAME/"
    )
    parser.add_argument("--device", help="for example cpu or cuda:0; default the GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; default that of the saved weights")
    parser.add_argument("--attn-implementation", metavar="NAME", help="default what the saved configuration says")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code, where it has some")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_sample_arguments(parser: argparse.ArgumentParser, samples: int = 32) -> None:
    """The text to measure on; `samples` is the default number of rows."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        metavar="RECIPE|FILE|DATASET",
        help="a recipe (.yaml: its validation split), a file, glob or folder of text, a Hub data set, or stdlib; "
        "default the recipe of the model's run, else stdlib",
    )
    group.add_argument("--data-name", metavar="NAME", help="configuration of a Hub data set")
    group.add_argument("--split", default="train", help="split of a Hub data set (default train)")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default text")
    length = f"tokens of a row; default the recipe's, else {DEFAULT_SEQ_LEN} or what the model can read"
    add_number(group, "--seq-len", length, least=2)
    add_number(group, "--samples", "rows", default=samples)


def add_number(
    parser: Any, name: str, help: str, *, least: int = 1, most: int | None = None, default: int | None = None
) -> None:
    """An option that takes an integer from `least` to `most`; its help ends with its default, where it has one."""
    told = "" if default is None else f" (default {default})"
    parser.add_argument(name, type=at_least(least, most), default=default, metavar="N", help=help + told)


def at_least(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer of at least `smallest`, at most `largest` if given."""
    allowed = f"an integer of at least {smallest}" + ("" if largest is None else f" and at most {largest}")

    def integer(text: str) -> int:
        right = text.isascii() and text.isdigit() and int(text) >= smallest
        if not right or (largest is not None and int(text) > largest):
            raise argparse.ArgumentTypeError(f"{text!r}, expected {allowed}")
        return int(text)

    return integer


def load(options: argparse.Namespace, model: str, **kwargs: Any) -> "LoadedModel":
    """`analysis.loading.load_model` with the options of `add_model_arguments`; `kwargs` win over them."""
    from hf_softpick.analysis.loading import load_model

    names = ("trust_remote_code", "device", "dtype", "attn_implementation")
    return load_model(model, **{name: getattr(options, name) for name in names} | kwargs)


def check_text(options: argparse.Namespace, model: str) -> None:
    """Look at the text that `samples_for` will read, before anybody waits for the model to be loaded.

    Raises:
        RecipeError, DataError: as `samples_for`. CheckpointError: there is no such model.
    """
    from hf_softpick.analysis import samples
    from hf_softpick.analysis.loading import locate

    samples.check_text(_text(options, locate(model)[1])[0])


def _text(
    options: argparse.Namespace, run: Path | None
) -> "tuple[DataSettings | SourceSettings, TokenizerSettings | None, int | None]":
    """What the options say of text: the data and tokenizer of a recipe or a source, and the length of a row."""
    from hf_softpick.data.settings import SourceSettings

    data = str(run / "recipe.yaml") if options.data is None and run is not None else options.data
    if data is not None and data.endswith((".yaml", ".yml")):
        from hf_softpick.analysis.samples import as_launched
        from hf_softpick.training.recipe import load_recipe

        if not Path(data).is_file():
            raise RecipeError(f"--data {data}: no such recipe. Give a file, or other text.")
        recipe = load_recipe(data)
        sections = as_launched(Path(data).parent, recipe.data, recipe.tokenizer)
        return *sections, options.seq_len or recipe.data.seq_len
    source = SourceSettings(
        path=data or "stdlib", text_column=options.text_column, split=options.split, name=options.data_name
    )
    return source, None, options.seq_len


def samples_for(options: argparse.Namespace, loaded: "LoadedModel", calibration: bool = False) -> "Samples":
    """Rows for one model, as the options of `add_sample_arguments` say.

    Raises:
        RecipeError: --data names a recipe that is wrong.
        DataError: nothing can be read.
    """
    from hf_softpick.analysis.samples import load_samples, one_document_a_row
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig

    data, tokenizer_settings, seq_len = _text(options, loaded.run)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if seq_len is not None and longest is not None and seq_len > longest:
        if options.seq_len is not None:
            raise RecipeError(f"--seq-len {seq_len} is longer than the {longest} tokens that {loaded.name} reads.")
        seq_len = longest
    embeddings = loaded.model.get_input_embeddings().num_embeddings
    if len(loaded.tokenizer) > embeddings:
        raise CheckpointError(
            f"{loaded.name}: the tokenizer has {len(loaded.tokenizer)} tokens, the model {embeddings}. They do not "
            "belong together."
        )
    samples = load_samples(
        data,
        loaded.tokenizer,
        add_bos=loaded.add_bos,
        seq_len=seq_len or min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN),
        count=options.samples,
        tokenizer_settings=tokenizer_settings,
        calibration=calibration,
        progress=sys.stderr.isatty(),
    )
    ours = loaded.model.config.model_type == SoftpickConfig.model_type
    return samples if ours else one_document_a_row(samples)  # not every architecture keeps packed documents apart


def report_folder(options: argparse.Namespace, model: str) -> Path:
    """Where the results of `model`, one of options.models, go: --out, else report/ of its run, else report/NAME/."""
    from hf_softpick.analysis.loading import locate

    _, run, name = locate(model)
    if options.out is not None:
        names = []
        for other in options.models:
            with contextlib.suppress(CheckpointError):  # is said when its turn comes
                names.append(locate(other)[2])
        if names.count(name) > 1:
            raise RecipeError(f"--out: two of the models are called {name}. Give each an --out of its own.")
        return Path(options.out, name) if len(options.models) > 1 else Path(options.out)
    return run / "report" if run is not None else Path("report", name)
