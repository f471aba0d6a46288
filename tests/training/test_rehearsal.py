"""What this machine or its packages cannot do is one message before the data is prepared, never a traceback after."""

import pytest
import torch
from training_runs import write_recipe
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_softpick.errors import RecipeError
from hf_softpick.train import main
from hf_softpick.training import rehearsal
from hf_softpick.training.recipe_arguments import installed_name
from hf_softpick.training.recipe_model import ModelSettings

SETTINGS = ModelSettings(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
# torchao compiles each of them for half a minute.
COMPILED = {OptimizerNames.ADAMW_TORCH_4BIT, OptimizerNames.ADAMW_TORCH_8BIT}


def _arguments(**given):
    given = {installed_name(name): value for name, value in given.items()}
    return TrainingArguments(use_cpu=True, report_to="none", learning_rate=1e-3, **given)


@pytest.mark.parametrize("optim", sorted(set(OptimizerNames) - COMPILED))
def test_every_optimizer_works_or_is_refused_by_name(optim):
    """Which packages are installed decides; plain PyTorch is always there."""
    works = optim.value in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
    args = _arguments(optim=optim, optim_target_modules="all-linear" if "galore" in optim.value else None)
    try:
        rehearsal.rehearse(SETTINGS, args)
    except RecipeError as error:
        assert f"training.optim '{optim.value}'" in str(error) and not works


class _Broken(torch.optim.SGD):
    """Momentum that is forgotten with the state."""

    def state_dict(self):
        return super().state_dict() | {"state": {}}


class _Restless(torch.optim.SGD):
    """Moves without gradients."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3)


class _Averaged(torch.optim.SGD):
    """Keeps the weights to evaluate elsewhere, as schedule-free optimizers do."""

    def eval(self):
        """Swap them in."""


@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [
        (_Broken, "does not go on from its saved state"),
        (_Restless, "although the update is refused"),
        (_Averaged, "other weights than it would save"),
    ],
)
def test_optimizers_that_break_a_promise(monkeypatch, optimizer, fault):
    """Resumed runs are equal, refused updates change nothing, final/ holds what was evaluated."""
    handler = (optimizer, {"lr": 1e-2, "momentum": 0.9})
    monkeypatch.setattr(rehearsal.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: handler))
    with pytest.raises(RecipeError, match=fault):
        rehearsal.rehearse(SETTINGS, _arguments(optim="sgd"))


@pytest.mark.parametrize(("optim", "works"), [("adamw_torch_fused", True), ("adafactor", False)])
def test_optimizers_of_whole_matrices_under_zero(optim, works):
    """ZeRO hands out rows of numbers; adafactor would train otherwise than in one process, without a word."""
    args = _arguments(optim=optim)
    args.deepspeed_plugin = object()
    if works:
        rehearsal.rehearse(SETTINGS, args)
    else:
        with pytest.raises(RecipeError, match="whole matrices"):
            rehearsal.rehearse(SETTINGS, args)


def test_what_works_is_not_refused():
    """Names that transformers takes out before it calls PyTorch; a compiler without code to generate."""
    options = {"use_reentrant": True, "every_n_layers": 2}
    args = _arguments(activation_checkpointing=True, activation_checkpointing_kwargs=options)
    rehearsal.rehearse(SETTINGS, args)
    rehearsal.rehearse(SETTINGS, _arguments(torch_compile=True, torch_compile_backend="eager"))


def test_wandb_needs_a_login(tmp_path, monkeypatch):
    for name in ("HOME", "WANDB_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    args = TrainingArguments(use_cpu=True, report_to="wandb")
    with pytest.raises(RecipeError, match="report_to .*there is no login. Run `wandb login`, or set WANDB_MODE"):
        rehearsal.rehearse(SETTINGS, args)
    monkeypatch.setenv("WANDB_MODE", "offline")
    rehearsal.rehearse(SETTINGS, args)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose data is missing, which would be exit code 3."""
    return write_recipe(tmp_path_factory.mktemp("rehearsal"), data={"sources": [{"path": "missing.jsonl"}]})


SOFTMAX = "model.normalizer=softmax"
CONTEXT = "training.dataloader_multiprocessing_context=foo"
RESTARTS = "training.lr_scheduler_type=cosine_with_restarts"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.dataloader_persistent_workers=true"], "needs num_workers > 0"),
        ([CONTEXT, "training.dataloader_num_workers=1"], "multiprocessing_context option should specify"),
        (["training.torch_compile_backend=foo"], "training.torch_compile_backend 'foo' cannot be used here"),
        (["training.torch_compile_mode=foo"], "with torch_compile_mode 'foo' cannot be used here"),
        ([SOFTMAX, "model.attn_implementation=flash_attention_2"], "'flash_attention_2' cannot be used here"),
        ([SOFTMAX, "model.attn_implementation=flex_attention"], "'flex_attention' cannot be used here"),
        (["training.activation_checkpointing_kwargs={foo: 1}"], "training.activation_checkpointing_kwargs cannot"),
        ([RESTARTS, "training.lr_scheduler_kwargs={num_cycles: x}"], "training.lr_scheduler_kwargs"),
        (["training.optim=schedule_free_adamw"], "trains other weights than it would save"),
        (["training.optim_target_modules=[mlp]"], "belongs to the galore and apollo optimizers"),
        (["training.ddp_backend=foo"], "expected one of nccl, gloo"),
        (["training.bf16_full_eval=true"], "validation computes as training does"),
    ],
)
def test_refused_before_the_data(recipe, capsys, overrides, message):
    """Each of these was a traceback after hours of tokenizing, or did nothing."""
    if torch.cuda.is_available() and SOFTMAX in overrides:
        pytest.skip("a GPU may be able to")
    assert main([str(recipe), "training.use_cpu=true", *overrides]) == 2
    assert message in capsys.readouterr().err
