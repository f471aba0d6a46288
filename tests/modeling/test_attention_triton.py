"""Where the Triton kernels run and where they do not: refusals by name, and what "auto" means.

That they compute the right thing is shown in tests/interpreted, and on GPUs in test_attention_triton_gpu.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import visible_keys
from tiny_softpick import tiny_config, tiny_model, tokens

from hf_softpick import SoftpickForCausalLM
from hf_softpick.modeling import attention_interface, attention_triton
from hf_softpick.modeling.attention_interface import resolve_auto
from hf_softpick.modeling.attention_triton import TRITON, triton_attention

CUDA = torch.device("cuda", 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def importable(monkeypatch):
    """As if Triton were there and the GPU new enough; no kernel is called."""
    monkeypatch.setattr(attention_triton, "_missing", None)
    monkeypatch.setattr(attention_triton, "INTERPRET", False, raising=False)
    monkeypatch.setattr(attention_triton, "_capability", lambda device: (8, 0))


@pytest.fixture
def absent(monkeypatch):
    """As if the import had failed."""
    monkeypatch.setattr(attention_triton, "_missing", "softpick_attention cannot be imported (ImportError: no triton)")


@pytest.fixture
def warned(monkeypatch):
    """What is logged as a warning."""
    messages = []
    monkeypatch.setattr(attention_interface.logger, "warning", lambda text, *values: messages.append(text % values))
    attention_interface._log_choice.cache_clear()
    yield messages
    attention_interface._log_choice.cache_clear()


@pytest.mark.parametrize("implementation", TRITON)
def test_cpu_is_refused_by_name(importable, implementation):
    model = tiny_model(implementation=implementation)
    with pytest.raises(ValueError, match=f"'{implementation}' cannot run: .*on cpu.*Use 'auto' or 'tiled'"):
        model(tokens(1, 8))
    model.set_attn_implementation("auto")
    assert model(tokens(1, 8)).logits.isfinite().all()


@pytest.mark.parametrize("implementation", TRITON)
def test_without_triton_every_door_says_what_to_install(absent, tmp_path, implementation):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    doors = {
        "from_pretrained": lambda: SoftpickForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation),
        "class": lambda: SoftpickForCausalLM(tiny_config(attn_implementation=implementation)),
        "setter": lambda: model.set_attn_implementation(implementation),
    }
    for door, load in doors.items():
        with pytest.raises(ValueError, match=rf"'{implementation}'.*no triton.*pip install \"hf_softpick\[gpu\]\""):
            load()
            pytest.fail(f"{door} let {implementation} through")
    assert model.config._attn_implementation == "auto"
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_wide_heads_are_refused_when_the_model_is_made(importable):
    for name in TRITON:
        with pytest.raises(ValueError, match=f"'{name}' cannot run: heads have 258 dimensions.* 256 at most.*'tiled'"):
            tiny_model(implementation=name, head_dim=258)
    tiny_model(implementation="triton", head_dim=256)


def test_inputs_are_checked_before_the_device(importable):
    visible = visible_keys(5, 5, torch.device("cpu"))
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="do not fit"):
        triton_attention(query, key[..., :7], key, visible, 0.5)
    with pytest.raises(ValueError, match="expected torch.bool"):
        triton_attention(query, key, key, torch.zeros(5, 5), 0.5)
    with pytest.raises(ValueError, match="normalizer is 'relu'"):
        triton_attention(query, key, key, visible, 0.5, "relu")
    with pytest.raises(ValueError, match="values are torch.float64"):
        triton_attention(query.double(), key.double(), key.double(), visible, 0.5)


@pytest.mark.parametrize("implementation", TRITON)
def test_attention_dropout_is_refused_by_name(importable, implementation):
    model = tiny_model(implementation=implementation, attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=f"'{implementation}' has no attention dropout.*'eager'"):
        model(tokens(1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_auto_is_triton_on_gpus(importable, warned, device, dtype):
    assert resolve_auto(torch.device(device, 0), dtype, 256) == "triton"
    assert warned == []


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cuda", torch.float64, 64, "values are torch.float64"),
        ("cuda", torch.bfloat16, 320, "heads have 320 dimensions"),
        ("mps", torch.float32, 64, "on mps"),
    ],
)
def test_auto_says_why_a_gpu_runs_something_slower(importable, warned, device, dtype, head_dim, reason):
    """Once a process and reason."""
    for _ in range(2):
        assert resolve_auto(torch.device(device, 0), dtype, head_dim) == "tiled"
    (message,) = warned
    assert "'auto' runs 'tiled'" in message and reason in message


def test_auto_without_triton(absent, warned):
    assert resolve_auto(CUDA, torch.bfloat16, 64) == "tiled"
    assert "pip install" in warned[0]


def test_auto_on_a_gpu_older_than_triton_supports(importable, warned, monkeypatch):
    monkeypatch.setattr(attention_triton, "_capability", lambda device: (7, 5))
    assert resolve_auto(CUDA, torch.float16, 64) == "tiled"
    assert "compute capability 8.0" in warned[0]


def test_auto_can_be_traced(importable):
    """The age of the GPU is asked once, outside the graph."""

    def choose(x):
        return x + 1 if resolve_auto(CUDA, x.dtype, x.shape[-1]) == "triton" else x

    assert torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(2, 64)).sum() == 128


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_is_silent_and_tiled_without_a_gpu(importable, warned, device):
    assert resolve_auto(torch.device(device), torch.float32, 64) == "tiled"
    assert warned == []


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it is an error
import torch
from hf_softpick import SoftpickConfig, SoftpickForCausalLM
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model, ids = SoftpickForCausalLM(SoftpickConfig(**sizes)), torch.arange(12)[None]
before = model(ids, labels=ids).loss
before.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert model(ids, labels=ids).loss < before
try:
    model.set_attn_implementation("triton")
except ValueError as error:
    print(error)
"""


def test_a_machine_without_triton_trains():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'triton' cannot run: softpick_attention cannot be imported (ImportError" in done.stdout
    assert 'pip install "hf_softpick[gpu]"' in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists on Linux only")
def test_the_kernels_of_this_checkout_import():
    """Guards the tests above, which say what they like about the import."""
    assert attention_triton._missing is None
    assert attention_triton.INTERPRET is INTERPRETED
