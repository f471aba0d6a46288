"""Compare two or more runs: recipes, loss, attention, activations, quantization, tasks, and the paper's claims.

    python eval/compare.py RUN_A RUN_B [...] --out DIR

Writes DIR/comparison.html (one file, no network), comparison.md and comparison.json from what the runs recorded and
from the results in their report folders. What is missing is named with the command that measures it; --measure does
it first; if that fails, the report says so and the exit code is the measurement's. Statistics and quantization are
measured on the text of each run's recipe, or, if a model has no run, on that of the first run for all; --data,
--seq-len and --samples choose another. Exit codes: 0 done, 2 command line, 3 data, 4 no model, 6 storage.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import add_number

from hf_softpick.commands import exit_code
from hf_softpick.errors import DataError, RecipeError, StorageError, UserError

# Of this folder, by the kind of result that they write.
SCRIPTS = {"statistics": "activations.py", "passkey": "passkey.py", "quantization": "quantization.py"}
# Of these, the kinds that are measured on rows of text.
ON_TEXT = ("statistics", "quantization")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compare, print where the report is; returns the exit code."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: compare(options), debug=options.debug)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python eval/compare.py", description="Compare runs: one HTML page, Markdown and JSON."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; model folders or Hub ids have no curves")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the report")
    parser.add_argument("--results", metavar="DIR", help="look for results in DIR/NAME/ before the runs' report/")
    first = f"measure first, comma-separated: {', '.join(SCRIPTS)}"
    parser.add_argument("--measure", metavar="KINDS", type=_kinds, default=(), help=first)
    text = parser.add_argument_group("text", "the same for all, with --measure statistics or quantization")
    text.add_argument(
        "--data",
        metavar="RECIPE|FILE|DATASET",
        help="default each run's recipe; if a model has no run, the first run's for all",
    )
    add_number(text, "--seq-len", "tokens of a row; default the recipe's", least=2)
    add_number(text, "--samples", "rows")
    maps = parser.add_argument_group("attention maps")
    maps.add_argument("--text", help="short text that the maps are drawn of")
    maps.add_argument(
        "--heads", type=_heads, metavar="LAYER.HEAD,...", help="default the largest sink and a typical head"
    )
    maps.add_argument("--no-maps", action="store_true", help="load no model")
    maps.add_argument("--device", help="for example cpu or cuda:0; default the GPU where there is one")
    maps.add_argument("--trust-remote-code", action="store_true", help="run the models' own code, if any")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(filter(None, text.split(",")))
    if unknown := [kind for kind in kinds if kind not in SCRIPTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(SCRIPTS)}")
    return kinds


def _heads(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(part) for part in item.split(".")) for item in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}, expected layer.head pairs such as 0.1,3.2")
    return pairs


def compare(options: argparse.Namespace) -> int:
    """Measure what was asked for, gather, judge, write."""
    from hf_softpick.analysis.claims import judge
    from hf_softpick.analysis.comparison import gather
    from hf_softpick.analysis.report_html import render_html
    from hf_softpick.analysis.report_markdown import render_markdown
    from hf_softpick.analysis.report_sections import verdict_text
    from hf_softpick.files import write_json, write_text

    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be made: {error.strerror}. Choose another folder.") from None
    results = Path(options.results) if options.results else None
    if results is not None and not results.is_dir():
        raise RecipeError(f"--results {results} is not a folder")
    with damaged_results():
        gather(options.runs, results)  # wrong folders are named before anything long begins
    text = text_arguments(options)
    failed = [(kind, *failure) for kind in options.measure for failure in measure(kind, options, text)]
    with damaged_results():
        comparison = gather(options.runs, results)
    comparison["warnings"] += [f"Measuring {kind} of {run} ended with exit code {code}." for kind, run, code in failed]
    if not options.no_maps:
        add_maps(comparison, options)
    with damaged_results():
        comparison["claims"] = judge(comparison)
        markdown, page = render_markdown(comparison), render_html(comparison)
    write_json(out / "comparison.json", comparison)
    write_text(out / "comparison.md", markdown)
    write_text(out / "comparison.html", page)
    for row in comparison["claims"]:
        print(f"{verdict_text(row):<21} {row['claim']}: {row['detail']}")
    for text in comparison["warnings"]:
        print(f"note: {text}", file=sys.stderr)
    print(f"report in {out / 'comparison.html'}")
    return failed[0][2] if failed else 0


def text_arguments(options: argparse.Namespace) -> list[str]:
    """What the measuring scripts are told about the text, so that all models read the same; a choice is printed.

    Raises:
        RecipeError: text was chosen, but nothing is measured on it.
    """
    from hf_softpick.analysis.loading import locate
    from hf_softpick.analysis.run_records import read_recipe

    given = {"--data": options.data, "--seq-len": options.seq_len, "--samples": options.samples}
    measured = [kind for kind in options.measure if kind in ON_TEXT]
    if not measured:
        if names := [name for name, value in given.items() if value is not None]:
            raise RecipeError(f"{', '.join(names)} need --measure with {' or '.join(ON_TEXT)}")
        return []
    folders = [locate(run)[1] for run in options.runs]
    first = next((folder for folder in folders if folder is not None), None)
    if options.data is None and None in folders and first is not None:
        given["--data"] = str(first / "recipe.yaml")
        length = (read_recipe(first / "recipe.yaml") or {}).get("data.seq_len")
        given["--seq-len"] = options.seq_len or length
        without = ", ".join(run for run, folder in zip(options.runs, folders, strict=True) if folder is None)
        rows = f", rows of {given['--seq-len']} tokens" if given["--seq-len"] else ""
        print(f"{without} has no run of its own: all are measured on {given['--data']}{rows}", flush=True)
    return [part for name, value in given.items() if value is not None for part in (name, str(value))]


@contextlib.contextmanager
def damaged_results() -> Iterator[None]:
    """Result files are written by our commands; one that was changed by hand is an error of data, wherever it shows.

    Raises:
        DataError: what was met instead of what belongs there; its cause has the place.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"a result file of these runs holds what does not belong there ({type(error).__name__}: {error}). Measure "
            "again with --measure, or see where with --debug."
        ) from error


