"""Turn a checkpoint of the ancestor or of the Llama family into a softpick checkpoint.

    python -m hf_softpick.convert SRC DST [--normalizer NAME] [--dtype TYPE]

Whatever cannot be expressed exactly is refused by name; docs/convert.md says what can.
Exit codes: 0 done, 2 command line, 4 the source cannot be converted, 6 storage.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_softpick.commands import as_interrupt, exit_code
from hf_softpick.modeling.normalizers import NORMALIZERS

DTYPES = ("float32", "bfloat16", "float16")
EXAMPLES = """
examples:
  the paper's models, as their trainer uploads them, one folder per step (ids are the Hub's, OWNER/NAME):
    python -m hf_softpick.convert zaydzuhri/softpick-340M-4096-batch16-steps100000-DATE models/softpick_340m \\
        --subfolder step-100000
  a checkpoint of their trainer that was never exported:
    python -m hf_softpick.convert exp/softpick/checkpoint/step-100000 models/softpick_340m \\
        --config configs/softpick_transformer_340M.json --tokenizer exp/softpick
  a Llama as the start of training with softpick:
    python -m hf_softpick.convert path/to/llama models/start --normalizer softpick

Tested on local copies of these formats with random weights; the published weights themselves were not downloaded.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, convert, print what was done; returns the exit code."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with as_interrupt(signal.SIGTERM):  # so that the half-written folder is removed
        return exit_code(lambda: _convert(options), options.debug, "interrupted; nothing half-written is kept")


def _convert(options: argparse.Namespace) -> None:
    from hf_softpick.conversion.converting import convert

    report = convert(
        options.source,
        options.destination,
        normalizer=options.normalizer,
        dtype=options.dtype,
        config=options.config,
        tokenizer=options.tokenizer,
        revision=options.revision,
        subfolder=options.subfolder,
        progress=not options.quiet,
    )
    print(format_report(report, options.destination))


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m hf_softpick.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_softpick.convert",
        description="Turn a checkpoint of the ancestor (flash-linear-attention's transformer) or of the Llama family "
        "into a softpick checkpoint. Whatever cannot be expressed exactly is refused by name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a folder (safetensors or distributed checkpoint) or a Hub id")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that does not exist or is empty")
    parser.add_argument("--normalizer", choices=NORMALIZERS, help="default: what the weights were trained with")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result; default: that of the source")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json for a distributed checkpoint")
    parser.add_argument("--tokenizer", metavar="SRC", help="folder or Hub id; default: what lies beside the weights")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", metavar="NAME", help="folder inside SRC, for example step-100000")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def format_report(report: dict[str, Any], destination: Path) -> str:
    """What was done, as a few lines of text."""
    source, target = report["source"], report["target"]
    lines = [
        f"source       {source['given']} ({source['model_type']}, {source['format']}, {source['normalizer']})",
        f"result       {destination} ({target['normalizer']}, {target['dtype']}, {target['parameters']:,} parameters)",
        f"tensors      {len(report['tensors'])} converted, {len(report['checked_and_not_stored'])} checked and not "
        f"stored, {len(report['dropped'])} dropped, {len(report['created'])} created; all read back bit-equal",
    ]
    if report["training_state_not_read"]:
        lines.append(f"left         {len(report['training_state_not_read'])} entries of training state")
    lines += [f"note         {note}" for note in report["notes"]]
    lines += [f"warning      {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
