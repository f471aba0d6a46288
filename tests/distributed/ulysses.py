"""Run by two processes, gloo on CPU: what a shard of packed rows gives under DeepSpeed's Ulysses, and what whole rows
give in one process, is saved as rank-N.pt of a folder."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
from tiny_foreign import foreign_model
from tiny_softpick import tiny_model, tokens

LENGTHS = ((5, 9, 2), (16,), (8, 8))  # the boundary of the shards lies inside a document, twice, and between two
MODELS = {
    "softpick": lambda: tiny_model("softpick", "tiled"),
    "window": lambda: tiny_model("softpick", "tiled", sliding_window=4),
    "scaled_softpick": lambda: tiny_model("scaled_softpick", "tiled"),
    "llama": lambda: foreign_model("llama", "softpick", initializer_range=0.2),
}


def outcome(model, ids, positions):
    """Logits, and every gradient of their squares' sum."""
    model.zero_grad()
    logits = model(ids, position_ids=positions, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ids = dist.get_rank(), tokens(len(LENGTHS), 16)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    half = slice(8 * rank, 8 * rank + 8)
    results = {}
    for kind, make in MODELS.items():
        model = make()
        expected, gradients = outcome(model, ids, positions)
        name, calls = model.config._attn_implementation, []
        core = ALL_ATTENTION_FUNCTIONS[name]
        ALL_ATTENTION_FUNCTIONS[name] = lambda module, q, k, v, mask, core=core, calls=calls, **named: (
            calls.append((tuple(q.shape), mask, named["position_ids"])) or core(module, q, k, v, mask, **named)
        )
        UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation=name, sequence_parallel_size=2, micro_batch_size=len(LENGTHS)
        )
        parallel_state_sp.initialize_sequence_parallel = lambda **named: None  # the groups are made once a process
        logits, parts = outcome(model, ids[:, half], positions[:, half])
        for part in parts.values():
            dist.all_reduce(part)
        del ALL_ATTENTION_FUNCTIONS[name]
        results[kind] = dict(
            logits=logits, expected=expected[:, half], gradients=parts, expected_gradients=gradients, calls=calls
        )
    torch.save(results, Path(sys.argv[1]) / f"rank-{rank}.pt")
    dist.destroy_process_group()
