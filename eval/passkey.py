"""Passkey retrieval: does a model find a number in its context, by length and depth of the context?

    python eval/passkey.py RUN [RUN ...]
    python eval/passkey.py RUN --lengths 512,1024,8192 --beyond --samples 20

Lengths are tokens of prompt and answer together; default powers of two up to the trained length. Writes passkey.json
and passkey.png. Exit codes: 0 done, 2 command line or a length beyond the trained one, 4 model, 6 storage.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import add_model_arguments, add_number, at_least, load, report_folder

from hf_softpick.commands import exit_code
from hf_softpick.files import write_json
from hf_softpick.versions import versions

# There are 90,000 keys of five digits; drawing most of them takes long.
MOST_DISTRACTORS = 99


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print the grid; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=_list_of(at_least(1)), metavar="N,...", help="tokens")
    parser.add_argument("--depths", type=_list_of(_share), default=None, metavar="X,...", help="from 0 to 1")
    parser.add_argument("--beyond", action="store_true", help="allow lengths beyond the trained one")
    add_number(parser, "--samples", "prompts a cell", default=10)
    add_number(parser, "--distractors", "other numbers to choose from", most=MOST_DISTRACTORS, default=9)
    add_number(parser, "--seed", "of numbers and filler", least=0, default=0)
    add_number(parser, "--batch-size", "prompts at once; default what fits")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options), debug=options.debug)


def _list_of(kind):
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 0 to 1")
    return value


def _run(options: argparse.Namespace) -> None:
    from hf_softpick.analysis.loading import describe
    from hf_softpick.analysis.passkey import DEPTHS, passkey_grid, plot_grid

    for source in options.models:
        folder, begin = report_folder(options, source), time.perf_counter()
        loaded = load(options, source)
        head = {"schema": 1, "kind": "passkey", "model": describe(loaded), "versions": versions()}

        def save(result: dict[str, Any], folder=folder, begin=begin, head=head) -> None:
            write_json(folder / "passkey.json", head | {"seconds": round(time.perf_counter() - begin, 3)} | result)

        result = passkey_grid(
            loaded,
            options.lengths,
            sorted(set(options.depths or DEPTHS)),
            samples=options.samples,
            distractors=options.distractors,
            seed=options.seed,
            beyond=options.beyond,
            batch_size=options.batch_size,
            progress=sys.stderr.isatty(),
            after_length=save,
        )
        plot_grid(result, folder / "passkey.png", f"{loaded.name}: passkey retrieval")
        print(_format(loaded.name, result))
        print(f"{folder / 'passkey.json'}, {folder / 'passkey.png'}\n")
        del loaded  # before the next one is read


def _format(name: str, result: dict[str, Any]) -> str:
    count, chance = result["samples"], result["choice_chance"]
    lines = [
        f"{name}: share found, written / chosen among {round(1 / chance)} numbers, "
        f"of {count} prompt{'s' if count > 1 else ''} a cell; chance 0.00 / {chance:.2f}"
    ]
    lines.append("tokens  " + "".join(f"{f'depth {depth:g}':>14}" for depth in result["depths"]))
    for length, written, chosen in zip(result["lengths"], result["accuracy"], result["choice_accuracy"], strict=True):
        cells = "".join(f"{f'{a:.2f} / {b:.2f}':>14}" for a, b in zip(written, chosen, strict=True))
        lines.append(f"{length:<8}{cells}")
    lines += [f"{one['length']:<8}not measured: {one['reason']}" for one in result["refused"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
