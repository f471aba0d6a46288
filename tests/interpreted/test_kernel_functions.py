"""The public functions: arguments they refuse, empty tensors, autograd, checkpointing, bfloat16, lse."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import NORMALIZERS, Case, inputs, within
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softpick_attention
from softpick_attention import softpick_attn_func, softpick_attn_varlen_func, softpick_attn_with_kvcache
from softpick_attention.backward import attention_backward
from softpick_attention.forward import attention_forward
from softpick_attention.visibility import Visible


def tensors(length=8, total=8, heads=4, key_heads=2, dim=16, value_dim=16, batch=2, dtype=torch.float32):
    shapes = (batch, length, heads, dim), (batch, total, key_heads, dim), (batch, total, key_heads, value_dim)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


q, k, v = tensors()
bits = torch.ones(2, 8, dtype=torch.bool)
cu = torch.tensor([0, 3, 8], dtype=torch.int32)

dense, packed, cached = softpick_attn_func, softpick_attn_varlen_func, softpick_attn_with_kvcache
# Call, arguments, and what the message must say: what was given, what is allowed.
REFUSED = {
    "dropout": (dense, (q, k, v, 0.1), {}, "dropout_p is 0.1, expected 0.0"),
    "softcap": (dense, (q, k, v), {"softcap": 30.0}, "softcap is 30.0, expected 0.0"),
    "alibi": (dense, (q, k, v), {"alibi_slopes": torch.ones(4)}, "alibi_slopes are given, expected None"),
    "three dimensions": (
        softpick_attn_func,
        (q[0], k[0], v[0]),
        {},
        r"have 3, 3 and 3 dimensions, expected \[B, T, H",
    ),
    "batch": (dense, (q, k[:1], v[:1]), {}, "do not fit"),
    "value length": (dense, (q, k, v[:, :5]), {}, "do not fit"),
    "key dimension": (dense, (q, k[..., :8], v), {}, "do not fit"),
    "value heads": (dense, (q, k, v[:, :, :1]), {}, "do not fit"),
    "heads": (dense, tensors(heads=5), {}, "5 query heads and 2 key heads given, expected a multiple"),
    "no heads": (dense, tensors(key_heads=0), {}, "4 query heads and 0 key heads given"),
    "D = 0": (dense, tensors(dim=0), {}, "head dimension of q and k is 0, expected 1 to 256"),
    "D = 257": (dense, tensors(dim=257), {}, "is 257, expected 1 to 256. .*tiled"),
    "Dv = 257": (dense, tensors(value_dim=257), {}, "head dimension of v is 257, expected 1 to 256"),
    "float64": (dense, tensors(dtype=torch.float64), {}, "dtypes torch.float64.*tiled"),
    "integers": (dense, tensors(dtype=torch.int32), {}, "dtypes torch.int32.*expected the same one of"),
    "mixed dtypes": (
        softpick_attn_func,
        (q, k.half(), v),
        {},
        "torch.float32, torch.float16, torch.float32, expected",
    ),
    "devices": (dense, (q, k.to("meta"), v), {}, "on cpu, meta and cpu, expected one device"),
    "normalizer": (
        softpick_attn_func,
        (q, k, v),
        {"normalizer": "scaled_softpick"},
        "is 'scaled_softpick'.*multiply q",
    ),
    "alignment": (
        softpick_attn_func,
        (q, k, v),
        {"alignment": "left"},
        "is 'left', expected one of bottom_right, top_",
    ),
    "window": (dense, (q, k, v), {"window_size": (-2, 0)}, r"window_size is \(-2, 0\), expected \(left"),
    "fractional window": (dense, (q, k, v), {"window_size": (1.5, 0)}, r"window_size is \(1.5, 0\), expected \(left"),
    "window of one number": (dense, (q, k, v), {"window_size": 4}, r"window_size is 4, expected \(left"),
    "one window": (dense, (q, k, v), {"window_size": (4,)}, r"window_size is \(4,\), expected \(left"),
    "NaN scale": (dense, (q, k, v), {"scale": math.nan}, "scale is nan, expected a finite number"),
    "infinite scale": (dense, (q, k, v), {"scale": math.inf}, "scale is inf, expected a finite number"),
    "additive mask": (
        softpick_attn_func,
        (q, k, v),
        {"attn_mask": torch.zeros(8, 8)},
        "expected torch.bool.*mask == 0",
    ),
    "mask shape": (
        softpick_attn_func,
        (q, k, v),
        {"attn_mask": bits},
        r"shape \(1, 1, 2, 8\), expected \(2, 4, 8, 8\)",
    ),
    "mask rank": (
        softpick_attn_func,
        (q, k, v),
        {"attn_mask": bits[None, None, None]},
        "has 5 dimensions, expected at",
    ),
    "mask device": (dense, (q, k, v), {"key_mask": bits.to("meta")}, "is on meta, expected cpu"),
    "key mask shape": (dense, (q, k, v), {"key_mask": bits[:1]}, r"shape \(1, 8\), expected \(2, 8\)"),
    "key mask dtype": (
        softpick_attn_func,
        (q, k, v),
        {"key_mask": bits.long()},
        "dtype torch.int64, expected torch.bool",
    ),
    "varlen rank": (packed, (q, k, v, cu, cu), {}, r"must each be \[total, heads, D\]: flatten"),
    "varlen heads": (
        softpick_attn_varlen_func,
        (q[0, :, :3], k[0], v[0], cu, cu),
        {},
        "3 query heads and 2 key heads",
    ),
    "varlen dropout": (packed, (q[0], k[0], v[0], cu, cu, 5, 5, 0.5), {}, "dropout_p is 0.5"),
    "cu rank": (packed, (q[0], k[0], v[0], cu[None], cu), {}, r"cu_seqlens_q has shape \(1, 3\)"),
    "cu length": (packed, (q[0], k[0], v[0], cu, cu[:1]), {}, r"cu_seqlens_k has shape \(1,\)"),
    "cu dtype": (packed, (q[0], k[0], v[0], cu.float(), cu), {}, "expected .* of int32 or int64"),
    "cu numbers": (packed, (q[0], k[0], v[0], cu, cu[:2]), {}, "3 boundaries and cu_seqlens_k 2"),
    "varlen alignment": (
        softpick_attn_varlen_func,
        (q[0], k[0], v[0], cu, cu),
        {"alignment": 1},
        "alignment is 1, exp",
    ),
    "cache overflow": (
        softpick_attn_with_kvcache,
        (q, k, v, k[:, :2], v[:, :2], 7),
        {},
        "is 7, expected an int from 0 to 6.*room for 8 tokens and 2 are new",
    ),
    "cache below 0": (cached, (q, k, v), {"cache_seqlens": -1}, "is -1, expected an int from 0 to 8"),
    "k without v": (cached, (q, k, v, k), {}, "k and v must be given together"),
    "new dtype": (
        softpick_attn_with_kvcache,
        (q, k, v, k.half(), v),
        {},
        "k is .*torch.float16, expected .*as the cache",
    ),
    "new heads": (
        softpick_attn_with_kvcache,
        (q, k, v, k, v[:, :, :1]),
        {},
        r"v is \(2, 8, 1, 16\).*expected \[2, T_new",
    ),
    "new lengths": (cached, (q, k, v, k[:, :1], v[:, :2]), {}, "k holds 1 new tokens and v 2"),
    "lengths": (
        cached,
        (q, k, v),
        {"cache_seqlens": cu},
        r"shape \(3,\) and dtype torch.int32, expected an int or int",
    ),
    "fractional length": (cached, (q, k, v), {"cache_seqlens": 4.5}, "is 4.5, expected an int from 0 to 8"),
    "splits below 0": (cached, (q, k, v), {"num_splits": -1}, "num_splits is -1, expected 0"),
    "fractional splits": (cached, (q, k, v), {"num_splits": 2.5}, "num_splits is 2.5, expected 0"),
    "rows as a mask": (
        softpick_attn_with_kvcache,
        (q, k, v),
        {"cache_batch_idx": torch.ones(2, dtype=torch.uint8)},
        "dtype torch.uint8, expected int32 or int64",
    ),
    "float lengths": (cached, (q, k, v), {"cache_seqlens": cu[:2] / 1}, "expected an int or int"),
    "cache rows": (
        softpick_attn_with_kvcache,
        (q, k, v),
        {"cache_batch_idx": cu},
        r"shape \(3,\) and dtype .*, expected int32 or int64 \[2\]",
    ),
    "cache softcap": (cached, (q, k, v), {"softcap": 1.0}, "softcap is 1.0, expected 0.0"),
    "cache rank": (cached, (q[0], k, v), {}, "have 3, 4 and 4 dimensions"),
    "left padding": (cached, (q, k, v), {"cache_leftpad": cu}, r"cache_leftpad has shape \(3,\)"),
    "one number": (cached, (q[0, 0, 0], k, v), {}, "have 1, 4 and 4 dimensions"),
    "cache of one dimension": (cached, (q, k[0, 0, 0], v), {}, "have 4, 1 and 4 dimensions"),
    "cache scale": (
        softpick_attn_with_kvcache,
        (q, k, v),
        {"scale": math.nan},
        "scale is nan, expected a finite number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_what_was_given_and_what_is_allowed(name):
    function, arguments, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_refuses_cpu_tensors_without_the_interpreter():
    code = "import torch, softpick_attention as s; x = torch.ones(1, 1, 1, 16); s.softpick_attn_func(x, x, x)"
    folder = str(Path(softpick_attention.__file__).parents[1])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, environment.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: q is on the CPU, expected a GPU. Move the tensors, use" in done.stderr


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}, {"total": 0}, {"length": 0, "total": 0}], ids=str)
def test_empty_tensors_give_zeros_and_zero_gradients(empty, deterministic):
    given = [x.requires_grad_() for x in tensors(**empty, value_dim=24)]
    out, lse = softpick_attn_func(*given, causal=True, deterministic=deterministic, return_lse=True)
    assert out.shape == (*given[0].shape[:3], 24) and (out == 0).all()
    assert lse.shape == (given[0].shape[0], 4, given[0].shape[1])
    assert_close(lse, torch.full_like(lse, math.log(1e-6)))
    for x, gradient in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()
    flat = [x[0] if len(x) else x.flatten(0, 1) for x in given]
    ends = (torch.tensor([0, 0, len(x)]) for x in flat[:2])
    assert softpick_attn_varlen_func(*flat, *ends, causal=True).shape == (*flat[0].shape[:2], 24)
    assert softpick_attn_with_kvcache(*given).shape == out.shape


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_lse_is_the_logarithm_of_the_denominator(normalizer):
    """Natural; rows that see nothing have log eps, or +inf with softmax. No gradient flows through it."""
    given = [x.requires_grad_() for x in tensors()]
    mask = torch.arange(8)[:, None] > torch.arange(8)  # the first query sees nothing
    out, lse = softpick_attn_func(*given, scale=0.5, attn_mask=mask, return_lse=True, normalizer=normalizer)
    assert out.requires_grad and not lse.requires_grad and lse.dtype == torch.float32
    x = torch.einsum("bthd,bshd->bhts", *(x.double() for x in (given[0], given[1].repeat_interleave(2, 2)))) * 0.5
    if normalizer == "softpick":
        expected = torch.log((torch.expm1(x).abs() * mask).sum(-1) + 1e-6)
    else:
        kept = mask & (x >= 0) if normalizer == "rectified_softmax" else mask
        expected = torch.logsumexp(x.masked_fill(~kept, -math.inf), -1).nan_to_num(neginf=math.inf)
    within("lse", lse, expected.detach(), 2e-6)
    flat = [x[0].detach() for x in given]
    ends = torch.tensor([0, 8])
    _, varlen = softpick_attn_varlen_func(*flat, ends, ends, normalizer=normalizer, return_lse=True)
    _, dense = softpick_attn_func(*(x[:1].detach() for x in given), normalizer=normalizer, return_lse=True)
    assert varlen.shape == (4, 8) and torch.equal(varlen, dense[0])


def test_the_documented_defaults():
    """scale D ** -0.5, not causal; the window and both alignments for fewer queries than keys."""
    given = tensors(length=3)
    assert torch.equal(softpick_attn_func(*given), softpick_attn_func(*given, scale=0.25, causal=False))
    t, j = torch.arange(3)[:, None], torch.arange(8)
    for alignment, own in (("bottom_right", t + 5), ("top_left", t)):
        for causal, window, mask in (
            (True, (-1, -1), j <= own),
            (True, (2, 4), (j <= own) & (j >= own - 2)),
            (False, (-1, 1), j <= own + 1),
            (False, (1, -1), j >= own - 1),
        ):
            out = softpick_attn_func(*given, causal=causal, window_size=window, alignment=alignment)
            within(f"{alignment} {causal} {window}", out, softpick_attn_func(*given, attn_mask=mask), 1e-6)
            flat, ends = [x[0] for x in given], (torch.tensor([0, 3]), torch.tensor([0, 8]))
            packed = softpick_attn_varlen_func(
                *flat, *ends, 3, 8, causal=causal, window_size=window, alignment=alignment
            )
            within("packed", packed, out[0], 1e-6)


def test_masks_join():
    given = tensors()
    generator = torch.Generator().manual_seed(1)
    keys, mask = torch.rand(2, 8, generator=generator) > 0.3, torch.rand(4, 8, 8, generator=generator) > 0.3
    out = softpick_attn_func(*given, causal=True, key_mask=keys, attn_mask=mask)
    both = mask & keys[:, None, None] & torch.ones(8, 8, dtype=torch.bool).tril()
    within("out", out, softpick_attn_func(*given, attn_mask=both), 1e-6)


@pytest.mark.parametrize("needed", ["q", "k", "v", "qv", "qkv", ""])
def test_gradients_flow_to_those_that_ask(needed):
    given = [x.requires_grad_(name in needed) for name, x in zip("qkv", tensors(), strict=True)]
    out = softpick_attn_func(*given)
    assert out.requires_grad == bool(needed)
    if needed:
        out.sum().backward()
    assert [x.grad is not None for x in given] == [name in needed for name in "qkv"]


def test_differentiates_once():
    given = [x.requires_grad_() for x in tensors()]
    (dq,) = torch.autograd.grad(softpick_attn_func(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    given = [x.requires_grad_() for x in tensors()]
    keys = torch.arange(8) >= torch.tensor([[0], [3]])

    def attend(*x):
        return softpick_attn_func(*x, causal=True, key_mask=keys)

    plain, again = attend(*given), checkpoint(attend, *given, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    again.square().sum().backward()
    assert all(map(torch.equal, [x.grad for x in given], torch.autograd.grad(plain.square().sum(), given)))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_bfloat16_is_float32_rounded_once(normalizer):
    """The interpreter cannot compute in bfloat16; what it is given is computed in float32."""
    case = Case(length=40, dtype=torch.bfloat16)
    q, k, v, grad = inputs(case)
    visible = Visible(causal=True)

    def results(q, k, v, grad):
        out, lse = attention_forward(q, k, v, visible, 0.25, normalizer)
        return out, lse, *attention_backward(grad, q, k, v, out, lse, visible, 0.25, normalizer)

    ours, wide = results(q, k, v, grad), results(*(x.float() for x in (q, k, v, grad)))
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.float32] + 3 * [torch.bfloat16]
    assert torch.equal(ours[0], wide[0].bfloat16()) and torch.equal(ours[1], wide[1])
    for name, one, two in zip(("dq", "dk", "dv"), ours[2:], wide[2:], strict=True):
        # The backward starts from the rounded output.
        within(name, one, two, 2**-8 * two.abs() + 2**-8 * two.abs().max())


def test_needs_no_gradient_mode_and_leaves_inputs_alone():
    given = tensors()
    copies = [x.clone() for x in given]
    with torch.inference_mode():
        out = softpick_attn_func(*given)
    assert torch.equal(out, softpick_attn_func(*given)) and all(map(torch.equal, given, copies))


def test_a_mask_of_one_row_keeps_packed_documents_apart():
    """The function for the Hub gets boolean masks; one that is the same for all queries broadcasts."""
    heads_outside = [x.transpose(1, 2) for x in (q, k, v)]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, 8)
    seen = torch.arange(8)[None] > torch.tensor([[0], [-1]])

    def attend(mask):
        module = torch.nn.Module()
        return softpick_attention.flash_attn_forward(module, *heads_outside, mask, position_ids=positions)[0]

    assert_close(attend(seen[:, None, None]), attend(seen[:, None, None].expand(2, 1, 8, 8)))
