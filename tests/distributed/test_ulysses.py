"""DeepSpeed's sequence parallelism replaces an entry of the registry: two processes with half of every row each."""

import subprocess
import sys
from pathlib import Path

import torch
from training_runs import environment


def test_shards_of_packed_rows_equal_whole_rows(tmp_path):
    script = Path(__file__).with_name("ulysses.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for kind, result in torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True).items():
            shapes = {(shape, mask, tuple(positions.shape)) for shape, mask, positions in result["calls"]}
            assert shapes == {((3, 2, 16, 8), None, (3, 16))} and len(result["calls"]) == 2, "half of the heads each"
            torch.testing.assert_close(
                result["logits"], result["expected"], atol=2e-5, rtol=1e-5, msg=lambda m, k=kind: f"{k}: {m}"
            )
            for name, gradient in result["gradients"].items():
                torch.testing.assert_close(
                    gradient,
                    result["expected_gradients"][name],
                    atol=1e-3,
                    rtol=1e-4,
                    msg=lambda m, kind=kind, name=name: f"{kind} {name}: {m}",
                )
