"""The training command, with a NaN loss in step 2 and a NaN gradient in step 3 on rank 1; for test_launch.py.

Writes FOLDER/rank-R.json: a digest of weights and optimizer state after every step, as this rank sees them.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch

import hf_softpick.training.run as run_module
from hf_softpick.train import main
from hf_softpick.training.trainer import SoftpickTrainer

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv.pop(1))


class Poisoned(SoftpickTrainer):
    """Breaks the loss, or only its gradient, on rank 1; notes what every step leaves."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the base class, around a model whose loss is broken."""
        step = self.state.global_step + 1

        def broken(**kwargs):
            output = model(**kwargs)
            if RANK == 1 and step == 2:
                output["loss"] = output["loss"] * torch.nan
            if RANK == 1 and step == 3:
                # Value 0, derivative 0 * inf.
                output["loss"] = output["loss"] + 0 * torch.sqrt(output["loss"] - output["loss"])
            return output

        broken.training = model.training
        return super().compute_loss(broken, inputs, return_outputs, num_items_in_batch)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        digests.append(self.digest())

    def digest(self) -> str:
        """SHA-256 of all weights (gathered) and of this rank's optimizer state."""
        total = hashlib.sha256()
        for parameter in self.model.parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.is_deepspeed_enabled):
                total.update(parameter.detach().float().numpy().tobytes())
        optimizer = self.optimizer.optimizer
        for state in (optimizer.optimizer if self.is_deepspeed_enabled else optimizer).state.values():
            for value in state.values():
                total.update(torch.as_tensor(value).numpy().tobytes())
        return total.hexdigest()


if __name__ == "__main__":
    digests: list[str] = []
    run_module.SoftpickTrainer = Poisoned
    code = main()
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(digests))
    sys.exit(code)
