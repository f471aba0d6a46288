"""The Triton kernels on a GPU: what the interpreter cannot tell. Real arithmetic, above all bfloat16; the shipped
configurations; races; repeatability; compilations; tensors of more than 2^31 elements.

tests/interpreted/test_kernel_checks.py runs the same checks at small sizes, so that they are known to work.
"""

import pytest

pytest.importorskip("triton", reason="Triton has no wheel here")

import torch
from kernel_cases import NORMALIZERS, VALUES, Case, covering
from kernel_checks import (
    check_decoding,
    check_far_strides,
    check_many_programs,
    check_many_rows,
    check_nan,
    check_on,
    check_repeats,
)

from softpick_attention import (
    backward,
    backward_prepare,
    forward,
    softpick_attn_func,
    softpick_attn_varlen_func,
    softpick_attn_with_kvcache,
    visibility,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SHAPES = VALUES._replace(
    dtype=(*DTYPES, torch.bfloat16),
    length=(1, 2, 17, 64, 127, 128, 129, 200, 1023),
    extra=(0, 1, 70, 500, -5),
    heads=((1, 1), (4, 4), (8, 2), (9, 3), (16, 1)),
    config=(None,),
    batch=(1, 3),
    splits=(0, 1, 5),
    processors=(1,),
)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32, in the kernels and in what they are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("case", covering(60, 3000, SHAPES), ids=lambda case: case.id)
def test_is_the_formula(case, monkeypatch):
    check_on(case, GPU, monkeypatch)


@pytest.mark.parametrize("dim", VALUES.dim)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "doc_window", "holes", "mask_bh"])
def test_every_shipped_configuration(dim, dtype, kind, monkeypatch):
    """Both backwards, rows of many tiles, and the tiles that masks halve."""
    for deterministic in (True, False):
        case = Case(dtype, dim, 0, 515, 33, (4, 2), kind, deterministic=deterministic, config=None)
        check_on(case, GPU, monkeypatch)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_the_rows_of_the_prefill(dtype, normalizer):
    check_decoding(GPU, dtype, normalizer)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["causal", "doc_short", "holes"])
def test_fifty_runs_are_bit_equal(dim, kind):
    check_repeats(GPU, 50, dim=dim, kind=kind)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_races(deterministic):
    """Many programs at once, of all lengths."""
    check_repeats(GPU, 20, deterministic, batch=20, length=513, kind="causal")


@pytest.mark.sweep
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("kind", ["causal", "doc_window", "holes", "mask_b1"])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_races_for_long(deterministic, kind, dim):
    check_repeats(GPU, 250, deterministic, batch=60, length=513, kind=kind, dim=dim)


KERNELS = (
    forward.forward_kernel,
    forward.combine_kernel,
    backward_prepare.delta_kernel,
    backward_prepare.bounds_kernel,
    backward.dq_kernel,
    backward.dkv_kernel,
    visibility._intervals_kernel,
)


def compiled() -> int:
    """Compiled programs of all kernels; the first entry of a device's cache has held them since Triton 3.4."""
    return sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())


def test_lengths_documents_and_caches_do_not_compile_again():
    def train(length, documents):
        q, k, v = (torch.randn(length, 8, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        cu = torch.linspace(0, length, documents + 1, device=GPU).int()
        softpick_attn_varlen_func(q, k, v, cu, cu, causal=True).sum().backward()
        softpick_attn_func(q[None], k[None], v[None], causal=True).sum().backward()

    def decode(length, room):
        caches = (torch.zeros(4, room, 2, 64, device=GPU, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(4, 1, 8, 64, device=GPU, dtype=torch.bfloat16)
        softpick_attn_with_kvcache(q, *caches, cache_seqlens=length, causal=True)

    train(1000, 3)
    decode(100, 512)
    before = compiled()
    assert before >= 6
    for length, documents in ((65, 1), (128, 7), (999, 40), (1024, 2), (4097, 3)):
        train(length, documents)
    for length, room in ((1, 512), (16, 512), (512, 512), (700, 1001), (5000, 8192)):
        decode(length, room)
    assert compiled() == before


def need(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} GiB are free")


def test_strides_beyond_2_31():
    need(20)
    check_far_strides(GPU, 2**31 + 16)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_outputs_of_more_than_2_31_elements(deterministic):
    need(40)
    check_many_rows(GPU, 2**17 + 1, 128, 128, deterministic)


def test_more_than_65535_heads_in_a_batch():
    check_many_programs(GPU, 70_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_neither_lost_nor_spread(dtype):
    check_nan(GPU, dtype)
