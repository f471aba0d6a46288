"""Training throughput on the CPU: softpick (tiled) against the same Llama with SDPA softmax, step by step in turns.

    python benchmarks/cpu_training.py [--repeats 9]

Promise: at least 0.9 of the peer's tokens/s for a 17M model at T=1024. Writes benchmarks/results/cpu_training.json.
"""

import argparse
import sys

import torch
from measure import MODEL_17M, alternate, quantile, ratio, record
from transformers import LlamaConfig, LlamaForCausalLM

from hf_softpick import SoftpickConfig, SoftpickForCausalLM

PROMISED_LENGTH, PROMISE = 1024, 0.9


def stepper(model: torch.nn.Module, tokens: torch.Tensor):
    """One optimizer step of a bare loop: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> int:
    """Measure, print one line a length, write the record; 1 if the promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rows = []
    for batch, length in ((4, 512), (2, 1024), (1, 2048)):
        torch.manual_seed(0)
        tokens = torch.randint(0, MODEL_17M["vocab_size"], (batch, length))
        softpick = SoftpickForCausalLM._from_config(SoftpickConfig(**MODEL_17M), attn_implementation="tiled")
        softmax = LlamaForCausalLM._from_config(LlamaConfig(**MODEL_17M), attn_implementation="sdpa")
        seconds = alternate({"softpick": stepper(softpick, tokens), "sdpa": stepper(softmax, tokens)}, repeats)
        speed = {name: round(batch * length / quantile(times, 0.5)) for name, times in seconds.items()}
        row = {
            "parameters": sum(p.numel() for p in softpick.parameters()),
            "shape": f"B{batch} T{length} fp32",
            "tokens_per_second": speed,
            "softpick / sdpa": ratio(seconds["sdpa"], seconds["softpick"]),
        }
        rows.append(row)
        r = row["softpick / sdpa"]
        print(
            f"training {row['parameters'] / 1e6:.1f}M {row['shape']:14} tokens/s softpick / sdpa = "
            f"{r['p50']:.2f} (p20 {r['p20']:.2f}, p80 {r['p80']:.2f})  {speed}",
            flush=True,
        )
    promised = next(row for row in rows if f"T{PROMISED_LENGTH} " in row["shape"])
    kept = promised["softpick / sdpa"]["p50"] >= PROMISE
    print(f"{'kept  ' if kept else 'MISSED'} tokens/s at T={PROMISED_LENGTH} >= {PROMISE} of SDPA")
    print(record("cpu_training", rows))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
