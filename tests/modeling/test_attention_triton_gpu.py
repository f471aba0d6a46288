"""The model by the Triton kernels on a GPU against its eager form, and as torch.compile and CUDA graphs run it."""

import copy

import pytest
import torch
from tiny_softpick import NORMALIZERS, SIZES, count_kernel_calls, tiny_model, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_softpick.modeling.attention_interface import resolve_auto

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Heads of 32 dimensions, scores with a deviation of about 1; 200 tokens cross tiles of every size.
WIDE = dict(hidden_size=128, intermediate_size=96, initializer_range=0.1)
LENGTH = 200


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32, on both sides; and no test spends another's recompilation limit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernels, by implementation."""
    return count_kernel_calls(monkeypatch)


def inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = tokens(2, LENGTH)
    packed = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((150, 1, 49), (33, 167))])
    mask = (torch.arange(LENGTH) >= torch.tensor([[70], [0]])).long()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    arguments = {
        "plain": {"labels": ids},
        "packed": {"position_ids": packed, "labels": ids.masked_fill(packed == 0, -100)},
        "padded": {"attention_mask": mask, "labels": ids.masked_fill(mask.cumsum(-1) <= 1, -100)},
        "4-D mask": {"attention_mask": causal, "labels": ids},
    }[kind]
    return {name: x.to(CUDA) for name, x in {"input_ids": ids, **arguments}.items()}


def outcome(model, implementation: str, arguments):
    """Logits, loss and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(**arguments)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["triton", "triton_fast"])
@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "4-D mask"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_float32_is_eager(normalizer, kind, implementation, calls):
    model, arguments = tiny_model(normalizer, **WIDE).to(CUDA), inputs(kind)
    real = arguments.get("attention_mask", torch.ones(2, LENGTH, device=CUDA))
    real = (real if real.ndim == 2 else torch.ones(2, LENGTH, device=CUDA)).bool()
    logits, loss, gradients = outcome(model, implementation, arguments)
    assert calls == [implementation] * 2
    expected_logits, expected_loss, expected = outcome(model, "eager", arguments)
    assert_close(logits[real], expected_logits[real], rtol=1e-4, atol=1e-4)
    assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick", "softmax"])
def test_half_precision_is_as_near_as_eager(normalizer, kind, dtype):
    """Against float32: at most twice the error of the eager form in the same dtype, on average over everything."""
    exact, arguments = tiny_model(normalizer, **WIDE).to(CUDA), inputs(kind)
    half = copy.deepcopy(exact).to(dtype)
    real = arguments["attention_mask"].bool() if "attention_mask" in arguments else ...

    def values(model, implementation):
        logits, _, gradients = outcome(model, implementation, arguments)
        return {"logits": logits[real].float(), **{name: g.float() for name, g in gradients.items()}}

    reference, eager, ours = values(exact, "eager"), values(half, "eager"), values(half, "triton")
    for name, value in reference.items():
        allowed = 2 * (eager[name] - value).norm() + 1e-3 * value.norm()
        assert (ours[name] - value).norm() <= allowed, name


def test_gradients_are_bit_equal_between_runs():
    model, arguments = tiny_model("scaled_softpick", **WIDE).to(CUDA, torch.bfloat16), inputs("packed")
    first = outcome(model, "triton", arguments)
    for _ in range(10):
        again = outcome(model, "triton", arguments)
        assert torch.equal(again[0], first[0])
        attention = [name for name in first[2] if "_proj" in name or "head_scale" in name]
        assert attention and all(torch.equal(again[2][name], first[2][name]) for name in attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_triton(dtype, calls):
    assert resolve_auto(CUDA, dtype, 64) == "triton"
    model, ids = tiny_model(**WIDE).to(CUDA, dtype), tokens(1, 20).to(CUDA)
    auto = model(ids).logits
    assert calls == ["triton"] * 2
    model.set_attn_implementation("triton")
    assert torch.equal(model(ids).logits, auto)


def test_foreign_models_use_the_kernels(calls):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="softpick").to(CUDA).eval()
    ids = tokens(2, 30).to(CUDA)
    ours = model(ids).logits
    assert calls == ["triton"] * 2
    calls.clear()
    weights = model(ids, output_attentions=True)
    assert not calls
    assert_close(ours, weights.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_eager(cache, window):
    """The static cache is compiled by generate() itself."""
    model, ids = tiny_model("scaled_softpick", sliding_window=window, **WIDE).to(CUDA), tokens(3, 12).to(CUDA)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in (12, 3, 8)]).long().to(CUDA)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1, attention_mask=mask)
    model.set_attn_implementation("triton")
    ours = model.generate(ids.masked_fill(mask == 0, 0), cache_implementation=cache, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids.masked_fill(mask == 0, 0), use_cache=False, **options))


@pytest.mark.parametrize("implementation", ["auto", "triton_fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_is_one_graph(implementation, dtype):
    model, arguments = tiny_model("scaled_softpick", implementation, **WIDE).to(CUDA, dtype), inputs("packed")
    expected = outcome(model, implementation, arguments)
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(**arguments)
    output.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert_close(output.loss, expected[1], rtol=tolerance, atol=tolerance)
    for name, p in model.named_parameters():
        error = (p.grad - expected[2][name]).float().norm()
        assert error <= tolerance * expected[2][name].float().norm() + tolerance * 1e-2, name


def test_cuda_graph_replays_forward_and_backward():
    """Nothing waits for the device or reads from it while a step is recorded."""
    model, arguments = tiny_model(implementation="triton", **WIDE).to(CUDA).train(), inputs("packed")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(**arguments, use_cache=False).loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(**arguments, use_cache=False).loss
        loss.backward()
    arguments["input_ids"].copy_(tokens(2, LENGTH, seed=7))
    graph.replay()
    replayed = loss.clone(), {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = outcome(model, "triton", {**arguments, "use_cache": False})
    assert_close(replayed[0], expected[1], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[2].items():
        assert_close(replayed[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
