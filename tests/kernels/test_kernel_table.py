"""The stored table of registers, spills, shared memory and instructions: up to date, within its limits, and true."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel here")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import kernel_table  # noqa: E402
from kernel_table import DIMS, SHARED_LIMIT, Row, compile_row, digest, fits, main_loop, rows  # noqa: E402

STORED = json.loads(kernel_table.RESULTS.read_text())
# What CI compiles again: every kernel once on Hopper, the main ones elsewhere, and each dtype.
AGAIN = [
    *(Row("sm90", kernel, "bf16", 64) for kernel in kernel_table.KERNELS),
    *(Row(family, kernel, "fp16", 64) for family in ("sm80", "sm100") for kernel in ("forward", "dkv")),
    Row("sm90", "dq", "fp32", 64),
    Row("gfx9", "decode", "bf16", 64),
]


def test_stored_table_belongs_to_these_sources():
    """A change of a kernel must be followed by a look at what it costs."""
    assert STORED["digest"] == digest(), "kernels changed: run python benchmarks/kernel_table.py and commit its result"
    assert set(STORED["rows"]) == {str(row) for row in rows()}
    stale = [str(row) for row in rows() if tuple(STORED["rows"][str(row)]["config"]) != row.config()]
    assert not stale, "configurations changed: run python benchmarks/kernel_table.py and commit its result"


@pytest.mark.parametrize("family", SHARED_LIMIT)
def test_no_spill_in_the_loop_and_shared_memory_fits(family):
    """A spill in the main loop costs more than a smaller tile; too much shared memory does not launch at all."""
    checked = 0
    for row in rows():
        if row[0] == family:
            assert fits(row, STORED["rows"][str(row)]), (str(row), STORED["rows"][str(row)])
            checked += 1
    assert checked >= len(kernel_table.KERNELS) * len(DIMS) * len(kernel_table.DTYPES)


def test_a_row_that_does_not_fit_is_seen():
    """Each limit by itself."""
    row = Row("sm90", "forward", "bf16", 64)
    good = {"shared": 1000, "spilled": 0, "spills_in_loop": 0}
    assert fits(row, good)
    for name, limit in (
        ("shared", SHARED_LIMIT["sm90"]),
        ("spilled", kernel_table.SPILL_LIMIT),
        ("spills_in_loop", 0),
    ):
        assert fits(row, good | {name: limit}) and not fits(row, good | {name: limit + 1})


def _instructions(kernel: str, dim: int, normalizer: str) -> float:
    return STORED["rows"][str(Row("sm90", kernel, "bf16", dim, normalizer))]["instructions"]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernels, limit", [(("forward",), 1.2), (("dq", "dkv"), 1.35), (("dkv_fast",), 1.35)])
def test_softpick_costs_few_instructions_more_than_softmax(kernels, limit, dim):
    """Of the main loop, in the same kernel: what softpick adds is a subtraction, a comparison and a selection."""
    ours, theirs = (sum(_instructions(kernel, dim, n) for kernel in kernels) for n in ("softpick", "softmax"))
    assert 1.0 < ours / theirs <= limit


@pytest.mark.parametrize("row", AGAIN, ids=str)
def test_compiled_again_gives_the_stored_row(row):
    """The table is what the compiler says, not what somebody wrote."""
    assert compile_row(row) == STORED["rows"][str(row)]


@pytest.mark.sweep
@pytest.mark.parametrize("row", list(rows()), ids=str)
def test_every_row_again(row):
    """All of them."""
    assert compile_row(row) == STORED["rows"][str(row)]


def test_main_loop_is_the_shortest_with_most_products():
    """The loop with masks has the same products and more instructions; the narrow one for NaN has fewer products."""
    sass = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/               @P1 BRA `(.L_x_1) 0x40 ;
        /*0060*/                   MOV R1, R2 ;
        /*0070*/               @P1 BRA 0x60 ;
    """
    assert main_loop(sass) == {"HGMMA": 1, "BRA": 1}
