"""Launching without a GPU: arguments and specialization through Triton's real just-in-time path for Hopper.

The kernels are compiled, and the launch itself is left out: a driver that only names its target stands in for CUDA's.
What is not real: the driver, and the tensors, which lie on the CPU.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel here")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from softpick_attention import backward, backward_prepare, forward, interface, kvcache, launch, tuning, visibility
from softpick_attention.tuning import Target

KERNELS = [
    forward.forward_kernel,
    forward.combine_kernel,
    backward.dq_kernel,
    backward.dkv_kernel,
    backward_prepare.delta_kernel,
    backward_prepare.bounds_kernel,
    visibility._intervals_kernel,
]


class _Driver:
    """Names a target and launches nothing."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Count of compiled programs, a callable; launches end after compilation."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    )
    monkeypatch.setattr(launch, "INTERPRET", True)  # lets CPU tensors pass
    target = Target("other", processors=132, relu_conversion=True)  # small tiles compile fast
    monkeypatch.setattr(launch, "current_target", lambda device: target)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield lambda: sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())
    for kernel in KERNELS:
        kernel.device_caches.clear()


def _train(T, S, documents, *, B=1, H=4, Hkv=2, D=64, dtype=torch.bfloat16, deterministic=True):
    """Forward and backward of packed rows, with boundaries as transformers gives them."""
    q = torch.zeros(B * T, H, D, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(B * S, Hkv, D, dtype=dtype, requires_grad=True) for _ in range(2))
    edges = torch.linspace(0, T, documents + 1).to(torch.int32)
    interface.softpick_attn_varlen_func(
        q, k, v, edges, edges, causal=True, deterministic=deterministic
    ).sum().backward()


@pytest.mark.parametrize("deterministic", [True, False])
def test_lengths_and_documents_do_not_compile_again(compiled, deterministic):
    """A compilation takes seconds on every rank; neither T nor the number of documents may cause one."""
    _train(1024, 1024, 3, H=4, Hkv=4, deterministic=deterministic)
    first = compiled()
    assert first > 0
    for T, documents in ((65, 1), (80, 2), (1000, 7), (4096, 16), (4097, 1)):
        _train(T, T, documents, H=4, Hkv=4, deterministic=deterministic)
    assert compiled() == first


def test_grouped_heads_compile_few_programs(compiled):
    """Short rows take other ways (packed heads, split keys, a program a query head): few, whatever the lengths are."""
    for T in (1, 2, 16, 17, 64, 65, 1000, 4096, 20_000):
        _train(T, T, 1)
    total = compiled()
    assert total <= 13
    for T in (3, 15, 33, 100, 5000, 10_001):
        _train(T, T, 1)
    assert compiled() == total


def test_cache_length_does_not_compile_again(compiled):
    """Decoding meets a new cache length at every token."""
    for length in (1, 15, 16, 17, 128, 1000, 4096, 100_000):
        cache = torch.zeros(1, length, 2, 64, dtype=torch.bfloat16)
        query = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
        kvcache.softpick_attn_with_kvcache(query, cache, cache)
        if length == 1:
            first = compiled()
    assert compiled() == first > 0


def test_layouts_of_transformers_do_not_compile_again(compiled):
    """[B, H, T, D] storage, as the models have it: strides grow with T, their alignment must not matter."""
    for T in (64, 65, 100):
        q, k, v = (torch.zeros(2, heads, T, 64, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2, 2))
        interface.softpick_attn_func(q, k, v, causal=True)
        if T == 64:
            first = compiled()
    assert compiled() == first > 0


SEEN = {
    "all keys": ({}, ("all", False, False, False)),
    "causal": (dict(causal=True), ("band", False, False, False)),
    "cached": (dict(causal=True, length=50), ("band", False, False, False)),
    "window": (dict(causal=True, window_size=(100, 0)), ("band", True, False, False)),
    "padded": (dict(causal=True, key_mask=torch.ones(2, 200, dtype=torch.bool)), ("band", False, True, False)),
    "packed": (dict(documents=2), ("given", True, False, False)),
}


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("name", SEEN)
def test_rows_by_a_band_read_no_intervals(compiled, name, deterministic):
    """Neither kernel reads tensors for plain causal rows, with a cache and a window too, nor asks who sees a tile."""
    options, expected = dict(SEEN[name][0], deterministic=deterministic), SEEN[name][1]
    with launch.watch_launches() as launches:
        if options.pop("documents", None):
            _train(200, 200, 2, deterministic=deterministic)
        else:
            q = torch.zeros(2, options.pop("length", 200), 4, 32, dtype=torch.float16, requires_grad=True)
            k = torch.zeros(2, 200, 4, 32, dtype=torch.float16)
            interface.softpick_attn_func(q, k, k, **options).sum().backward()
    names = ["forward_kernel", "delta_kernel", "dkv_kernel"] + ["dq_kernel"] * deterministic
    assert [x.kernel for x in launches if x.kernel != "bounds_kernel"] == names
    assert ("bounds_kernel" in [x.kernel for x in launches]) == (expected[0] == "given")
    found = [x.switches[1:5] for x in launches if x.switches]  # ROWS, LEFT, HAS_KEYS, HAS_MASK
    assert set(found) == {expected} and len(found) == len(names) - 1


