"""Softpick attention on a GPU against its own softmax mode and the attention of others, in turns in one process.

    python benchmarks/gpu_attention.py [--only forward,decode] [--seconds 540] [--plot roofline.png] [--out FILE]
    python benchmarks/gpu_attention.py --ancestor parallel.py       the paper's kernel too, from a file of your own
    python benchmarks/gpu_attention.py --smoke                      every step at tiny sizes on a CPU; measures nothing

Sections: forward, backward (causal, T 1k to 32k, D 64 and 128), gqa (8 query heads to a KV head), packed (isolated
documents, per useful FLOP against the same rows dense and against dense rows of the documents' mean length), decode.
softpick, softmax and rectified are modes of our one kernel, "fast" is its backward that is not deterministic. First
everybody is compared with a float64 reference at a small size, and with it and with ours at the size that is timed:
what is wrong is not timed. Needs torch, triton, transformers and this checkout; matplotlib for --plot.
Ours is timed through the entry of transformers' registry that a model calls, but for decoding.
Writes benchmarks/results/gpu_attention.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from attention_rows import verdict_line
from attention_run import Benchmark
from gpu_cases import ITEM_BYTES, SECTIONS, plan, smoke_plan
from roofline import plot


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=540, help="leave out what does not fit (default %(default)s)")
    parser.add_argument("--dtype", choices=list(ITEM_BYTES), default="bfloat16")
    parser.add_argument("--flush-l2", action="store_true", help="empty the cache before each call as well")
    parser.add_argument("--ancestor", type=Path, help="Python file with the paper's kernel")
    parser.add_argument("--ancestor-function", default="parallel_softpick_attn", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/gpu_attention.json)")
    parser.add_argument("--plot", type=Path, help="PNG of TFLOP/s over T under the ceilings of the chip")
    parser.add_argument("--commit", help="what to record where the checkout has no git history")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes in Triton's interpreter, on the CPU")
    args = parser.parse_args()
    unknown = [name for name in args.only if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {','.join(unknown)} is not a section, expected some of {','.join(SECTIONS)}")
    if args.ancestor and not args.ancestor.is_file():
        parser.error(f"--ancestor {args.ancestor}: there is no such file")
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
        args.seconds, args.plot = 600, None
    elif not torch.cuda.is_available():
        parser.exit(2, "gpu_attention: needs a CUDA device; --smoke runs tiny sizes in Triton's interpreter\n")
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.exit(2, "gpu_attention: TRITON_INTERPRET is set, so no kernel would run on the device; unset it\n")
    return args


def main() -> int:
    """Measure, print the table and the promises, write the record; 1 if a kernel is wrong or a promise missed."""
    args = arguments()
    benchmark = Benchmark(args)
    cases = smoke_plan(args.dtype) if args.smoke else plan(args.only, args.dtype)
    try:
        benchmark.run(cases)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept")
    if args.smoke:
        print(f"smoke: {len(benchmark.rows)} rows went through every step; nothing was measured")
    said = benchmark.verdicts()
    hopper = not args.smoke and str(benchmark.environment["gpu"]["capability"]).startswith("9.")
    if not args.smoke and not hopper:
        print("the promises are about Hopper; on this device they are only compared")
    print(*map(verdict_line, said), sep="\n")
    path = benchmark.write()
    if path:
        print(path)
    if args.plot and benchmark.rows:
        try:
            plot(json.loads(path.read_text()), args.plot)
            print(args.plot)
        except (ImportError, ValueError) as error:
            print(f"no plot: {error}; later: python benchmarks/roofline.py {path} {args.plot}")
    missed = hopper and any(s["verdict"] == "MISSED" and not s["stretch"] for s in said)
    return 1 if benchmark.failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
