"""lm-eval's model for Hugging Face with one progress bar a task, and a count of the prompts that it cuts."""

import math
from collections import Counter
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm.auto import tqdm


class QuietHFLM(HFLM):
    """HFLM whose rolling tasks, scored window by window, show one bar with the time left. It computes nothing else.

    requests, truncated: by task, how many prompts there were, and how many lost their beginning because they are
    longer than the model reads. Rolling tasks have none: their windows cover the whole text.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.requests: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self._asking: list[str] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, nats."""
        self._asking = [request.task_name for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._asking = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each prompt."""
        for request in requests:
            prompt, options = request.args
            room = self.max_length - normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            self._count(request.task_name, len(self.tok_encode(prompt)) > room)
        return super().generate_until(requests, disable_tqdm)

    def _count(self, task: str, is_truncated: bool) -> None:
        self.requests[task] += 1
        self.truncated[task] += is_truncated

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, nats."""
        windows = sum(math.ceil(len(self.tok_encode(request.args[0])) / self.max_length) for request in requests)
        with tqdm(total=windows, desc="Scoring windows of text", disable=disable_tqdm) as self._windows:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        is_rolling = override_bs is not None
        for task, (_, context, continuation) in zip(self._asking, requests, strict=False):
            # The last token of the continuation is predicted, and not read.
            self._count(task, len(context) + len(continuation) > self.max_length + 1)
        answers = super()._loglikelihood_tokens(requests, disable_tqdm or is_rolling, override_bs)
        if is_rolling:
            self._windows.update(len(requests))
        return answers
