"""The model by the Triton kernels, interpreted, against its eager form: logits, loss, gradients, caches, compilation.

Tiny shapes, because the interpreter takes milliseconds for a tile; 40 tokens cross one of 32.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_softpick import close, count_kernel_calls, oracle, tiny_model, tokens, without_package
from torch import Tensor
from torch.testing import assert_close
from training_runs import losses, write_recipe, write_text
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from hf_softpick.modeling import attention_triton
from hf_softpick.modeling.attention_tiled import tiled_attention
from hf_softpick.modeling.attention_triton import triton_attention
from hf_softpick.modeling.visibility import visible_keys
from hf_softpick.train import main

KERNELS = Path(__file__).parents[2] / "kernels/softpick_attention/torch-ext"


def two_heads(normalizer: str = "softpick", implementation: str = "auto", **changes):
    """Two query heads over one key head: half the time of `tiny_model`."""
    return tiny_model(normalizer, implementation, **{"num_attention_heads": 2, "num_key_value_heads": 1, **changes})


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Tests must not spend each other's recompilation limit."""
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernels, by implementation."""
    return count_kernel_calls(monkeypatch)


def outcome(model, implementation: str, **arguments) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(**arguments)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_is_eager(model, implementation: str = "triton", real: Tensor | None = None, **arguments) -> None:
    """`real`: bool [B, T], the tokens whose logits mean something."""
    logits, loss, gradients = outcome(model, implementation, **arguments)
    expected_logits, expected_loss, expected = outcome(model, "eager", **arguments)
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if real is None else real
    assert_close(logits[real], expected_logits[real], rtol=1e-5, atol=2e-5)
    assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("normalizer", "key_heads", "implementation"),
    [
        ("softpick", 2, "triton"),
        ("softmax", 4, "triton"),
        ("rectified_softmax", 1, "triton"),
        ("scaled_softpick", 1, "triton"),
        ("scaled_softmax", 2, "triton"),
        ("softpick", 2, "triton_fast"),
        ("rectified_softmax", 4, "triton_fast"),
    ],
)
def test_logits_loss_and_gradients(normalizer, key_heads, implementation, calls):
    model, ids = tiny_model(normalizer, num_key_value_heads=key_heads), tokens(1, 40)
    assert_is_eager(model, implementation, input_ids=ids, labels=ids)
    assert calls == [implementation] * 2, "one call a layer, and none of another kind"


def packed(*rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


@pytest.mark.parametrize(
    ("normalizer", "window", "with_mask"),
    [("softpick", None, False), ("scaled_softpick", 7, False), ("softpick", 7, True), ("scaled_softmax", None, True)],
)
def test_packed_documents(normalizer, window, with_mask):
    model, ids, positions = two_heads(normalizer, sliding_window=window), tokens(2, 40), packed((33, 1, 6), (12, 28))
    more = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    assert_is_eager(model, input_ids=ids, position_ids=positions, labels=ids.masked_fill(positions == 0, -100), **more)


def test_boundaries_of_one_row():
    ids, boundaries = tokens(1, 40), torch.tensor([0, 5, 5, 38, 40], dtype=torch.int32)
    assert_is_eager(two_heads(), input_ids=ids, cu_seq_lens_q=boundaries, labels=ids)


@pytest.mark.parametrize(
    ("normalizer", "window", "side", "positions"),
    [
        ("softpick", None, "left", "none"),
        ("softmax", None, "left", "generate"),
        ("scaled_softpick", 6, "left", "none"),
        ("scaled_softpick", None, "right", "generate"),
        ("softpick", 6, "holes", "none"),
    ],
)
def test_padding(normalizer, window, side, positions):
    ids, index, count = tokens(2, 36), torch.arange(36), torch.tensor([[36], [9]])
    mask = {"left": index >= 36 - count, "right": index < count, "holes": (index + count // 9) % 5 != 0}[side]
    # generate() gives padding a position of its own; without positions, the mask alone hides it.
    given = {"position_ids": (mask.cumsum(-1) - 1).masked_fill(~mask, 1)} if positions == "generate" else {}
    labels = ids.masked_fill(~mask, -100)
    labels[:, 1:].masked_fill_(~mask[:, :-1], -100)  # nothing is predicted from padding
    assert_is_eager(
        two_heads(normalizer, sliding_window=window),
        real=mask,
        input_ids=ids,
        attention_mask=mask.long(),
        labels=labels,
        **given,
    )


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (2, 2)])
def test_boolean_4d_masks(batch, heads):
    ids = tokens(2, 36)
    mask = torch.rand(batch, heads, 36, 36, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 20, :] = False
    assert_is_eager(two_heads(), input_ids=ids, attention_mask=mask.expand(2, -1, -1, -1), labels=ids)


def chunked(model, ids: Tensor, sizes: list[int], past) -> Tensor:
    """Logits of `ids` fed in pieces through the cache `past`."""
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=past, use_cache=True).logits for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_over_caches(kind, window):
    """Prefill, one token, a chunk: with the cache's end aligned at the bottom right or at the top left."""
    model, ids = two_heads("scaled_softpick", "triton", sliding_window=window), tokens(2, 24)
    past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    cached = chunked(model, ids, [9, 1, 10, 4], past)
    model.set_attn_implementation("eager")
    assert_close(cached, model(ids).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("normalizer", "window"), [("softpick", None), ("scaled_softpick", 6)])
