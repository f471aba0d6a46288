"""Downstream quality by lm-eval, in its own format, with BOS as each model was trained.

    python eval/downstream.py RUN [RUN ...] --tasks paper
    python eval/downstream.py RUN --tasks offline,sciq --limit 100

`paper` is arc_easy, lambada_openai, piqa, sciq and wikitext, whose data comes from the Hub; `offline` are the tasks of
eval/tasks, which need no network. The figures are those of
`lm_eval --model hf --model_args pretrained=RUN/final,trust_remote_code=True --include_path eval/tasks --tasks ...`.
Writes downstream.json, its table downstream.md, and results_downstream.json, which is lm-eval's own, after every task.
What earlier calls measured on the same weights stays: a task is replaced only by a later measurement of it.
Exit codes: 0 done, 2 command line or unknown task, 3 a task failed (the others are saved), 4 model, 6 storage.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_model_arguments, add_number, load, report_folder

from hf_softpick.commands import exit_code
from hf_softpick.errors import DataError
from hf_softpick.versions import versions

TASKS = Path(__file__).resolve().parent / "tasks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="The figures are those of `lm_eval --model hf --include_path eval/tasks` with the same batch size.",
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", required=True, metavar="paper|NAME,...", help="tasks, groups or tags of lm-eval")
    parser.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="more task files of lm-eval"
    )
    parser.add_argument("--metadata", type=_json_object, metavar="JSON", help="for tasks that build their data")
    add_number(parser, "--batch-size", "sequences; default one that fits")
    add_number(parser, "--limit", "documents of each task, for trials")
    add_number(parser, "--num-fewshot", "examples in the prompt; default the task's", least=0)
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options), debug=options.debug)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}, expected an object such as {{"words": 1000}}')
    return value


def _run(options: argparse.Namespace) -> None:
    from hf_softpick.analysis.downstream import evaluate_tasks, find_tasks
    from hf_softpick.analysis.downstream_results import Report, failed, format_table
    from hf_softpick.analysis.loading import describe

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks, manager = find_tasks(options.tasks, [TASKS, *options.include_path], options.metadata)
    results, failures = {}, []
    for source in options.models:
        folder, begin = report_folder(options, source), time.perf_counter()
        loaded = load(options, source)
        own = loaded.run is not None and options.out is None
        report = Report(folder, describe(loaded), versions(), own)
        if report.dropped:
            print(report.dropped)

        def save(result: dict[str, Any], lm_eval_result: dict[str, Any], report=report, begin=begin) -> None:
            report.save(result, lm_eval_result, time.perf_counter() - begin)

        result, _ = evaluate_tasks(
            loaded,
            tasks,
            manager,
            batch_size=options.batch_size,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            after_task=save,
        )
        name = loaded.name if loaded.name not in results else source
        results[name] = report.joined(result)
        print(f"{name}: {folder / 'downstream.json'} (batch size {result['batch_size']}, {result['batch_size_from']})")
        failures += [f"{name}: {task}: {result['tasks'][task]['error']}" for task in failed(result)]
        del loaded  # before the next one is read
    print(f"\n{format_table(results)}")
    if failures:
        total = len(tasks) * len(options.models)
        listed = "\n".join(failures)
        raise DataError(f"{listed}\n{len(failures)} of {total} tasks failed; the others are saved.")


if __name__ == "__main__":
    sys.exit(main())
