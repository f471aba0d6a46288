"""Registers, spills, shared memory and instructions a score of every shipped kernel configuration, without a GPU.

    python benchmarks/kernel_table.py                 # compile everything, write benchmarks/results/kernel_table.json
    python benchmarks/kernel_table.py --only sm90     # one family; the rows of the others are kept
    python benchmarks/kernel_table.py --show          # print the stored table as Markdown

The tests compile a part of it again and compare. Instructions are those of the loop over keys (or queries) that needs
no mask, from the machine code, divided by the scores that a thread computes in it.
"""

import argparse
import ast
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels/softpick_attention/torch-ext"
sys.path.append(str(SOURCES))

from softpick_attention.backward import dkv_kernel, dq_kernel  # noqa: E402 -- importable from a bare checkout
from softpick_attention.backward_prepare import Rows  # noqa: E402
from softpick_attention.forward import Part, forward_kernel  # noqa: E402
from softpick_attention.launch import Seen, Switches  # noqa: E402
from softpick_attention.normalizers import NORMALIZERS  # noqa: E402
from softpick_attention.tuning import Config, table_configuration  # noqa: E402

RESULTS = ROOT / "benchmarks/results/kernel_table.json"
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may use.
SHARED_LIMIT = {"sm80": 166912, "sm86": 101376, "sm90": 232448, "sm100": 232448, "gfx9": 65536}
# Bytes of stack a thread may spill round the main loop, where it is paid once a tile of queries. Inside: none.
SPILL_LIMIT = 144
KERNELS = {
    "forward": forward_kernel,
    "decode": forward_kernel,
    "dq": dq_kernel,
    "dkv": dkv_kernel,
    "dkv_fast": dkv_kernel,
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
DIMS = (64, 128, 256)


class Row(tuple):
    """(family, kernel, dtype, head dimension, normalizer, masks), also the key of a row in the table."""

    def __new__(
        cls, family: str, kernel: str, dtype: str, dim: int, normalizer: str = "softpick", masks: bool = False
    ):
        return super().__new__(cls, (family, kernel, dtype, dim, normalizer, masks))

    def __str__(self) -> str:
        family, kernel, dtype, dim, normalizer, masks = self
        return f"{family} {kernel} {dtype} D{dim} {normalizer}{' masks' if masks else ''}"

    def config(self) -> Config:
        """What the package launches for this row."""
        family, kernel, dtype, dim, _, masks = self
        return table_configuration(kernel, family, DTYPES[dtype], dim, masks)


def rows() -> Iterator[Row]:
    """Every table entry in softpick; with key and dense mask, and in softmax mode, where that is another program."""
    for family in TARGETS:
        for kernel in KERNELS:
            for dim in DIMS:
                yield from (Row(family, kernel, dtype, dim) for dtype in DTYPES)
                if family in ("sm80", "sm90"):
                    yield Row(family, kernel, "bf16", dim, masks=True)
                if family == "sm90":
                    yield Row(family, kernel, "bf16", dim, "softmax")


def source_of(row: Row) -> ASTSource:
    """The kernel as the package launches it for packed rows, every tensor aligned to 16 bytes."""
    family, kernel, dtype, dim, normalizer, masks = row
    function, config = KERNELS[kernel], row.config()
    decode, fast, prefill = kernel == "decode", kernel == "dkv_fast", kernel in ("forward", "decode")
    exact = dtype != "fp32" or family == "gfx9" or (dim > 128 and not prefill)
    switches = Switches(
        NORMALIZERS[normalizer], ROWS="given", LEFT=True, HAS_KEYS=masks, HAS_MASK=masks, G=4 if decode else 1, D=dim,
        DV=dim, BD=dim, BDV=dim, NEGATE=False, PRECISION="ieee" if exact else "tf32x3", RELU=family != "gfx9", UNIT=16,
        MASK_UNIT=16, BM=config.block_m, BN=config.block_n, WIDE=not prefill, PACK=decode, SPLIT=decode, ADD_DQ=fast,
    )  # fmt: skip
    mask = "u8" if masks else None
    pointers = dict.fromkeys(("q", "k", "v", "do", "out", "dq", "dk", "dv"), dtype) | {
        "seen": Seen("i32", "i32", mask, mask, "i32" if kernel.startswith("dkv") else None),
        "rows": Rows("fp32", "fp32", "fp32" if switches.NORMALIZER.MINUS_ONE else None),
        "part": Part("fp32", "fp32", "fp32") if decode else None,
        "lse": "fp32",
    }
    if kernel.startswith("dkv"):
        pointers["dq"] = "fp32" if fast else None
    signature, values, attributes = {}, {}, {}

    def pointer(path: tuple[int, ...], dtype: str | None) -> str:
        if dtype is None:
            values[path] = None
            return "constexpr"
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + dtype

    for index, name in enumerate(function.arg_names):
        given = pointers.get(name)
        if name == "C":
            signature[name], values[(index,)] = "constexpr", switches
        elif isinstance(given, tuple):
            signature[name] = type(given)(*(pointer((index, i), dtype) for i, dtype in enumerate(given)))
        elif name in pointers:
            signature[name] = pointer((index,), given)
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
    return ASTSource(function, signature, values, attributes)


def compile_row(row: Row) -> dict:
    """Compile one row and read its resources.

    Returns:
        config, shared (bytes), registers, spilled (bytes of stack a thread, or spilled registers), and for half
        precision on NVIDIA, of the unmasked loop: `instructions` a score, and `spills_in_loop`, how many of them move
        a spilled register.
    """
    family, config = row[0], row.config()
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    compiled = triton.compile(source_of(row), target=TARGETS[family], options=options)
    result = {"config": list(config), "shared": compiled.metadata.shared}
    if TARGETS[family].backend == "hip":
        text = compiled.asm["amdgcn"]
        read = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        spilled = read["vgpr_spill_count"] * 4 + read["private_segment_fixed_size"]
        return result | {"registers": read["vgpr_count"], "spilled": spilled}
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    result |= {"registers": int(registers), "spilled": int(stack) + int(local)}
    if row[2] != "fp32":
        scores = config.block_m * config.block_n / (config.num_warps * 32)
        loop = main_loop(_cuobjdump(compiled.asm["cubin"], "-sass"))
        result["instructions"] = round(sum(loop.values()) / scores, 2)
        result["spills_in_loop"] = loop["LDL"] + loop["STL"]
    return result


def fits(row: Row, result: dict) -> bool:
    """Whether a result of `compile_row` keeps the limits; dense masks, which are slow anyway, may spill."""
    if result["shared"] > SHARED_LIMIT[row[0]]:
        return False
    return row[5] or (result["spilled"] <= SPILL_LIMIT and not result.get("spills_in_loop"))


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main_loop(sass: str) -> Counter:
    """Instructions, by name, of the loop with most tensor-core work; of several, the shortest, which has no mask."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    place = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b\S*.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            first = place[int(jump[1], 16)]
            names = (re.sub(r"^@!?\w+\s+", "", t).split()[0].split(".")[0] for _, t in lines[first : index + 1])
            counts = Counter(names)
            products = sum(count for name, count in counts.items() if name.endswith("MMA"))
            if products:
                loops.append((first, index, products, counts))
    # Waiting for a barrier jumps back as well, from the end of the program: only innermost loops count.
    inner = [x for x in loops if not any(x is not y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    most = max(products for *_, products, _ in inner)
    return min((counts for *_, products, counts in inner if products == most), key=lambda counts: sum(counts.values()))


def digest() -> str:
    """Changes when the code of a kernel or the compiler does, not with comments, docstrings or layout."""
    parts = [triton.__version__]
    for name in ("normalizers", "tiles", "forward", "backward"):
        tree = ast.parse((SOURCES / f"softpick_attention/{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        parts.append(ast.dump(tree))
    return sha256("\0".join(parts).encode()).hexdigest()


def markdown(table: dict) -> str:
    """The table's ratios and resources for a README."""
    stored = table["rows"]
    lines = ["| sm_90, bf16 | softpick | softmax | ratio |", "| --- | --- | --- | --- |"]
    for dim in DIMS[:2]:
        pairs = {}
        for kernel in KERNELS:
            ours, theirs = (
                stored[str(Row("sm90", kernel, "bf16", dim, n))]["instructions"] for n in ("softpick", "softmax")
            )
            pairs[kernel] = ours, theirs
            lines.append(f"| {kernel}, D {dim} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
        ours, theirs = (sum(pairs[kernel][side] for kernel in ("dq", "dkv")) for side in (0, 1))
        lines.append(f"| dq + dkv, D {dim} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print as it goes, and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, help="compile the rows of one family and keep the others")
    parser.add_argument("--show", action="store_true", help="print the stored table as Markdown and stop")
    options = parser.parse_args()
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    if options.show:
        if not table["rows"]:
            parser.error(f"{RESULTS} does not exist yet: run this script without --show first")
        print(markdown(table))
        return
    work = [row for row in rows() if options.only in (None, row[0])]
    wanted = {str(row) for row in rows()}
    table["rows"] = {key: value for key, value in table["rows"].items() if key in wanted}
    started = time.monotonic()
    for number, row in enumerate(work, 1):
        result = table["rows"][str(row)] = compile_row(row)
        left = (time.monotonic() - started) / number * (len(work) - number)
        flag = "" if fits(row, result) else "  <- DOES NOT FIT"
        print(f"{number}/{len(work)} {row}: {result}{flag}  ({left / 60:.1f} min left)", flush=True)
    table |= {"triton": triton.__version__, "python": platform.python_version(), "digest": digest()}
    table["rows"] = dict(sorted(table["rows"].items()))
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table) if options.only in (None, "sm90") else f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
