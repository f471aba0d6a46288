"""Queries of scaled normalizers: s_h * log(n_i) times q, in the dtype of the model and without a float32 copy of q."""

import pytest
import torch
from tiny_softpick import close, tiny_model, tokens
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_softpick.modeling.compat import TorchDispatchMode
from hf_softpick.modeling.modeling_backbone import _scale_queries

HALVES = (torch.bfloat16, torch.float16)
POSITION = torch.arange(50)[None]


class Made(TorchDispatchMode):
    """(dtype, elements) of every tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [
            (x.dtype, x.numel()) for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)
        ]
        return out


def scaled(dtype: torch.dtype, size: float = 1.0):
    """query, head_scale, the result, and the gradient it is given."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 50, 16).to(dtype).requires_grad_()
    scale = (torch.rand(4) * 0.5 + 0.2).requires_grad_()
    grad = (torch.randn(2, 4, 50, 16) * size).to(dtype)
    return query, scale, _scale_queries(query, scale, POSITION), grad


def factor(scale: Tensor) -> Tensor:
    return (scale[:, None] * torch.log(POSITION[:, None].to(scale.dtype) + 2))[..., None]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rounds_once(dtype, size):
    query, scale, out, grad = scaled(dtype, size)
    assert out.dtype == dtype and torch.equal(out, (query.detach().float() * factor(scale.detach())).to(dtype))
    out.backward(grad)
    assert query.grad.dtype == dtype and scale.grad.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (query, scale)]
    expected = torch.autograd.grad(exact[0] * factor(exact[1]), exact, grad.double())
    for ours, theirs in zip((query.grad, scale.grad), expected, strict=True):
        assert (ours.double() - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_no_float32_copy_forth_and_back(dtype):
    with Made() as seen:
        query, scale, out, grad = scaled(dtype)
        seen.made.clear()
        _scale_queries(query, scale, POSITION).backward(grad)
    assert (dtype, query.numel()) in seen.made
    assert not [x for x in seen.made if x == (torch.float32, query.numel())]


def test_no_float32_queries_before_the_entry():
    """In a bfloat16 model; under autocast over float32 weights, Llama's rotary embedding widens queries by itself."""
    model, ids = tiny_model("scaled_softpick", "tiled").bfloat16(), tokens(3, 50)
    attention = model.model.layers[0].self_attn
    entered, seen = [], Made()
    attention.q_proj.register_forward_hook(lambda *_: seen.made.clear())
    with pytest.MonkeyPatch.context() as patch, seen:
        held = ALL_ATTENTION_FUNCTIONS["tiled"]

        def entry(module, query, *arguments, **named):
            if module is attention:
                entered.append((query.dtype, query.numel(), list(seen.made)))
            return held(module, query, *arguments, **named)

        patch.setitem(ALL_ATTENTION_FUNCTIONS, "tiled", entry)
        model(ids)
    ((dtype, elements, made),) = entered
    assert dtype == torch.bfloat16 and made and (torch.float32, elements) not in made


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_bfloat16(reentrant):
    model, ids = tiny_model("scaled_softpick").bfloat16().train(), tokens(2, 24)
    gradients = []
    for options in (None, {"use_reentrant": reentrant}):
        model.zero_grad()
        if options:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_sharded_scale_has_its_gradient():
    """Tensor parallelism hands over a DTensor, of which a rank's heads are the local part."""
    query, scale, out, grad = scaled(torch.bfloat16)

    class Sharded:
        def to_local(self):
            return scale

    assert torch.equal(_scale_queries(query, Sharded(), POSITION), out)


def test_vmap_is_the_batch_or_refused():
    query, scale, out, _ = (x.detach() for x in scaled(torch.float32))
    close(torch.vmap(lambda q: _scale_queries(q[None], scale, POSITION)[0])(query), out)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch"):
        torch.vmap(lambda q: _scale_queries(q[None], scale, POSITION)[0])(query.bfloat16())
