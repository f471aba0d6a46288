"""Statistics of attention and activations, from one forward pass: sinks, sparsity, kurtosis, massive activations.

    python eval/activations.py MODEL [MODEL ...] [--data RECIPE|FILE|DATASET] [--seq-len N] [--samples N] [--out DIR]

Works for our models and for any causal LM of transformers that uses its attention interface, in memory linear in the
length. Writes statistics.json and statistics.png. Exit codes: 0 done, 2 command line, 3 data, 4 model, 5 NaN or Inf
inside the model (the results are written, the layers named), 6 storage.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import add_model_arguments, add_number, add_sample_arguments, check_text, load, report_folder, samples_for

from hf_softpick.commands import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add_number(parser, "--batch-size", "rows", default=1)
    add_number(parser, "--min-sink-tokens", "shorter documents do not count for sinks", default=32)
    add_sample_arguments(parser)
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    from hf_softpick.analysis.statistics_report import format_statistics, plot_statistics
    from hf_softpick.files import write_json

    results: dict[str, dict[str, Any]] = {}
    for source in options.models:
        folder = report_folder(options, source)
        result = measure_model(options, source)
        name = result["model"]["name"] if result["model"]["name"] not in results else source
        results[name] = result
        write_json(folder / "statistics.json", result)
        plot_statistics(result, folder / "statistics.png")
        print(f"{folder / 'statistics.json'}: {result['data']['description']}", flush=True)
    print()
    print(format_statistics(results))
    broken = {name: result["nonfinite"] for name, result in results.items() if result["nonfinite"]}
    for name, places in broken.items():
        where = ", ".join(f"layer {p['layer']} {p['where']} ({p['count']:,} values)" for p in places[:4])
        print(f"{name} has NaN or Inf inside, first in {where}; its figures there are not numbers", file=sys.stderr)
    return 5 if broken else 0


def measure_model(options: argparse.Namespace, source: str) -> dict[str, Any]:
    """statistics.json of one model, as plain values."""
    from tqdm import tqdm

    from hf_softpick.analysis.loading import describe
    from hf_softpick.analysis.samples import batches
    from hf_softpick.analysis.statistics import measure
    from hf_softpick.errors import CheckpointError
    from hf_softpick.versions import versions

    check_text(options, source)
    loaded = load(options, source)
    samples = samples_for(options, loaded)
    start = time.perf_counter()
    # Rows of one length go together, so their order is that of the batches.
    inputs = list(batches(samples, options.batch_size))
    progress = tqdm(inputs, desc=loaded.name, unit="batch", disable=not sys.stderr.isatty())
    try:
        statistics = measure(loaded.model, progress, options.min_sink_tokens)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    result = statistics.result(loaded.tokenizer, [row for batch in inputs for row in batch["input_ids"]])
    result["data"] = {"description": samples.description, "seq_len": statistics.row_length, **result["data"]}
    head = {"schema": 1, "kind": "statistics", "model": describe(loaded), "versions": versions()}
    return {**head, "seconds": round(time.perf_counter() - start, 3), **result}


if __name__ == "__main__":
    sys.exit(main())
