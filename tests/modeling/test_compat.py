"""Every private name of another library that the package touches; runs on the oldest and newest supported versions."""

import importlib.util
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from transformers import (
    AttentionMaskInterface,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    masking_utils,
    modeling_utils,
)

from hf_softpick.modeling import compat

# What classes of ours declare or override for transformers; tests/test_private_names.py allows these and no others.
DECLARED = (
    "_can_record_outputs",
    "_check_and_adjust_attn_implementation",
    "_init_weights",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_upload_modified_files",
)


@pytest.mark.parametrize("name", DECLARED)
def test_transformers_reads_what_our_classes_declare(name):
    """By an attribute or getattr, not by its own declaration alone."""
    text = inspect.getsource(modeling_utils)
    assert re.search(rf"""\.{name}\b|getattr\([\w.]+, "{name}\"""", text), f"transformers no longer reads {name}"


def test_attention_of():
    config = LlamaConfig()
    assert compat.attention_of(config) is None
    assert compat.attention_of(LlamaConfig(attn_implementation="eager")) == "eager"


def test_has_mask_function(monkeypatch):
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    AttentionMaskInterface.register("recording", print)
    assert compat.has_mask_function("recording") and compat.has_mask_function("sdpa")
    assert not compat.has_mask_function("nobody") and not compat.has_mask_function(None)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["here"] = print  # transformers does not ask for its masks either
    try:
        assert not compat.has_mask_function("here")
    finally:
        del masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["here"]


def test_decomposition():
    @torch.library.custom_op("softpick_test_compat::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    @compat.decomposition(twice)
    def _(x):
        return x + x

    class Model(nn.Module):
        def forward(self, x):
            return twice(x)

    program = torch.export.export(Model(), (torch.ones(2),))
    assert "softpick_test_compat" in str(program.graph)
    assert "softpick_test_compat" not in str(program.run_decompositions(torch._decomp.decomposition_table).graph)


@pytest.mark.parametrize("compiled", [False, True])
def test_assert_async(compiled):
    def check(x):
        compat.assert_async((x > 0).all(), "not above zero")
        return x + 1

    check = torch.compile(check, backend="eager", fullgraph=True) if compiled else check
    check(torch.ones(2))
    with pytest.raises(RuntimeError, match="not above zero"):
        check(torch.zeros(2))


def test_dispatch_mode():
    seen = []

    class Watch(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).softmax(0)
    assert "aten::_softmax" in seen


class _Own:
    def method(self, x):
        return x + 1

    @classmethod
    def built(cls, x):
        return cls, x


def test_hook():
    """Once, with the original, for methods and class methods, also from a subclass."""

    class Sub(_Own):
        pass

    compat.hook(_Own, "method", lambda original, self, x: original(self, x) * 10)
    compat.hook(_Own, "method", lambda original, self, x: 1 / 0)
    compat.hook(_Own, "built", lambda original, cls, x: (*original(cls, x), "hooked"))
    assert Sub().method(1) == 20 and _Own.method.__name__ == "method"
    assert Sub.built(3) == (Sub, 3, "hooked")


def test_the_places_of_the_guard(tmp_path):
    """transformers writes, reads and chooses there, and has no second way."""
    for owner, name in (compat.WRITES_CONFIG, compat.READS_CONFIG, *compat.CHOOSES_ATTENTION):
        assert name in owner.__dict__
    passed = []

    class Config(LlamaConfig):
        def to_json_file(self, *args, **kwargs):
            passed.append("written")
            return super().to_json_file(*args, **kwargs)

        @classmethod
        def _dict_from_json_file(cls, *args):
            passed.append("read")
            return super()._dict_from_json_file(*args)

    Config(vocab_size=8).save_pretrained(tmp_path)
    Config.from_pretrained(tmp_path)
    Config.from_json_file(tmp_path / "config.json")
    assert passed == ["written", "read", "read"]


@pytest.mark.parametrize("name", [name for _, name in compat.CHOOSES_ATTENTION])
def test_the_choice_of_an_attention(name):
    asked = []

    def choose(self, attention, *args, **kwargs):
        asked.append(attention)
        return getattr(PreTrainedModel, name)(self, attention, *args, **kwargs)

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig
        _supports_sdpa = True

    setattr(Model, name, choose)
    model = Model(PreTrainedConfig())
    model.set_attn_implementation("eager")
    assert asked[0] is None and asked[-1] == "eager" and compat.attention_of(model.config) == "eager"


def test_float32_modules():
    class Model(PreTrainedModel):
        config_class = PreTrainedConfig
        _keep_in_fp32_modules_strict = {"kept"}

        def __init__(self, config):
            super().__init__(config)
            self.kept, self.cast = nn.Linear(2, 2), nn.Linear(2, 2)
            self.post_init()

    model = Model(PreTrainedConfig())
    assert compat.float32_modules(model) == {"kept"}
    assert compat.float32_modules(PreTrainedModel(PreTrainedConfig())) == set()


def test_float32_modules_stay_float32(tmp_path):
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig
    from hf_softpick.modeling.modeling_softpick import SoftpickModel

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    SoftpickModel(SoftpickConfig(normalizer="scaled_softpick", **sizes)).save_pretrained(tmp_path)
    model = SoftpickModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.split(".")[-1] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == compat.float32_modules(model) == {"head_scale"}


def test_expect_missing():
    model = nn.Linear(2, 2)
    compat.expect_missing(model, ["weight"])
    assert model._keys_to_ignore_on_save == {"weight"}
    assert "self.model._keys_to_ignore_on_save" in inspect.getsource(Trainer)


def test_sharded_parameters():
    """What ZeRO-3 writes on a parameter; tests/distributed runs it."""
    parameter = nn.Parameter(torch.empty(3, 2))
    assert compat.whole_shape(parameter) == (3, 2) and not compat.is_sharded(parameter)
    parameter.data = torch.empty(0)
    parameter.ds_id, parameter.ds_shape = 7, torch.Size((3, 2))
    assert compat.whole_shape(parameter).numel() == 6 and compat.is_sharded(parameter)
    found = importlib.util.find_spec("deepspeed")
    if found is None:
        pytest.skip("deepspeed is not installed")
    source = Path(found.origin).parent / "runtime/zero/partition_parameters.py"
    text = source.read_text(encoding="utf-8")
    assert "param.ds_shape = param.shape" in text and "param.ds_id = " in text


def test_checkpoint_names(tmp_path):
    """What torch writes today, of a tensor in pieces, is public or listed."""
    checkpoint.save({"weight": torch.ones(4, 2)}, checkpoint_id=tmp_path)
    names = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            names.add((module, name))
            return super().find_class(module, name)

    Reader((tmp_path / ".metadata").open("rb")).load()
    private = {name for name in names if name[1].startswith("_")}
    listed = {(one.__module__, one.__qualname__) for one in compat.checkpoint_names()}
    assert private and private <= listed
    assert compat.checkpoint_names()[0].__name__ == "_StorageInfo"


def test_sequence_is_sharded():
    """With two processes: tests/distributed/test_ulysses.py."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    assert not compat.sequence_is_sharded()
    assert hasattr(parallel_state_sp, "_SEQUENCE_PARALLEL_GROUP")
