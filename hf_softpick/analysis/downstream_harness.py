"""lm-eval's model for Hugging Face with one progress bar a task, where it shows one for every batch."""

import math
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm


class QuietHFLM(HFLM):
    """HFLM whose rolling tasks, scored window by window, show one bar with the time left. It computes nothing else."""

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, nats."""
        windows = sum(math.ceil(len(self.tok_encode(request.args[0])) / self.max_length) for request in requests)
        with tqdm(total=windows, desc="Scoring windows of text", disable=disable_tqdm) as self._windows:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        is_rolling = override_bs is not None
        answers = super()._loglikelihood_tokens(requests, disable_tqdm or is_rolling, override_bs)
        if is_rolling:
            self._windows.update(len(requests))
        return answers
