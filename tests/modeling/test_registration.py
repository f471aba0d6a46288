"""Registration happens by itself whatever is imported first: transformers' modules import each other in circles."""

import subprocess
import sys

import pytest

PROLOGUES = {
    "auto first": "import hf_softpick\nfrom transformers import AutoModelForCausalLM",
    "config first": "import hf_softpick\nfrom transformers import AutoConfig",
    "llama config first": "import hf_softpick\nfrom transformers import LlamaConfig",
    "llama model first": "import hf_softpick\nfrom transformers import LlamaForCausalLM",
    "pipeline first": "import hf_softpick\nfrom transformers import pipeline",
    "package last": "import transformers\nfrom transformers import AutoModelForCausalLM\nimport hf_softpick",
    "our model first": "import hf_softpick\nfrom hf_softpick import SoftpickForCausalLM",
    "our config first": "import hf_softpick\nfrom hf_softpick import SoftpickConfig",
    "explicit": "import hf_softpick\nhf_softpick.register()\nhf_softpick.register()",
}
CHECK = """
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM
names = ["softpick", "softmax", "rectified_softmax", "scaled_softpick", "scaled_softmax"]
assert all(n in AttentionInterface() and n in AttentionMaskInterface() for n in names)
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
config = AutoConfig.for_model("softpick", **sizes)
assert type(AutoModel.from_config(config)).__name__ == "SoftpickModel"
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "SoftpickForCausalLM"
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", PROLOGUES)
def test_names_are_registered_in_any_import_order(name):
    result = run(PROLOGUES[name] + CHECK)
    assert result.returncode == 0, result.stderr[-2000:]


def test_import_is_light():
    result = run("import sys, hf_softpick\nprint(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_unknown_name_is_an_attribute_error():
    import hf_softpick

    with pytest.raises(AttributeError, match="no attribute 'softpik'"):
        hf_softpick.softpik  # noqa: B018