def test_generation(normalizer, window, kind, calls):
    """A left-padded batch; greedy tokens are those of eager."""
    model, ids = two_heads(normalizer, sliding_window=window), tokens(3, 12)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in (12, 3, 8)]).long()
    generated = {}
    for implementation in ("triton", "eager"):
        model.set_attn_implementation(implementation)
        generated[implementation] = model.generate(
            ids.masked_fill(mask == 0, 0),
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=-1,
            cache_implementation=kind,
        )
    assert torch.equal(generated["triton"], generated["eager"])
    assert len(calls) == 2 * 5


def loss_series(implementation: str) -> list[float]:
    model = two_heads("scaled_softpick", implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    series = []
    for step in range(8):
        ids, positions = tokens(2, 16, seed=step), packed((6, 10), (16,))
        loss = model(ids, position_ids=positions, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        series.append(loss.item())
    return series


def test_losses_of_eight_steps():
    triton, eager = loss_series("triton"), loss_series("eager")
    assert_close(triton, eager, rtol=0, atol=1e-5)
    assert abs(eager[0] - eager[-1]) > 1e-3, "nothing was learned, so this shows nothing"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    model, ids = two_heads("scaled_softpick").train(), tokens(1, 24)
    arguments = {"input_ids": ids, "position_ids": packed((10, 14)), "labels": ids}
    expected = outcome(model, "triton", **arguments)[2]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls.clear()
    actual = outcome(model, "triton", **arguments)[2]
    assert len(calls) == 4, "the layers were not computed again in the backward pass"
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
def test_half_precision_stays_near_the_formulas(normalizer, dtype):
    """scaled_*: its queries come in float32 beside half keys."""
    model, ids = two_heads(normalizer, "triton"), tokens(1, 40)
    exact = oracle({n: p.detach().double() for n, p in model.named_parameters()}, model.config, ids[0])[0]
    output = model.to(dtype)(ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert (output.logits[0].double() - exact).norm() / exact.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_autocast():
    """What accelerate's mixed precision does: float32 parameters, bfloat16 products."""
    model, ids = two_heads("scaled_softpick", "triton"), tokens(1, 20)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert (output.logits.float() - exact).norm() / exact.norm() < 0.1
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def operands(kind: str):
    """[B, heads, T or S, dims] with the strides that the model gives, what they see, and a gradient."""
    torch.manual_seed(0)
    shapes = (2, 9, 4, 8), (2, 12, 2, 8), (2, 12, 2, 6)
    query, key, value = (torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes)
    padding = torch.arange(12) >= torch.tensor([[0], [5]])
    visible = {
        "intervals": visible_keys(9, 12, query.device, query_offset=3, padding_mask=padding)[0],
        "mask": torch.rand(2, 1, 9, 12) > 0.5,
    }[kind]
    return [query, key, value], visible, torch.randn(2, 9, 4, 6)


@pytest.mark.parametrize("kind", ["intervals", "mask"])
def test_operators_keep_the_contract_of_torch_compile(kind):
    """Schema, fake tensors (shapes, dtypes, strides, no aliasing) and autograd registration."""
    tensors, visible, grad = operands(kind)
    tensors = [x.detach().transpose(1, 2).requires_grad_() for x in tensors]
    seen = [None, None, None, visible] if kind == "mask" else [visible.start, visible.end, visible.keys, None]
    band = [0, 0] if kind == "mask" else [visible.offset, visible.window or 0]
    rest = [*seen, *band, 0.5, "softpick", True]
    torch.library.opcheck(attention_triton._forward, (*tensors, *rest))
    tensors = [x.detach() for x in tensors]
    out, lse = attention_triton._forward(*tensors, *rest)
    torch.library.opcheck(
        attention_triton._backward,
        (grad, *tensors, out, lse, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("kind", ["intervals", "mask"])
def test_inductor_compiles_one_graph(kind):
    tensors, visible, grad = operands(kind)

    def step(*tensors):
        return triton_attention(*tensors, visible, 0.5).mul(2) * grad

    compiled = torch.compile(step, fullgraph=True)
    expected = tiled_attention(*tensors, visible, 0.5).mul(2) * grad
    actual = compiled(*tensors)
    close(actual, expected, 1e-5)
    gradients = torch.autograd.grad(actual.sum(), tensors)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), tensors), strict=True):
        close(ours, theirs, 1e-5)


def test_a_compiled_model_trains_and_takes_other_boundaries():
    """One graph for every packing; aot_eager traces the backward pass too."""
    model, ids, graphs = two_heads("scaled_softpick", num_hidden_layers=1).train(), tokens(2, 12), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for row in ((12,), (1, 11), (4, 4, 4)):
        positions = packed(row, (12,))
        expected = outcome(model, "triton", input_ids=ids, position_ids=positions, labels=ids)[2]
        model.zero_grad()
        compiled(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert len(graphs) == 1


def test_sharded_parameters(tmp_path):
    """FSDP2 on a mesh of one process: gathered weights, sharded gradients, and layers computed once."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, ids = two_heads("scaled_softpick", "triton").train(), tokens(2, 20)
    expected = outcome(model, "triton", input_ids=ids, labels=ids)[2]
    model.zero_grad(set_to_none=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.model.layers[0], FSDPModule)
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            assert_close(p.grad.full_tensor(), expected[name], msg=lambda m, name=name: f"{name}: {m}")
    finally:
        dist.destroy_process_group()


def test_empty_and_expanded_tensors():
    """An empty batch or row, and the gradient of a sum, whose strides are all 0."""
    for batch, length, total in ((0, 5, 5), (1, 0, 5), (1, 5, 0)):
        shapes = (batch, 4, length, 8), (batch, 2, total, 8), (batch, 2, total, 8)
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out = triton_attention(*tensors, visible_keys(length, total, tensors[0].device)[0], 0.5)
        assert out.shape == (batch, length, 4, 8) and (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), tensors))
    tensors, visible, _ = operands("intervals")
    ours, theirs = (f(*tensors, visible, 0.5).sum() for f in (triton_attention, tiled_attention))
    for mine, tiled in zip(*(torch.autograd.grad(out, tensors) for out in (ours, theirs)), strict=True):
        close(mine, tiled, 1e-5)


def test_deterministic_algorithms_refuse_the_fast_backward_pass(request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    tensors, visible, _ = operands("intervals")
    outputs = {d: triton_attention(*tensors, visible, 0.5, "softpick", d).sum() for d in (True, False)}
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="'triton_fast' is not deterministic.*Use 'triton'"):
        torch.autograd.grad(outputs[False], tensors, retain_graph=True)
    torch.autograd.grad(outputs[True], tensors)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="'triton_fast' is not deterministic"):
        torch.autograd.grad(outputs[False], tensors)


def test_what_the_kernels_cannot_do_is_refused_or_dense(calls):
    ids = tokens(1, 12)
    with pytest.raises(ValueError, match="'triton' cannot run: heads have 264 dimensions.*'tiled'"):
        two_heads(implementation="triton", head_dim=264)
    with pytest.raises(ValueError, match="'triton_fast' cannot run: values are torch.float64.*'tiled'"):
        two_heads(implementation="triton_fast").double()(ids)
    model = two_heads(implementation="triton", attention_dropout=0.5)
    with pytest.raises(ValueError, match="'triton' has no attention dropout.*'eager'"):
        model.train()(ids)
    calls.clear()
    weights = model.eval()(ids, output_attentions=True).attentions
    assert weights[0].shape == (1, 2, 12, 12) and not calls


@pytest.mark.parametrize("implementation", ["auto", "softpick"])
def test_auto_leaves_cpu_to_the_tiled_form(implementation, calls):
    """The interpreter is for tests; nobody who asks for nothing shall wait for it."""
    two_heads(implementation=implementation)(tokens(1, 8))
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="softpick")(tokens(1, 8))
    assert not calls


STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
try:
    import hf_softpick
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is importable, so this shows nothing")
ids = torch.tensor(json.loads(sys.argv[2]))
out = {}
for name in ("triton", "eager"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation=name)
    model(ids, labels=ids).loss.backward()
    out[name] = [model.lm_head.weight.grad.tolist(), model(ids).logits.tolist()]
operators = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("softpick_")}
print(json.dumps({**out, "operators": sorted(operators)}))
"""


def test_a_saved_folder_runs_without_the_package(tmp_path):
    """Hub code: softpick_attention alone is installed."""
    two_heads("scaled_softpick").save_pretrained(tmp_path / "saved")
    env = without_package(tmp_path)
    env["PYTHONPATH"] += f":{KERNELS}"
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "saved"), json.dumps(tokens(1, 12).tolist())]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in zip(out["triton"], out["eager"], strict=True):
        close(torch.tensor(ours), torch.tensor(theirs), 2e-5)
    assert "triton_backward" in out["operators"]


def test_a_recipe_trains_with_the_kernels(tmp_path, capsys, calls):
    """The whole command, against the same recipe by the tiled form."""
    recipe = write_recipe(
        tmp_path, data={"seq_len": 16, "sources": [{"path": str(write_text(tmp_path / "t.jsonl", 30))}]}
    )
    steps = ["training.max_steps=2", "training.per_device_train_batch_size=2", "eval.max_rows=2", "eval.prompts=[]"]
    series = {}
    for name in ("triton", "tiled"):
        assert main([str(recipe), *steps, f"run.name={name}", f"model.attn_implementation={name}"]) == 0
        assert f"softpick attention by {name}," in capsys.readouterr().out
        series[name] = losses(tmp_path / "runs" / name)
        assert calls
    assert len(series["tiled"]) == 2 and set(calls) == {"triton"}
    assert_close(series["triton"], series["tiled"], rtol=0, atol=1e-5)
