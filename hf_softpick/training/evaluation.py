"""Token-weighted loss of a dataset: the same number for every batch size and every number of processes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def token_weighted_loss(
    model: nn.Module,
    dataset: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Mean negative log likelihood over every target token of `dataset`.

    Args:
        model: a causal LM (wrapped or not) whose loss is the mean over the shifted labels that are not -100.
        dataset: rows for `collate`; rank r takes rows r, r + world_size, ...
        batch_size: rows of one forward pass.

    Returns:
        loss (nats a token), perplexity, tokens (targets counted).
    """
    mine = range(rank, len(dataset), world_size)
    # Sharded models meet in every forward pass, so a rank that runs out of rows goes on with rows that count nothing.
    passes = math.ceil(math.ceil(len(dataset) / world_size) / batch_size)
    total = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for index in range(passes):
                rows = [dataset[row] for row in mine[index * batch_size : (index + 1) * batch_size]]
                inputs = collate(rows or [dataset[0]])
                if not rows:
                    inputs["labels"] = torch.full_like(inputs["labels"], -100)
                count = inputs["labels"][:, 1:].ne(-100).sum().item()
                loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
                if count:
                    total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    finally:
        model.train(training)
    if world_size > 1:
        shared = total.to(device)
        dist.all_reduce(shared)
        total = shared.cpu()
    loss = (total[0] / total[1]).item() if total[1] else math.nan
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": int(total[1].item())}
