"""For command lines: silence what packages print when transformers merely imports them. Imports nothing heavy."""

import logging


def quiet_imports() -> None:
    """torchao reports extensions for other machines than this one, torch the old calls that torchao makes."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
