"""What the command lines share: quiet imports, and messages with exit codes instead of tracebacks. Imports nothing
heavy."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from hf_softpick.errors import StorageError, UserError

INTERRUPTED = 130


def quiet_imports() -> None:
    """torchao and bitsandbytes report extensions for other machines than this one, torch the old calls that torchao
    makes, DeepSpeed that there is no GPU, whether it is used or not."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


@contextlib.contextmanager
def as_interrupt(*numbers: int) -> Iterator[None]:
    """Let these signals end what runs here as Ctrl-C does; outside the main thread Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(command: Callable[[], int | None], debug: bool = False, interrupted: str = "interrupted") -> int:
    """Run `command`; a user's mistake becomes one message and its exit code, Ctrl-C becomes 130.

    Args:
        command: returns its exit code, None for 0.
        debug: let a user's mistake show its traceback.
        interrupted: what to say after Ctrl-C.
    """
    quiet_imports()
    try:
        return command() or 0
    except UserError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if debug or error.errno is None:
            raise
        print(f"{error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
