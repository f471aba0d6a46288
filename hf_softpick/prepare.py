"""Tokenize and pack the data of a recipe once, for every run that uses it.

    python -m hf_softpick.prepare recipes/softpick_tiny.yaml [section.key=value ...]

Training does the same step by itself; this one needs no accelerator and prints what became of every document.
Exit codes: 0 done, 2 recipe or command line, 3 data, 6 storage.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_softpick.commands import exit_code

if TYPE_CHECKING:
    from hf_softpick.data.preparing import PreparedData


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, prepare, print the report; returns the exit code."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    interrupted = "interrupted; nothing half-written is kept, the same command starts again"
    return exit_code(lambda: _prepare(options), options.debug, interrupted)


def _prepare(options: argparse.Namespace) -> None:
    from hf_softpick.training.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from hf_softpick.data.preparing import prepare_data

    prepared = prepare_data(recipe.data, recipe.tokenizer, progress=not options.quiet)
    batch = recipe.training.arguments.get("per_device_train_batch_size", 8)
    prepared.require_rows(batch * recipe.training.arguments.get("gradient_accumulation_steps", 1))
    print(format_report(prepared))


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m hf_softpick.prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_softpick.prepare",
        description="Tokenize and pack the data of a recipe once, for every run that uses it.",
    )
    parser.add_argument("recipe", help="a recipe, for example recipes/softpick_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def format_report(prepared: "PreparedData") -> str:
    """What became of the documents, as a few lines of text."""
    report = prepared.report
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
    lines = [
        f"documents    {report['documents']:,} read ({report['megabytes']:,} MB used), dropped: {dropped}",
        f"tokens       {report['tokens']:,}, largest id {report['max_token_id']:,} of {report['vocab_size']:,}",
    ]
    for split in ("train", "validation"):
        if f"{split}_rows" in report:
            lines.append(
                f"{split:<12} {report[f'{split}_documents']:,} documents ({report[f'{split}_cut_documents']:,} cut), "
                f"{report[f'{split}_tokens']:,} tokens in {report[f'{split}_rows']:,} rows of {report['seq_len']:,}, "
                f"{report[f'{split}_padding']:.3%} padding"
            )
    for token, count in report.get("special_tokens_in_text", {}).items():
        lines.append(f"{'notice':<12} the special token {token!r} is {count:,} times a character of the text")
    lines += [f"{'notice':<12} {line}" for line in report["notices"]]
    lines += [f"{'commit':<12} {commit} of {path}" for path, commit in report.get("commits", {}).items()]
    seconds = ", ".join(f"{report[f'seconds_{step}']:.1f} s {step}" for step in ("tokenizer", "tokenizing", "packing"))
    lines.append(f"{'reused' if report['from_cache'] else 'prepared':<12} {prepared.directory} ({seconds})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
