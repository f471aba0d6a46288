"""Command line of training: `accelerate launch -m hf_softpick.train RECIPE [section.key=value ...]`."""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence

from hf_softpick.commands import as_interrupt, quiet_imports
from hf_softpick.errors import CheckpointError, NumericsError, RecipeError, Stopped, StorageError, UserError

_EPILOG = """\
exit codes:
  0 done   2 recipe or configuration   3 data   4 no loadable checkpoint   5 too many non-finite updates
  6 storage   69 Hub or network, after training finished   75 stopped by a signal, the same command resumes

examples:
  accelerate launch -m hf_softpick.train recipes/softpick_tiny.yaml
  accelerate launch -m hf_softpick.train recipes/softpick_tiny.yaml training.learning_rate=1e-3 run.name=faster
  deepspeed --module hf_softpick.train recipes/softpick_340m.yaml training.deepspeed=recipes/deepspeed/zero3.json
"""


# What says that a disk is full, read-only or broken, whoever wrote to it.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_AGAIN = "Make room and run the same command again; it goes on from the newest checkpoint."


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; importing and calling this needs neither torch nor transformers."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_softpick.train",
        description="Pretrain the model of a recipe, or go on where the same command stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--dry-run", action="store_true", help="check and describe everything, train nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # The deepspeed launcher adds it.
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = make_parser().parse_intermixed_args(argv)
    try:
        # Before torch is imported: threads that wait by spinning slow a run tenfold as soon as others use the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        quiet_imports()
        # Heavy imports wait until the recipe is known to be right.
        from hf_softpick.training.recipe import load_recipe

        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            from hf_softpick.training.dry_run import describe

            text = describe(recipe)
            if int(os.environ.get("RANK", "0")) == 0:
                print(text)
            return 0
        from hf_softpick.training.run import run

        # Outside the training loop, which has handlers of its own, there is nothing to save: stop at once.
        with as_interrupt(signal.SIGTERM, signal.SIGUSR1):
            run(recipe, debug=options.debug)
        return 0
    except UserError as error:
        if options.debug:
            raise
        _print(error)
        if os.environ.get("RANK", "0") != "0":
            # A launcher ends all processes when the first one fails, so let rank 0 have its say first.
            time.sleep(2)
        return error.exit_code
    except OSError as error:
        if options.debug or error.errno not in _STORAGE:
            raise
        _print(StorageError(f"{error.filename or 'a file'} cannot be written: {error.strerror}. {_AGAIN}"))
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("\nhf_softpick: stopped outside the training loop; run the same command again.", file=sys.stderr)
        return Stopped.exit_code
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _print(error: UserError) -> None:
    """One message: what all ranks found comes from rank 0, what one rank found from that rank."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"hf_softpick: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, (RecipeError, CheckpointError, NumericsError, Stopped)):
        print(f"hf_softpick, rank {rank}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
