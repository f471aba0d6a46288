"""transformers' own tests of a model on ours: each passes or skips as it does on Llama in the same run."""

import os
from pathlib import Path

import pytest

SOURCES = Path(os.environ["TRANSFORMERS_TESTS"])
if not SOURCES.is_dir():
    text = f"transformers' own tests are not in {SOURCES}: `make transformers-tests` downloads them"
    if os.environ.get("CI"):
        raise FileNotFoundError(text)
    pytest.skip(text, allow_module_level=True)

from transformers_suite import cases, outcome  # noqa: E402  needs the sources

NORMALIZERS = ("softpick", "scaled_softpick", "softmax")
CASES = cases(NORMALIZERS)
NO_SDPA = "sdpa computes softmax, so these normalizers are refused there by name"
# What ours do not pass, on purpose: the method, the normalizers, and why.
REFUSED = {
    "test_can_set_attention_dynamically": (("softpick", "scaled_softpick"), NO_SDPA),
    "test_sdpa_can_dispatch_non_composite_models": (NORMALIZERS, "the default is auto, never sdpa"),
    "test_model_rope_scaling_from_config_1_dynamic": (NORMALIZERS, "a document would depend on its company"),
    # An error that torch raises by name: head_scale is float32 beside the bfloat16 weights of its own module.
    "test_fsdp2_bf16_training": (("scaled_softpick",), "FSDP2 wants one dtype in a module"),
}
# Two processes each, a second or two; these few in every run, the others in the sweep.
DISTRIBUTED = ("test_tp_", "test_fsdp2_", "test_hsdp_")
EVERY_RUN = ("test_tp_plan_shards_input_embeddings", "test_tp_generation", "test_fsdp2_sharding_structure_1_tied")


def methods():
    """Every method of the mixins, but those that a decorator skips here: they need a GPU, a package or hours."""
    for name in dir(CASES["llama"]):
        method = getattr(CASES["llama"], name)
        if name.startswith("test_") and callable(method) and not getattr(method, "__unittest_skip__", False):
            swept = name.startswith(DISTRIBUTED) and name not in EVERY_RUN
            yield pytest.param(name, marks=[pytest.mark.sweep] if swept else [])


@pytest.mark.parametrize("method", list(methods()))
def test_as_on_llama(method):
    """A test that Llama skips may be passed, and none that it passes may be skipped."""
    expected, why = outcome(CASES["llama"], method)
    refused, reason = REFUSED.get(method, ((), ""))
    wrong = {}
    for name in NORMALIZERS:
        found, trace = outcome(CASES[name], method)
        allowed = {"failed", "skipped"} if name in refused else {"passed", expected}
        if found not in allowed:
            wrong[name] = f"{found}, expected {' or '.join(sorted(allowed))} {reason}\n{trace}"
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    if expected != "passed":
        pytest.skip(f"Llama {expected}: {why.strip().splitlines()[-1][:120] if why else ''}")
