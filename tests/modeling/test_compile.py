"""torch.compile: one graph, the same numbers, and no mask or score matrix of T x T entries."""

import pytest
import torch
from attention_cases import visible_keys
from tiny_foreign import foreign_model
from tiny_softpick import close, tiny_model, tokens
from torch import Tensor
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

from hf_softpick.modeling.attention_tiled import tiled_attention

LENGTH = 80  # unlike every size of the model, so that a T x T tensor is recognised by its shape


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Tests must not spend each other's recompilation limit."""
    torch._dynamo.reset()


class Recorder:
    """A backend that runs the graph as it is and keeps the shapes of everything in it."""

    def __init__(self):
        self.graphs, self.shapes = 0, []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs):
        self.graphs += 1
        for node in graph.graph.nodes:
            values = node.meta.get("example_value")
            values = values if isinstance(values, (tuple, list)) else [values]
            self.shapes += [tuple(v.shape) for v in values if isinstance(v, Tensor)]
        return graph.forward

    def square(self, length: int) -> list[tuple[int, ...]]:
        return [shape for shape in self.shapes if sum(int(size) == length for size in shape) >= 2]


def inputs(kind: str) -> dict[str, Tensor]:
    ids = tokens(2, LENGTH)
    packed = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((70, 1, 9), (33, 40, 7))])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    labels = ids.masked_fill(packed == 0, -100)
    return {
        "plain": {"input_ids": ids, "labels": ids},
        "packed": {"input_ids": ids, "position_ids": packed, "labels": labels},
        "packed with a cache": {"input_ids": ids, "position_ids": packed, "use_cache": True},
        "packed and masked": {"input_ids": ids, "position_ids": packed, "attention_mask": torch.ones_like(ids)},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "cu_seq_lens": {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 70, 71, 80])},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        ("plain", None),
        ("packed", None),
        ("packed", 7),
        ("packed with a cache", None),
        ("packed and masked", 7),
        ("padded", None),
        ("cu_seq_lens", None),
    ],
)
def test_tiled_is_one_graph_without_a_square_tensor(kind, window):
    model, arguments, backend = tiny_model("scaled_softpick", sliding_window=window), inputs(kind), Recorder()
    expected = model(**arguments).logits
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(**arguments).logits, expected)
    assert backend.graphs == 1
    assert not backend.square(LENGTH)


def test_a_square_tensor_would_be_seen():
    """Guards the test above: the dense form does hold T x T weights."""
    model, backend = tiny_model(implementation="eager"), Recorder()
    arguments = inputs("packed")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(**arguments).logits, model(**arguments).logits)
    assert backend.square(LENGTH)


@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softmax"])
def test_gradients_of_packed_training_through_the_compiled_graph(normalizer):
    """aot_eager traces the backward pass too."""
    model, arguments = tiny_model(normalizer).train(), inputs("packed")
    model(**arguments).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**arguments).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_other_boundaries_do_not_recompile():
    """Every batch is packed differently; a graph per batch would cost more than it saves."""
    model, arguments, backend = tiny_model(), inputs("packed"), Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for lengths in ([80], [1, 79], [40, 40], [20, 20, 20, 20]):
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).contiguous()
        arguments["position_ids"] = positions
        close(compiled(**arguments).logits, model(**arguments).logits)
    assert backend.graphs == 1


def test_decoding_with_a_static_cache_is_one_graph():
    """What generate() compiles on accelerators: one token at a time, whatever the fill of the cache."""
    model, ids, backend = tiny_model("scaled_softpick"), tokens(2, 12), Recorder()
    expected = model(ids).logits
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    past = StaticCache(model.config, max_cache_len=16)
    logits = [model(ids[:, :6], past_key_values=past, use_cache=True).logits]
    logits += [compiled(ids[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(6, 12)]
    close(torch.cat(logits, 1), expected)
    assert backend.graphs == 1


def compiled_llama(**changes):
    backend = Recorder()
    model = foreign_model("llama", "softpick", initializer_range=0.2, max_position_embeddings=256, **changes).eval()
    return model, torch.compile(model, backend=backend, fullgraph=True), backend


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "packed and masked"])
def test_foreign_models_compile(kind):
    """Without an attention_mask through a T x T mask: transformers asks for packed attention whenever it traces."""
    (model, compiled, backend), arguments = compiled_llama(num_hidden_layers=1), {**inputs(kind), "use_cache": False}
    close(compiled(**arguments).logits, model(**arguments).logits)
    assert backend.graphs == 1
    assert bool(backend.square(LENGTH)) == ("attention_mask" not in arguments)


def test_foreign_models_decode_padded_rows_in_one_graph():
    """As generate() does: it makes the mask of each step before the compiled call."""
    (model, compiled, backend), ids = compiled_llama(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    past = StaticCache(model.config, max_cache_len=16)
    logits = [model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=past, use_cache=True).logits]
    for i in range(6, 12):
        token, seen = ids[:, i : i + 1], torch.nn.functional.pad(mask[:, : i + 1], (0, 15 - i))
        options = dict(inputs_embeds=model.get_input_embeddings()(token), past_key_values=past)
        made = create_causal_mask(config=model.config, attention_mask=seen, **options)
        logits.append(compiled(token, attention_mask=made, past_key_values=past, use_cache=True).logits)
    close(torch.cat(logits, 1)[mask == 1], model(ids, attention_mask=mask).logits[mask == 1])
    assert backend.graphs == 1


def test_inductor():
    """The backend that people use trusts the strides that the operator promises; a whole model takes too long here."""
    torch.manual_seed(0)
    visible = visible_keys(LENGTH, LENGTH, torch.device("cpu"), position_ids=inputs("packed")["position_ids"])
    projected = [torch.randn(2, LENGTH, heads, 8, requires_grad=True) for heads in (4, 2, 2)]

    def attention(*tensors: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in tensors)  # as the model has them: not contiguous
        return tiled_attention(query, key, value, visible, 0.5).flatten(2).square().sum()

    expected = torch.autograd.grad(attention(*projected), projected)
    actual = torch.autograd.grad(torch.compile(attention, fullgraph=True)(*projected), projected)
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)
