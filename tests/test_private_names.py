"""Private names of torch, transformers, accelerate and DeepSpeed stand in the two compat modules alone, read from the
syntax trees: what others may rename must fail a test by name (tests/modeling/test_compat.py), not a user's run."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
COMPAT = {ROOT / "hf_softpick/modeling/compat.py", ROOT / "hf_softpick/training/compat.py"}
FILES = sorted({*(ROOT / "hf_softpick").rglob("*.py"), *(ROOT / "eval").rglob("*.py")} - COMPAT)
LIBRARIES = {"torch", "transformers", "accelerate", "deepspeed"}
DECLARED = ast.literal_eval(
    re.search(r"^DECLARED = (\(.*?^\))", (ROOT / "tests/modeling/test_compat.py").read_text(), re.M | re.S)[1]
)
# NamedTuple's; Python's, datasets' and lm_eval's, which other tests run.
OTHERS = {"_asdict", "_fields", "_make", "_replace", "_exit", "_fingerprint", "_loglikelihood_tokens"}
OWNERS = (
    nn.Module(),
    LlamaForCausalLM,
    LlamaDecoderLayer,
    PreTrainedConfig(),
    Trainer,
    TrainerCallback,
    TrainingArguments,
    FileSystemReader,
    torch.optim.AdamW,
    torch.optim.lr_scheduler.LambdaLR,
)


def _is_private(name):
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def _inherited():
    """What a class of ours may have from theirs."""
    return {name for owner in OWNERS for name in dir(owner) if _is_private(name)}


THEIRS = _inherited()


def _found(source):
    """(line, name) of every private name in `source` that is theirs, as far as the text tells."""
    tree = ast.parse(source)
    of_self = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_own(node.value)}
    modules = {}  # local name -> what it imports of theirs
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.split(".")[0]] = alias.name
                if alias.name.split(".")[0] in LIBRARIES and any(map(_is_private, alias.name.split("."))):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                if any(map(_is_private, (*node.module.split("."), alias.name))):
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            # On self it is ours unless a class of theirs has it; on anything else it is not ours.
            if id(node) not in of_self or node.attr in THEIRS:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Attribute) and node.attr.startswith("ds_"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                for name in _defined(inner):
                    if name in THEIRS:
                        yield inner.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (_is_private(node.value) and node.value in THEIRS) or re.fullmatch(r"ds_[a-z]+", node.value):
                yield node.lineno, node.value


def _is_own(value):
    called = value.func if isinstance(value, ast.Call) else value
    return isinstance(called, ast.Name) and called.id in ("self", "cls", "super")


def _defined(node):
    if isinstance(node, ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign):
        yield node.target.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_stand_in_compat(path):
    found = [(line, name) for line, name in _found(path.read_text(encoding="utf-8"))]
    wrong = [f"line {line}: {name}" for line, name in found if name not in OTHERS and name not in DECLARED]
    assert not wrong, f"{wrong}: use what is public, or a function of hf_softpick/modeling/compat.py with its test"


@pytest.mark.parametrize(
    "line",
    [
        "from torch._decomp import register_decomposition",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "torch._assert_async(x, 'no')",
        "name = model.config._attn_implementation",
        "shape = getattr(p, 'ds_shape', p.shape)",
        "number = p.ds_id",
        "setattr(model, '_keys_to_ignore_on_save', names)",
        "class Mine(Trainer):\n    def _save_checkpoint(self, model, trial): ...",
        "class Mine(Trainer):\n    def save(self): super()._save(self.folder)",
        "class Mine(Trainer):\n    def skip(self): return self._get_grad_norm",
        "class Mine(LlamaForCausalLM):\n    _tied_weights_keys = {}",
    ],
)
def test_the_check_sees_a_violation(line):
    assert any(name not in OTHERS and name not in DECLARED for _, name in _found(line))


@pytest.mark.parametrize(
    "line", ["class Mine:\n    def _own(self): return self._kept", "row = row._replace(a=1)", "_x = 1"]
)
def test_what_is_ours_is_left_alone(line):
    assert all(name in OTHERS for _, name in _found(line))
