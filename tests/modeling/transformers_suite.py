"""transformers' own tests of a model, as unittest cases over our classes and over Llama's.

They come from the source distribution of the installed version, which `make transformers-tests` unpacks; nothing of it
is kept here. What it lacks (the tests that are in the repository alone) gets an empty stand-in, unless the file lies
beside the others.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS as SIZES
from two_processes import start_group, start_processes

from hf_softpick.modeling import modeling_softpick

PACKAGE = "transformers_own_tests"
SOURCES = Path(os.environ["TRANSFORMERS_TESTS"])
HEADS = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def _call(rank: int, function, arguments: tuple) -> None:
    """What a process runs. It is of this file, so that the package below is there before it is needed."""
    function(rank, *arguments)


def _run_distributed(world_size: int):
    def run(function):
        return lambda *arguments: start_group(_call, (function, arguments), world_size)

    return run


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    start_processes(_call, (function, args), nprocs)


# What the sources import from files that the source distribution leaves out.
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {"output_hidden_states": True, "dtype": "float16", "problem_type": "regression"}
    },
    "distributed_testing_utils": {
        "run_distributed": _run_distributed,
        "_start_rank_processes": _start_rank_processes,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
    },
}


def _package(name: str, folder: Path) -> None:
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = [str(folder)]


def _lay_out() -> None:
    _package(PACKAGE, SOURCES)
    for name, content in STAND_INS.items():
        *parents, _ = path = name.split(".")
        if parents:
            _package(f"{PACKAGE}.{parents[0]}", SOURCES / parents[0])
        if not SOURCES.joinpath(*path).with_suffix(".py").exists():
            sys.modules[f"{PACKAGE}.{name}"] = module = ModuleType(f"{PACKAGE}.{name}")
            vars(module).update(content)


_lay_out()


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


class ModelTester:
    """What the mixins ask about the model: sizes, a configuration, a batch."""

    def __init__(self, family: str, module: ModuleType, config_class: type, **fields):
        vars(self).update(SIZES)
        self.config_class, self.fields = config_class, fields
        self.all_model_classes = [getattr(module, family + head) for head in HEADS]
        self.base_model_class, self.causal_lm_class, *_ = self.all_model_classes

    def get_config(self):
        """A new configuration of transformers' tiny sizes."""
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("intermediate_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
        return self.config_class(**{name: SIZES[name] for name in names}, hidden_act="gelu", **self.fields)

    def prepare_config_and_inputs_for_common(self):
        """A configuration and a batch with right padding of every length."""
        tokens = torch.randint(0, SIZES["vocab_size"], (SIZES["batch_size"], SIZES["seq_length"]))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.tril(torch.ones_like(tokens))}


def cases(normalizers: tuple[str, ...]) -> dict[str, type[unittest.TestCase]]:
    """Llama's case, and one of ours for each normalizer."""
    common, configuration = _load("test_modeling_common"), _load("test_configuration_common")
    parallel, sharded, training = (_load(f"test_{name}_mixin") for name in ("tensor_parallel", "fsdp", "training"))
    parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = sharded.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    mixins = (
        common.ModelTesterMixin,
        common.GenerationTesterMixin,
        parallel.TensorParallelTesterMixin,
        sharded.FSDPTesterMixin,
        training.TrainingTesterMixin,
    )

    def case(family, module, config_class, **fields):
        def set_up(self):
            self.model_tester = ModelTester(family, module, config_class, **fields)
            self.all_model_classes = self.model_tester.all_model_classes
            # By these names the mixins know what labels a class needs.
            patches = [patch.dict(names, softpick=f"Softpick{head}") for head, names in HEADS.items()]
            if "eager_matches_sdpa" in self._testMethodName:
                # Where sdpa is refused these compare eager with the default; our classes say that they have no sdpa.
                patches += [patch.object(model, "_supports_sdpa", True) for model in self.all_model_classes]
            for change in patches:
                change.start()
                self.addCleanup(change.stop)

        def test_config(self):
            configuration.ConfigTester(self, config_class=config_class, hidden_size=32).run_common_tests()

        # The mixins declare it as a property that a case must define.
        body = {"setUp": set_up, "test_config": test_config, "model_tester": None, "all_model_classes": ()}
        return type(f"{family}Case", (*mixins, unittest.TestCase), body)

    ours = ("Softpick", modeling_softpick, modeling_softpick.SoftpickConfig)
    return {
        "llama": case("Llama", transformers.models.llama.modeling_llama, transformers.LlamaConfig),
        **{name: case(*ours, normalizer=name) for name in normalizers},
    }


def outcome(case: type[unittest.TestCase], method: str) -> tuple[str, str]:
    """("passed" | "skipped" | "failed", why) of one method."""
    result = unittest.TestResult()
    try:
        case(method).run(result)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    if result.errors or result.failures:
        return "failed", "\n".join(trace for _, trace in result.errors + result.failures)
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return "passed", ""
