"""Encode batches of texts on all cores: threads of `tokenizers` by default, processes where those stop scaling.

Both give the same ids. What a batch is, and what becomes of the ids, is in tokenizing.py.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from hf_softpick.errors import DataError


@contextmanager
def encoders(encoder: Any, num_proc: int | None) -> Iterator[tuple[Callable, int]]:
    """A function that takes texts and returns a future of their ids and lengths, and how many to keep under way.

    Args:
        encoder: that of `encoder_of`.
        num_proc: processes; None or 1 uses the threads of `tokenizers` in this process.
    """
    if num_proc is None or num_proc == 1:
        # Encoding releases the interpreter lock: a second batch fills the cores while the first is converted.
        with ThreadPoolExecutor(2) as executor:
            yield partial(executor.submit, _encode, encoder), 2
        return
    executor = ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (encoder.to_str(),))
    try:
        yield partial(executor.submit, _encode_in_worker), num_proc + 2
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenizing process died, probably for lack of memory. Lower data.num_proc ({num_proc})."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _encode(encoder: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = [
        np.array(encoding.ids, np.uint32) for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]
    return np.concatenate(ids), np.array([len(part) for part in ids], np.int64)


_worker_encoder: Any = None


def _start_worker(serialized: str) -> None:
    """Runs once in each worker process; the switch for special tokens in text is not serialized."""
    global _worker_encoder
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    _worker_encoder = Tokenizer.from_str(serialized)
    _worker_encoder.encode_special_tokens = True


def _leave_with_parent() -> None:
    """A killed parent tells nobody, and its idle workers would wait for ever."""
    parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _encode(_worker_encoder, texts)