def measure(kind: str, options: argparse.Namespace, text: Sequence[str] = ()) -> list[tuple[str, int]]:
    """Run the script of `kind` on all runs, each in turn, so that one model is in memory at a time.

    `text` is what `text_arguments` returns.

    Returns:
        (run, exit code) of those that failed; the script has said why.
    """
    from hf_softpick.analysis.loading import locate

    failed = []
    command = [sys.executable, str(Path(__file__).with_name(SCRIPTS[kind]))]
    extra = ["--device", options.device] if options.device else []
    extra += text if kind in ON_TEXT else []
    extra += ["--trust-remote-code"] if options.trust_remote_code else []
    for run in options.runs:
        out = ["--out", str(Path(options.results, locate(run)[2]))] if options.results else []
        if code := subprocess.run([*command, run, *extra, *out]).returncode:
            failed.append((run, code))
    return failed


def add_maps(comparison: dict, options: argparse.Namespace) -> None:
    """Load each model and keep the maps of some heads; a model that cannot show them says why in the report."""
    from tqdm import tqdm

    from hf_softpick.analysis.attention_maps import DEFAULT_TEXT, attention_maps
    from hf_softpick.analysis.loading import load_model

    text = options.text if options.text is not None else DEFAULT_TEXT
    for run in tqdm(comparison["runs"], desc="attention maps", disable=not sys.stderr.isatty()):
        if not run["has_model"]:
            run["attention_maps_reason"] = "not finished"
            continue
        try:
            loaded = load_model(
                run["source"], trust_remote_code=options.trust_remote_code, device=options.device, dtype="float32"
            )
            run["attention_maps"] = attention_maps(loaded, text, options.heads, run["statistics"])
        except RecipeError:
            raise
        except UserError as error:
            run["attention_maps_reason"] = str(error)
            comparison["warnings"].append(f"{run['label']}: no attention maps. {error}")


if __name__ == "__main__":
    sys.exit(main())
