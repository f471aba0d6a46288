"""The GPU benchmark without a GPU: its arithmetic, its verdicts, and every step at tiny sizes in the interpreter."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import attention_compile
    import attention_peers
    import attention_reference
    import attention_rows
    import gpu_attention
    import gpu_cases
    import gpu_timing
    import roofline
    from gpu_cases import Case

DENSE = Case("dense", 4, 32, 32, 4096, 4096, 64)


def row(kind="dense", work="forward", speed=None, **more):
    """A row with as much as a verdict reads."""
    speed = {name: {"p50": value} for name, value in (speed or {}).items()}
    return {"kind": kind, "work": work, "case": "somewhere", "dim": 128, "speed": speed} | more


def test_flop_of_dense_causal():
    """4 B H T^2 D halved, backward 2.5 times that; grouped keys change nothing."""
    assert DENSE.flop("forward") == 4 * 4 * 32 * 4096**2 * 64 / 2
    assert DENSE.flop("backward") == 2.5 * DENSE.flop("forward")
    assert DENSE.flop("both") == 3.5 * DENSE.flop("forward")
    assert replace(DENSE, kind="gqa", kv_heads=4).flop("forward") == DENSE.flop("forward")


def test_flop_of_packed_documents():
    """Only pairs inside a document count; one document a row counts as dense rows do."""
    packed = Case("packed", 1, 2, 2, 100, 100, 16, documents=(60, 1, 39))
    assert packed.flop("forward") == 4 * 2 * 16 * (60**2 + 1 + 39**2) / 2
    assert packed.boundaries == [0, 60, 61, 100]
    assert packed.shapes == ((100, 2, 16), (100, 2, 16))
    assert replace(DENSE, kind="packed", documents=(4096,) * 4).flop("both") == DENSE.flop("both")


def test_bytes_of_decoding():
    """Keys and values of every KV head once, and a little for query and output."""
    case = gpu_cases.decode(16, 8192, 128, "bfloat16")
    assert (case.batch, case.kv_heads, case.heads, case.in_flight) == (2, 8, 32, 16)
    assert case.bytes == 2 * (2 * 8192 * 8 * 128) * 2 + 2 * (2 * 32 * 128) * 2
    times = {"softpick": {"forward": [0.02, 0.01, 0.04]}}
    (found,) = attention_rows.rows_of(case, {"softpick": case}, times, 4.8e12, {})
    assert found["bandwidth_share"]["softpick"]["p50"] == round(case.bytes / 0.02e-3 / 4.8e12, 4)
    assert found["gigabytes_per_second"]["softpick"]["p80"] == round(case.bytes / 0.01e-3 / 1e9, 1)
    assert "GB/s" in attention_rows.line_of(found)


def test_rows_give_percentiles_and_ratios_turn_by_turn():
    """A ratio of medians would be 1 here; the median of the ratios is not."""
    times = {"softpick": {"forward": [1.0, 2.0, 4.0]}, "softmax": {"forward": [2.0, 4.0, 2.0]}}
    (found,) = attention_rows.rows_of(DENSE, dict.fromkeys(times, DENSE), times, None, {"skipped": {"x": "why"}})
    assert found["milliseconds"]["softpick"] == {"p50": 2.0, "p20": 1.0, "p80": 4.0}
    assert found["tflops"]["softpick"]["p50"] == round(DENSE.flop("forward") / 2e-3 / 1e12, 2)
    assert found["speed"] == {"softpick / softmax": {"p50": 2.0, "p20": 0.5, "p80": 2.0}}
    assert found["turns"] == 3 and found["skipped"] == {"x": "why"}
    assert "  / softmax 2.00" in attention_rows.line_of(found)


def test_packed_is_compared_per_flop():
    """Twice as fast at a quarter of the FLOP is half the speed."""
    packed = replace(DENSE, kind="packed", documents=(1024,) * 16)
    cases = {"softpick": packed, attention_rows.DENSE: DENSE}
    times = {"softpick": {"backward": [1.0]}, attention_rows.DENSE: {"backward": [2.0]}}
    (found,) = attention_rows.rows_of(packed, cases, times, None, {})
    assert found["speed"][f"softpick / {attention_rows.DENSE}"]["p50"] == 0.5
    promise = next(p for p in attention_rows.PROMISES if p.text.startswith("packed"))
    assert attention_rows.verdict(promise, [found])["verdict"] == "MISSED"


def test_the_worst_row_decides():
    promise = attention_rows.PROMISES[0]
    rows = [row(speed={"softpick / softmax": value}) for value in (0.99, 0.96, 0.97)]
    assert attention_rows.verdict(promise, rows)["verdict"] == "kept"
    said = attention_rows.verdict(promise, [*rows, row("gqa", speed={"softpick / softmax": 0.94})])
    assert (said["verdict"], said["worst"], said["rows"], said["median"]) == ("MISSED", 0.94, 4, 0.97)
    assert "worst 0.940" in attention_rows.verdict_line(said)
    slow = {"softpick / softmax": 0.1}
    others = [row("packed", speed=slow), row(work="backward", speed=slow)]
    assert attention_rows.verdict(promise, rows + others)["verdict"] == "kept"


@pytest.mark.parametrize("promise", attention_rows.PROMISES, ids=lambda promise: promise.text)
def test_a_missing_peer_is_not_measured(promise):
    """Neither kept nor missed: nothing was compared."""
    kinds, works = ("dense", "gqa", "packed", "decode"), ("forward", "backward", "both")
    rows = [row(kind, work, keys=8192, in_flight=8) for kind in kinds for work in works]
    said = attention_rows.verdict(promise, rows)
    assert said["verdict"] == "not measured" and "worst" not in said
    assert attention_rows.verdict_line(said).startswith("not measured")


def test_either_flash_attention_2_counts():
    promise = next(p for p in attention_rows.PROMISES if "1.0x" in p.text)
    both = row(speed={"softpick / flash-attn": 0.9, "softpick / SDPA flash": 1.1})
    assert attention_rows.verdict(promise, [both])["worst"] == 0.9
    assert attention_rows.verdict(promise, [row(speed={"softpick / SDPA flash": 1.1})])["verdict"] == "kept"


def test_decode_promise_is_about_long_caches():
    promise = next(p for p in attention_rows.PROMISES if p.keys == ("share",))
    share = {"softpick": {"p50": 0.3}}
    short = row("decode", keys=1024, in_flight=8, bandwidth_share=share)
    assert attention_rows.verdict(promise, [short])["verdict"] == "not measured"
    assert attention_rows.verdict(promise, [short | {"keys": 8192}])["verdict"] == "MISSED"


def test_document_lengths_fill_the_rows():
    """No token is dropped, no document crosses a row, and some were cut there."""
    lengths = gpu_cases.document_lengths(8, 2048)
    assert sum(lengths) == 8 * 2048 and min(lengths) > 0 and max(lengths) <= 2048
    ends = {sum(lengths[: n + 1]) for n in range(len(lengths))}
    assert ends >= {2048 * n for n in range(1, 9)}
    assert lengths != gpu_cases.document_lengths(8, 2048, seed=1)
    assert 490 < statistics.median(gpu_cases.document_lengths(64, 2**20)) < 590


def test_matched_length_has_the_same_pairs_a_token():
    assert gpu_cases.matched_length((1024,) * 4) == 1024
    assert gpu_cases.matched_length((2048, 1, 1, 1)) == 2048
    assert gpu_cases.matched_length((5, 5)) == 128


def test_the_plan_covers_what_is_promised():
    cases = gpu_cases.plan(gpu_cases.SECTIONS, "bfloat16")
    assert {(c.queries, c.dim) for c in cases if c.kind == "dense"} == {
        (length, dim) for length in (1024, 2048, 4096, 8192, 16384, 32768) for dim in (64, 128)
    }
    for case in cases:
        if case.kind != "decode":
            assert case.heads * case.dim == 2048 and 16384 <= case.batch * case.queries <= 32768
    assert all(c.heads == 8 * c.kv_heads for c in cases if c.kind == "gqa")
    flights = [c.in_flight for c in cases if c.kind == "decode"]
    assert (min(flights), max(flights)) == (8, 256)
    assert {c.keys for c in cases if c.kind == "decode"} == {1024, 8192, 32768, 131072}
    assert {c.kind for c in gpu_cases.plan(("decode",), "float16")} == {"decode"}
    assert len({c.name for c in cases}) == len(cases)


def test_ceilings_of_hopper():
    """989 TFLOP/s on the tensor cores; at D 64 exp2 allows about as much, at D 128 twice that."""
    chip = roofline.chip_of("NVIDIA H200")
    assert chip.tensor == pytest.approx(989e12, rel=1e-3) and chip.exp2 == pytest.approx(3.87e12, rel=2e-3)
    far = roofline.ceilings(chip, 64, 2**30)
    assert far["tensor cores"] == pytest.approx(989, rel=1e-3)
    assert far["exp2"] == pytest.approx(4 * 64 * 3.865, rel=1e-3)
    assert far["no overlap"] == pytest.approx(1 / (1 / far["tensor cores"] + 1 / far["exp2"]))
    assert roofline.ceilings(chip, 128, 2**30)["exp2"] == pytest.approx(2 * far["exp2"])
    assert roofline.ceilings(chip, 64, 2**30, "backward")["exp2"] == pytest.approx(2.5 * far["exp2"])
    # A row of one tile computes twice what counts.
    assert roofline.ceilings(chip, 64, 128)["tensor cores"] == pytest.approx(far["tensor cores"] / 2)


def test_chips_are_found_by_whole_words():
    assert roofline.chip_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert roofline.chip_of("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert roofline.chip_of("NVIDIA GH200 480GB") is None and roofline.chip_of("Some GPU") is None


def test_plot(tmp_path):
    """A picture of dense rows, with ceilings; without a dense row there is nothing to draw."""
    times = {"softpick": {"forward": [1.0, 1.1], "backward": [3.0, 3.1]}, "SDPA flash": {"forward": [1.2, 1.2]}}
    rows = []
    for length in (1024, 4096):
        case = replace(DENSE, queries=length, keys=length)
        rows += attention_rows.rows_of(case, dict.fromkeys(times, case), times, None, {})
    facts = {"gpu": {"name": "NVIDIA H200"}, "packages": {"torch": "0"}, "commit": "abc", "date": "2000-01-01"}
    roofline.plot({"environment": facts, "rows": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        roofline.plot({"environment": facts, "rows": []}, tmp_path / "none.png")


def test_turns_rotate_neighbours_and_inputs():
    """Nobody always follows the same neighbour or sees the same inputs again."""
    calls = []

    def step(name):
        def run(count):
            calls.append((name, count % 2))
            return 0.0, 0.001, 0.003

        return run

    gaps, clocks = gpu_timing.in_turns({n: step(n) for n in "ab"}, 10, gpu_timing.Stopwatch("cpu"), most=4)
    assert calls[2:] == [("a", 0), ("b", 1), ("b", 0), ("a", 1)] * 2
    assert gaps["a"] == [[1.0] * 4, [2.0] * 4] and clocks == ""


@pytest.mark.parametrize("kind", ["dense", "gqa", "packed", "decode"])
def test_the_reference_finds_a_wrong_kernel(kind):
    """Another normalizer, or keys of other documents, are no rounding error; the truth in bfloat16 is."""
    case = next(c for c in gpu_cases.plan(gpu_cases.SECTIONS, "bfloat16") if c.kind == kind).small(64)

    def rounded(normalizer):
        exact = attention_reference.reference(case, normalizer)
        return lambda q, k, v: exact(q.float(), k.float(), v.float()).to(q.dtype)

    backward = kind != "decode"
    assert attention_reference.check(rounded("softpick"), case, "softpick", "cpu", backward) == ""
    assert "output is off by" in attention_reference.check(rounded("softmax"), case, "softpick", "cpu", backward)
    nan = attention_reference.check(lambda q, k, v: q * float("nan"), case, "softpick", "cpu", False)
    assert nan.startswith("output is off by nan")
    if kind == "packed":
        whole = attention_reference.reference(replace(case, documents=(sum(case.documents),)), "softpick")
        assert "off by" in attention_reference.check(lambda q, k, v: whole(q, k, v), case, "softpick", "cpu", False)


@pytest.mark.parametrize("kind", ["dense", "packed", "decode"])
def test_the_far_end_is_compared_at_any_size(kind):
    """What is right at the start and wrong in the last sequence is seen at the size that is timed."""
    case = next(c for c in gpu_cases.plan(gpu_cases.SECTIONS, "float32") if c.kind == kind).small(100)
    given = attention_reference.inputs(case, "cpu", False)
    out = attention_reference.reference(case, "softmax")(*(x.double() for x in given[:3])).float()
    assert attention_reference.tail_difference(out, given, case, "softmax") == ""
    out[-1, ..., -1, -1:] += 10
    assert "at the timed size output is off" in attention_reference.tail_difference(out, given, case, "softmax")


def test_a_gradient_that_is_wrong_is_named():
    found = [torch.ones(2), torch.ones(2), torch.ones(2)]
    assert attention_reference.difference(found, found, 1e-9) == ""
    assert attention_reference.difference(found, [*found[:2], 2 * found[2]], 0.1).startswith("dk is off by 0.5")


def test_peers_are_checked_in_other_processes(monkeypatch):
    """Softmax from torch passes as softmax and not as softpick; what raises is left to the caller."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    flash = next(peer for peer in attention_peers.peers() if peer.name == "SDPA flash")
    cudnn = next(peer for peer in attention_peers.peers() if peer.name == "SDPA cuDNN")
    case = replace(DENSE, dtype="float32").small(32)
    wrong = replace(flash, normalizer="softpick")
    found = attention_compile.check_in_parallel([(peer, case, True) for peer in (flash, wrong, cudnn)], "cpu")
    assert found[flash, case, True] == ""
    assert found[wrong, case, True].startswith("output is off by")
    assert (cudnn, case, True) not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only forward,fast", "--only fast is not a section, expected some of forward,backward,gqa,packed,decode"),
        ("--smoke --ancestor nowhere.py", "--ancestor nowhere.py: there is no such file"),
        ("", "gpu_attention: needs a CUDA device; --smoke runs tiny sizes in Triton's interpreter"),
    ],
    ids=["section", "ancestor", "no GPU"],
)
def test_what_cannot_run_is_named(arguments, message, monkeypatch, capsys):
    """With what to do, and no traceback; nothing but that line where there is no GPU."""
    monkeypatch.setattr(sys, "argv", ["gpu_attention.py", *arguments.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu_attention.main()
    said = capsys.readouterr()
    assert error.value.code == 2 and said.out == ""
    assert said.err.endswith(f"{message}\n") if arguments else said.err == f"{message}\n"


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_ours_is_timed_through_the_entry_that_a_model_calls(kind, monkeypatch):
    """Plain rows as causal, without tensors; packed ones as int32 intervals."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import hf_softpick.modeling.attention_interface  # noqa: F401 -- registers the entries

    case = next(case for case in gpu_cases.smoke_plan("float32") if case.kind == kind)
    calls = []

    def entry(module, query, key, value, seen, **options):
        calls.append((module.config.normalizer, seen))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "triton", entry)
    attend = attention_peers._ours("softpick", True, case, "cpu")
    tokens = (case.boundaries[-1],) if kind == "packed" else (case.batch, case.queries)
    query, key = torch.randn(*tokens, case.heads, case.dim), torch.randn(*tokens, case.kv_heads, case.dim)
    assert attend(query, key, key).shape == query.shape
    ((normalizer, seen),) = calls
    assert normalizer == "softpick" and (seen.start is None) == (kind == "dense")
    assert kind == "dense" or (seen.start.dtype == torch.int32 and len(seen.start.unique()) == len(case.documents))


def test_smoke(tmp_path):
    """Every kind of case is built, checked, timed and written; an ancestor that computes softmax is left out."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n\n\n"
        "def other_name(q, k, v, scale):\n"
        "    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale).transpose(1, 2)\n"
    )
    out = tmp_path / "smoke.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_attention.py"), "--smoke", "--out", str(out)]
    command += ["--ancestor", str(wrong), "--ancestor-function", "other_name"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "nothing was measured" in found.stdout and "kept" not in found.stdout
    assert "without ancestor: ancestor against float64: output is off by" in found.stdout
    result = json.loads(out.read_text())
    assert result["measured"] is False and result["failed"] == [] and result["left_out"] == []
    assert {(row["kind"], row["work"]) for row in result["rows"]} == {
        ("decode", "forward"),
        *((kind, work) for kind in ("dense", "gqa", "packed") for work in ("forward", "backward", "both")),
    }
    for row in result["rows"]:
        assert {"softpick", "softmax"} <= row["milliseconds"].keys() and row["configuration"]
        assert ("softpick fast" in row["milliseconds"]) == (row["work"] != "forward")
    assert {said["verdict"] for said in result["promises"]} == {"not measured"}
    assert str(tmp_path) not in out.read_text()
