"""What a recipe asks of this machine and its packages, tried on a toy before the data is prepared.

Each check runs the code that training would run, so that it needs no list of what is known to fail.
"""

import copy
import io
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_softpick.errors import RecipeError
from hf_softpick.modeling.attention_triton import TRITON, refuse
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM
from hf_softpick.training.recipe_arguments import installed_name
from hf_softpick.training.recipe_model import SOFTMAX_ONLY, ModelSettings


def rehearse(settings: ModelSettings, args: TrainingArguments) -> None:
    """Try attention, optimizer, compiler, data loader and reporters.

    Raises:
        RecipeError: one of them cannot do here what the recipe asks for.
    """
    check_attention(settings, args.device)
    _try("training.dataloader_*", _load, args)
    _try(f"training.report_to {args.report_to}", _report, args)
    _try("training.activation_checkpointing_kwargs", _checkpoint, args)
    toy = _try(f"model.attn_implementation '{settings.attn_implementation}'", _run, settings, args)
    if args.torch_compile:
        mode = f" with torch_compile_mode '{args.torch_compile_mode}'" if args.torch_compile_mode else ""
        _try(f"training.torch_compile_backend '{args.torch_compile_backend}'{mode}", _compile, args)
    if settings.from_ is not None and args.optim_target_modules is not None:
        # Other architectures have other names; that this one can be used at all is tried.
        args = copy.copy(args)
        args.optim_target_modules = "all-linear"
    _try(f"training.lr_scheduler_kwargs {args.lr_scheduler_kwargs}", _schedule, toy, args)
    fault = _try(f"training.optim '{args.optim.value}'", _optimize, toy, args)
    if fault is not None:
        raise RecipeError(f"training.optim '{args.optim.value}' {fault}. Use adamw_torch_fused or adamw_torch.")


def check_attention(settings: ModelSettings, device: torch.device) -> None:
    """Refuse GPU kernels that cannot run on `device`.

    Raises:
        RecipeError: why not, and what to use instead.
    """
    if settings.attn_implementation not in TRITON:
        return
    head_dim = settings.head_dim or (settings.hidden_size or 0) // (settings.num_attention_heads or 1)
    try:
        refuse(settings.attn_implementation, head_dim, device)
    except ValueError as error:
        raise RecipeError(f"model.{error}") from error


def _try(what: str, check: Callable, *inputs: Any) -> Any:
    try:
        return check(*inputs)
    except Exception as error:  # packages raise what they like
        reason = " ".join(str(error).split())[:500]
        raise RecipeError(f"{what} cannot be used here: {type(error).__name__}: {reason}") from error


def _load(args: TrainingArguments) -> None:
    DataLoader(
        [0],
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def _report(args: TrainingArguments) -> None:
    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()
    if "wandb" in args.report_to and args.process_index == 0:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise ValueError("there is no login. Run `wandb login`, or set WANDB_MODE=offline")


def _checkpoint(args: TrainingArguments) -> None:
    given = getattr(args, installed_name("activation_checkpointing_kwargs")) or {}
    passed_on = {name: value for name, value in given.items() if name not in ("every_n_layers", "offload")}
    inputs = torch.ones(1, 2, requires_grad=True)
    checkpoint(nn.Linear(2, 2), inputs, **{"use_reentrant": False, **passed_on}).sum().backward()


def _run(settings: ModelSettings, args: TrainingArguments) -> PreTrainedModel:
    """A layer of this package's model on the device, after one forward and backward pass."""
    special = settings.attn_implementation in SOFTMAX_ONLY
    width = settings.head_dim or (settings.hidden_size or 64) // (settings.num_attention_heads or 1)
    config = SoftpickConfig(
        normalizer="softmax" if special else "softpick",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=width if special else 32,
        attn_implementation=settings.attn_implementation if special else "eager",
    )
    model = SoftpickForCausalLM(config).to(args.device)  # AutoModel would shard it under ZeRO-3
    ids = torch.arange(64, device=args.device)[None]
    positions = torch.cat((torch.arange(24), torch.arange(40)))[None].to(args.device)
    with torch.autocast(args.device.type, torch.float16 if args.fp16 else torch.bfloat16, args.bf16 or args.fp16):
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    return model


def _compile(args: TrainingArguments) -> None:
    from accelerate.utils import TorchDynamoPlugin

    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    function = torch.compile(nn.Linear(8, 8).to(args.device), **plugin.to_kwargs())
    function(torch.ones(2, 8, device=args.device)).sum().backward()


def _schedule(toy: PreTrainedModel, args: TrainingArguments) -> None:
    steps = args.max_steps if args.max_steps > 0 else 1000
    scheduler = _stub(args).create_scheduler(steps, torch.optim.SGD(toy.parameters(), args.learning_rate))
    for factor in getattr(scheduler, "lr_lambdas", ()):
        # Warm-up, plateau and decay read their keywords when they are reached.
        if not all(math.isfinite(factor(steps * part // 8)) for part in range(9)):
            raise ValueError("the learning rate is not finite")


def _optimize(toy: PreTrainedModel, args: TrainingArguments) -> str | None:
    """What the optimizer cannot do of what every run here does; None: it can."""
    optimizer = _stub(args).create_optimizer(toy)
    if callable(getattr(optimizer, "eval", None)):
        return "trains other weights than it would save and evaluate"
    for seed in (0, 1):
        _update(toy, optimizer, seed)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    resumed = copy.deepcopy(toy)
    again = _stub(args).create_optimizer(resumed)
    saved.seek(0)
    try:
        again.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        return "saves a state that cannot be loaded without running its code"
    for model, each in ((toy, optimizer), (resumed, again)):
        _update(model, each, 2)
    if not _equal(toy, resumed):
        return "does not go on from its saved state as it would have gone on"
    toy.zero_grad(set_to_none=True)
    optimizer.step()
    if not _equal(toy, resumed):
        return "changes weights although the update is refused"
    if args.deepspeed_plugin is not None and not _elementwise(toy, args):
        return "works on whole matrices, which ZeRO cuts into pieces"
    return None


def _elementwise(toy: PreTrainedModel, args: TrainingArguments) -> bool:
    """Whether an update is the same for a matrix and for the row of its numbers."""
    flat = copy.deepcopy(toy)
    for module in flat.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().flatten()))
    for model in (toy, flat):
        _update(model, _stub(args).create_optimizer(model), 0)
    pairs = zip(toy.parameters(), flat.parameters(), strict=True)
    return all(torch.allclose(matrix.flatten(), row, rtol=0, atol=1e-2 * args.learning_rate) for matrix, row in pairs)


def _stub(args: TrainingArguments) -> Trainer:
    """A Trainer that can make optimizers and schedules as the real one does, and no more."""
    trainer = Trainer.__new__(Trainer)
    vars(trainer).update(args=args, model=None, optimizer=None, optimizer_cls_and_kwargs=None, lr_scheduler=None)
    return trainer


def _update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.device)
    optimizer.step()


def _equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