VARIANTS = {
    "all keys": {},
    "causal": dict(causal=True),
    "window": dict(causal=True, window_size=(100, 0)),
    "both windows": dict(window_size=(100, 100)),
    "top left": dict(causal=True, alignment="top_left"),
    "key mask": dict(causal=True, key_mask=torch.ones(2, 200, dtype=torch.bool)),
    "dense mask": dict(attn_mask=torch.ones(2, 1, 150, 200, dtype=torch.bool)),
    "mask of heads": dict(attn_mask=torch.ones(4, 150, 200, dtype=torch.bool), deterministic=False),
    "negative scale": dict(scale=-0.1, causal=True),
    "one pass": dict(deterministic=False, causal=True),
    "rectified": dict(normalizer="rectified_softmax", causal=True),
    "softmax": dict(normalizer="softmax", causal=True, deterministic=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles(compiled, variant):
    """The interpreter accepts programs that the compiler refuses, bfloat16 among them."""
    q = torch.zeros(2, 150, 4, 40, dtype=torch.bfloat16, requires_grad=True)
    k = torch.zeros(2, 200, 2, 40, dtype=torch.bfloat16, requires_grad=True)
    v = torch.zeros(2, 200, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    interface.softpick_attn_func(q, k, v, **VARIANTS[variant]).sum().backward()
    assert compiled() >= 3


@pytest.mark.parametrize("dim", [16, 59, 111, 256])
def test_every_dimension_compiles(compiled, dim):
    """Dimensions that fill no tile, and unaligned rows."""
    q, k, v = (torch.zeros(1, 70, 3, dim, dtype=torch.float16, requires_grad=True) for _ in range(3))
    interface.softpick_attn_func(q, k, v, causal=True).sum().backward()
    assert compiled() >= 4


def test_wide_strides_compile(compiled):
    """Rows 2^24 elements apart: offsets inside a tile need 64 bits."""
    huge = torch.empty(130 * 2**24, dtype=torch.float16).as_strided((1, 129, 2, 64), (0, 2**24, 64, 1))
    interface.softpick_attn_func(huge, huge, huge, causal=True)
    assert compiled() == 1


def test_autotune_times_alternatives(compiled, monkeypatch):
    """Only on request; the fastest configuration is remembered for the shape."""
    monkeypatch.setenv("SOFTPICK_ATTENTION_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_TUNED", {})
    times = iter(range(100, 0, -1))
    monkeypatch.setattr(triton.testing, "do_bench", lambda function, **_: (function(), next(times))[1])
    q = torch.zeros(1, 64, 2, 16, dtype=torch.float16)
    interface.softpick_attn_func(q, q, q)
    (chosen,) = tuning._TUNED.values()
    assert chosen != tuning.table_configuration("forward", "other", 2, 16)
    before = compiled()
    interface.softpick_attn_func(q, q, q)
    assert compiled() == before


def test_autotune_leaves_nothing_of_its_trials(compiled, monkeypatch):
    """A trial that splits the keys, before a final launch that does not: the results are those of the final one."""
    forwards = []
    run = forward.forward_kernel.run
    monkeypatch.setattr(forward.forward_kernel, "run", lambda *a, **k: (forwards.append(k["part"]), run(*a, **k))[1])
    choices = lambda kind, problem, launch: (launch(tuning.Config(16, 16)), tuning.Config(16, 64))[1]  # noqa: E731
    monkeypatch.setattr(forward, "configuration", choices)
    monkeypatch.setattr(forward, "decode_splits", lambda *facts: 2 if facts[-1] == 16 else 0)
    q = torch.zeros(1, 8, 1, 16, dtype=torch.float16)
    with launch.watch_launches() as launches:
        interface.softpick_attn_func(q, q, q)
    assert [x.kernel for x in launches] == ["forward_kernel"] * 2  # and nothing is joined
    assert len(forwards) == 2 and forwards[0] is not None and forwards[1] is None
