"""Loss of quantized models: stored bits against the increase of the loss, in every format whose library is installed.

    python eval/quantization.py RUN [RUN ...] [--formats all|NAME ...] [--data FILE] [--tasks NAME,...]

The model is loaded anew in each format and measured on the same rows. A format that is missing or refuses is named at
the end; one that leaves every weight in float is refused. Writes quantization.json after each format, and
quantization.png; with --out and several models also one picture of all.
Exit codes: 0 at least one format measured for every model, 2 command line, 3 data or nothing measured, 4 model,
6 storage.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_model_arguments, add_number, add_sample_arguments, check_text, load, report_folder, samples_for

from hf_softpick.commands import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument(
        "--formats", nargs="+", default=["all"], metavar="NAME", help="for example quanto-int4 bnb-nf4; default all"
    )
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-eval to evaluate in every format too")
    add_number(parser, "--limit", "documents of each task, for trials")
    add_number(parser, "--batch-size", "rows", default=4)
    add_sample_arguments(parser)
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    from hf_softpick.analysis.quantization_formats import parse_formats

    formats = parse_formats(options.formats)

    from hf_softpick.analysis.loading import describe
    from hf_softpick.analysis.quantization import measure_quantization
    from hf_softpick.analysis.quantization_results import format_last, format_table, plot_quantization
    from hf_softpick.files import write_json
    from hf_softpick.versions import versions

    evaluate = _evaluation(options) if options.tasks else None
    if not options.debug:
        warnings.filterwarnings("ignore")
        for name in ("bitsandbytes", "torchao", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, dict[str, Any]] = {}
    nothing = []
    for source in options.models:
        folder, begin = report_folder(options, source), time.perf_counter()
        check_text(options, source)
        head: dict[str, Any] = {"schema": 1, "kind": "quantization"}

        def samples_of(loaded: Any, calibration: bool, head: dict[str, Any] = head) -> Any:
            head["model"] = head.get("model") or describe(loaded)
            return samples_for(options, loaded, calibration)

        def save(result: dict[str, Any], folder: Path = folder, head: dict[str, Any] = head, begin=begin) -> None:
            if result["formats"]:  # the baseline alone does not replace an earlier file
                seconds = round(time.perf_counter() - begin, 3)
                write_json(
                    folder / "quantization.json", {**head, "versions": versions(), "seconds": seconds, **result}
                )
            if not sys.stderr.isatty():  # where no bar is drawn
                print(f"{head['model']['name']}: {format_last(result)}", file=sys.stderr, flush=True)

        result = measure_quantization(
            lambda source=source, **arguments: load(options, source, **arguments),
            samples_of,
            formats,
            batch_size=options.batch_size,
            evaluate=evaluate,
            after_each=save,
            progress=sys.stderr.isatty(),
        )
        name = head["model"]["name"] if head["model"]["name"] not in results else source
        results[name] = result
        plot_quantization({name: result}, folder / "quantization.png")
        print(f"\n{name}: {result['data']['description']}\n\n{format_table(result)}\n\n{folder / 'quantization.json'}")
        if evaluate:
            print(f"\n{_task_table(result, options.limit)}")
        if not any(entry["status"] == "measured" for entry in result["formats"]):
            nothing.append(name)
    if len(results) > 1 and options.out:
        path = Path(options.out, "quantization.png")
        plot_quantization(results, path)
        print(f"\nall models: {path}")
    if nothing:
        print(f"no format could be measured for {', '.join(nothing)}; the reasons stand above", file=sys.stderr)
        return 3
    return 0


def _evaluation(options: argparse.Namespace) -> Any:
    from hf_softpick.analysis.downstream import evaluate_tasks, find_tasks

    tasks, manager = find_tasks(options.tasks, [Path(__file__).resolve().parent / "tasks"])

    def evaluate(loaded: Any) -> dict[str, Any]:
        return evaluate_tasks(loaded, tasks, manager, limit=options.limit)[0]["tasks"]

    return evaluate


def _task_table(result: dict[str, Any], limit: int | None) -> str:
    from hf_softpick.analysis.downstream_results import format_table

    measured = {entry["format"]: entry for entry in result["formats"] if entry["status"] == "measured"}
    columns = {"as saved": result["baseline"], **measured}
    return format_table({name: {"tasks": entry["tasks"], "limit": limit} for name, entry in columns.items()})


if __name__ == "__main__":
    sys.exit(main())
