"""The checks of tests/kernels/test_kernels_gpu.py at small sizes, so that no GPU is what they are tried on first."""

import pytest
import torch
from kernel_cases import Case
from kernel_checks import (
    check_decoding,
    check_far_strides,
    check_many_programs,
    check_many_rows,
    check_nan,
    check_on,
    check_repeats,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(dtype, monkeypatch):
    for layout in ("dense", "gaps"):
        check_on(Case(dtype, length=40, kind="doc_empty", config=None, layout=layout), CPU, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding(dtype):
    check_decoding(CPU, dtype, "softpick", length=45, heads=(4, 2), dim=16)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_repeats(deterministic):
    check_repeats(CPU, 2, deterministic, length=40, dim=16, batch=1, heads=(2, 1))


def test_far_strides():
    check_far_strides(CPU, 2**13)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_many_rows(deterministic):
    check_many_rows(CPU, 70, 2, 16, deterministic)


def test_many_programs():
    check_many_programs(CPU, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype):
    check_nan(CPU, dtype)
