"""Real libraries on models that learned something: weights are quantized, losses are those of plain formulas, and what
is missing, refuses or does nothing is named."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from byte_models import byte_tokenizer, train_model, write_texts
from transformers import LlamaConfig, LlamaForCausalLM

from hf_softpick.analysis import quantization, quantization_formats
from hf_softpick.analysis.loading import load_model
from hf_softpick.analysis.quantization import measure_quantization, quantized_storage, token_loss
from hf_softpick.analysis.quantization_formats import FORMATS, Format, parse_formats
from hf_softpick.analysis.quantization_results import (
    draw_quantization,
    format_last,
    format_table,
    plot_quantization,
)
from hf_softpick.analysis.samples import batches, load_samples
from hf_softpick.errors import CheckpointError, RecipeError

EVAL = Path(__file__).parents[2] / "eval"
INSTALLED = tuple(name for name in FORMATS if not name.startswith("gptq"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("models")
    return {name: train_model(root / name, text, name) for name in ("softpick", "softmax")}


def _samples_of(text):
    def samples_of(loaded, calibration):
        return load_samples(
            text, loaded.tokenizer, add_bos=loaded.add_bos, seq_len=64, count=40, calibration=calibration
        )

    return samples_of


def _measure(folder, text, formats, **options):
    return measure_quantization(partial(load_model, folder), _samples_of(text), formats, **options)


def _no_op(model, request):
    """A library that changes nothing."""


def _unfrozen(model, request):
    from optimum.quanto import qint8, quantize

    quantize(model, weights=qint8)


def _poisoned(model, request):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)


def _raises(model, request):
    raise RuntimeError("no kernel\nfor this device")


def _plain_loss(model, samples):
    """One document at a time in float64: no packing, no positions, no batches."""
    model, losses = model.double(), []
    for row in samples.rows:
        for document in row["input_ids"].tensor_split((row["position_ids"] == 0).nonzero()[1:, 0]):
            log_p = model(document[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-log_p.gather(1, document[1:, None])[:, 0])
    return torch.cat(losses).mean().item(), sum(map(len, losses))


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_every_installed_format_quantizes_and_fewer_bits_cost_more(folders, text, normalizer):
    """The first use of quanto's 4 bits in an environment compiles its extension, for up to a minute."""
    seen = []
    result = _measure(
        folders[normalizer],
        text,
        parse_formats(INSTALLED),
        after_each=lambda result: seen.append(len(result["formats"])),
    )
    assert seen == list(range(len(INSTALLED) + 1))
    entries = {entry["format"]: entry for entry in result["formats"]}
    assert {name: entry["status"] for name, entry in entries.items()} == dict.fromkeys(INSTALLED, "measured")
    loaded = load_model(folders[normalizer])
    samples = _samples_of(text)(loaded, False)
    assert any((row["position_ids"] == 0).sum() > 1 for row in samples.rows)
    expected, tokens = _plain_loss(loaded.model, samples)
    assert result["baseline"]["loss"] == pytest.approx(expected, abs=1e-5)
    assert result["baseline"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert result["data"]["tokens"] == tokens and result["baseline"]["bits"] == 32
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    for name, entry in entries.items():
        assert entry["in_float"] == [] and entry["quantized_share"] == pytest.approx(linear / parameters)
        assert entry["loss_increase"] == entry["loss"] - result["baseline"]["loss"] != 0
        # torchao-int4 keeps its values in a byte each; every format adds scales.
        stored = 8 if name == "torchao-int4" else FORMATS[name].bits
        assert stored < entry["bits_per_weight"] <= stored + (2 if name.startswith("hqq") else 1), name
        assert FORMATS[name].distribution in entry["library"]
        if entry["bits"] == 8:
            assert abs(entry["loss_increase"]) < 0.003, name
        elif entry["bits"] == 4:
            assert abs(entry["loss_increase"]) < 0.03, name
    losses = [entries[f"quanto-{bits}"]["loss"] for bits in ("int2", "int4", "int8")]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2] + 0.005


def test_bfloat16_weights_are_quantized_from_bfloat16(folders, text, tmp_path):
    model = load_model(folders["softpick"])
    model.model.bfloat16().save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    result = _measure(tmp_path, text, parse_formats(["bnb-int8", "bnb-nf4", "quanto-int8", "torchao-int8-dynamic"]))
    assert result["baseline"]["dtype"] == "bfloat16" and result["baseline"]["bits"] == 16
    assert [entry["status"] for entry in result["formats"]] == ["measured"] * 4
    assert all(abs(entry["loss_increase"]) < 0.05 for entry in result["formats"])


def test_documents_of_a_foreign_model_do_not_see_each_other(text):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    samples = load_samples(text, byte_tokenizer(), add_bos=True, seq_len=96, count=8)
    loss, tokens = token_loss(model, list(batches(samples, 3)))
    expected, counted = _plain_loss(model, samples)
    assert loss == pytest.approx(expected, abs=1e-5) and tokens == counted


def test_a_format_that_leaves_weights_in_float_is_refused(folders, text):
    formats = [
        Format("nothing", 8, (), "torch", apply=_no_op),
        Format("unfrozen", 8, (), "torch", apply=_unfrozen),
        Format("failing", 8, (), "torch", apply=_raises),
        Format("poisoned", 8, (), "torch", apply=_poisoned),
    ]
    result = _measure(folders["softpick"], text, formats)
    nothing, unfrozen, failing, poisoned = result["formats"]
    assert (nothing["status"], unfrozen["status"], failing["status"]) == ("refused",) * 3
    assert "nothing was quantized" in nothing["reason"] and "nothing was quantized" in unfrozen["reason"]
    assert failing["reason"] == "RuntimeError: no kernel for this device"
    assert "loss" not in nothing and poisoned["status"] == "measured" and math.isnan(poisoned["loss"])
    table = format_table(result)
    assert "nothing: refused" in table and "| poisoned | 8 | 8." in table and "nan" in table


def test_layers_that_do_not_fit_a_group_are_named(text, tmp_path):
    folder = train_model(tmp_path, text, "softpick", steps=1, hidden_size=48, intermediate_size=80)
    nothing = Format("nothing", 8, (), "torch", apply=_no_op)
    for entry in _measure(folder, text, [FORMATS["torchao-int4"], nothing])["formats"]:
        assert entry["status"] == "refused"
        assert "14 layers have sizes that are no multiples of 64" in entry["reason"]
        assert "layers.0.self_attn.q_proj 48 x 48" in entry["reason"]


def test_layers_left_in_float_are_counted(folders):
    from optimum.quanto import freeze, qint4, quantize

    model = load_model(folders["softpick"]).model
    assert quantized_storage(model).weights == 0
    assert len(quantized_storage(model).in_float) == 14
    quantize(model, weights=qint4, include="*mlp*")
    freeze(model)
    storage = quantized_storage(model)
    assert storage.weights == 2 * 3 * 64 * 128
    assert sorted({name.split(".")[-1] for name in storage.in_float}) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    # 4 bits, and a float32 scale and shift for each output of a layer whose rows make one group.
    rows = 2 * (128 + 128 + 64)
    assert storage.bytes == storage.weights // 2 + rows * 8 + 2 * 3 * 8  # two scales of activations in each layer


def test_integers_beside_a_float_weight_are_not_a_quantized_weight():
    layer = torch.nn.Linear(64, 64)
    layer.register_buffer("codes", torch.zeros(64, 64, dtype=torch.int8))
    assert quantized_storage(torch.nn.Sequential(layer)) == (0, 0, ["0"])
    del layer.weight
    assert quantized_storage(torch.nn.Sequential(layer)) == (64 * 64, 64 * 64, [])


def test_a_missing_library_is_named_and_the_others_are_measured(folders, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setitem(sys.modules, "optimum.gptq", None)
    calls = []
    samples_of = _samples_of(text)

    def counted(loaded, calibration):
        calls.append(calibration)
        return samples_of(loaded, calibration)

    result = measure_quantization(
        partial(load_model, folders["softpick"]), counted, parse_formats(["torchao-int8,gptq-int4", "quanto-int8"])
    )
    torchao, gptq, quanto = result["formats"]
    assert (torchao["status"], torchao["reason"]) == ("missing", "torchao is not installed")
    assert (gptq["status"], gptq["reason"]) == ("missing", "gptqmodel is not installed")
    assert quanto["status"] == "measured" and calls == [False]


def test_the_reason_is_the_librarys_own(folders, text, monkeypatch):
    """transformers says only that there were issues; what torchao raised stands in its log."""
    import torchao.quantization as torchao
    from transformers import TorchAoConfig

    config = torchao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="plain_int32")
    (entry,) = _measure(
        folders["softpick"], text, [Format("x", 4, (), "torchao", config=lambda request: TorchAoConfig(config))]
    )["formats"]
    assert entry["status"] == "refused" and "NotImplementedError" in entry["reason"], entry["reason"]


def test_a_quantized_model_is_refused(folders, text, tmp_path):
    load = partial(load_model, folders["softpick"])

    def quantized(**arguments):
        loaded = load(**arguments)
        loaded.model.config.quantization_config = {"quant_method": "x"}
        return loaded

    with pytest.raises(CheckpointError, match="quantized already"):
        measure_quantization(quantized, _samples_of(text), [])


def test_names_of_formats():
    assert parse_formats(["all"]) == list(FORMATS.values())
    assert [item.name for item in parse_formats(["quanto-int4,bnb-nf4", "quanto-int4"])] == ["quanto-int4", "bnb-nf4"]
    with pytest.raises(RecipeError, match="unknown format int4.*quanto-int4"):
        parse_formats(["int4"])
    assert quantization_formats.missing(FORMATS["quanto-int4"]) is None
    assert (
        quantization_formats.missing(Format("x", 4, ("nothing_of.this",), "x")) == "nothing_of.this is not installed"
    )


def _entry(name, bits, increase):
    loss = 1.0 + increase
    entry = {"format": name, "status": "measured", "bits": round(bits), "bits_per_weight": bits, "in_float": []}
    return entry | {
        "loss": loss,
        "loss_increase": increase,
        "perplexity": math.exp(loss),
        "quantized_share": 0.753,
        "seconds": 2.04,
    }


def _result(*entries):
    baseline = {"dtype": "float32", "bits": 32, "loss": 1.0, "perplexity": math.e, "seconds": 1.0}
    return {"baseline": baseline, "data": {"tokens": 8106, "description": "of b.txt"}, "formats": list(entries)}


def test_the_plot_shows_stored_bits_and_the_increase(tmp_path):
    """One colour a model, one marker a format, and what is not finite in the title."""
    from matplotlib.figure import Figure

    first, second = _entry("quanto-int4", 4.61, 0.02), _entry("torchao-int4", 8.4, -1e-5)
    broken, absent = _entry("bnb-int8", 8.1, math.nan), {"format": "x", "status": "missing", "reason": "none"}
    results = {"a": _result(first, broken, second, absent), "b": _result(first)}
    figure = Figure()
    draw_quantization(results, figure)
    (axes,) = figure.axes
    points = {line.get_label(): line for line in axes.lines if " " in line.get_label()}
    assert list(points) == ["a quanto-int4", "a torchao-int4", "b quanto-int4"]
    places = [(*line.get_xdata(), *line.get_ydata()) for line in points.values()]
    assert places == [(4.61, 0.02), (8.4, -1e-5), (4.61, 0.02)]
    a4, a8, b4 = points.values()
    assert a4.get_color() == a8.get_color() != b4.get_color()
    assert a4.get_marker() == b4.get_marker() != a8.get_marker()
    assert all(axes.get_ylim()[0] < y < axes.get_ylim()[1] for _, y in places)
    assert axes.get_yscale() == "symlog" and [*axes.lines[0].get_ydata()] == [0, 0]
    assert axes.get_title().splitlines() == [
        "a: 8,106 tokens measured, of b.txt",
        "b: 8,106 tokens measured, of b.txt",
        "not finite: a bnb-int8: nan",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "quanto-int4", "torchao-int4"]
    plot_quantization(results, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_lines():
    small, large = _entry("torchao-int8", 8.13, -6e-6), _entry("quanto-int2", 2.61, 0.25)
    table = format_table(_result(small, large))
    assert "| torchao-int8 | 8 | 8.13 | 75 % | 1.0000 | 0.0000 | 2.72 |" in table
    assert "| quanto-int2 | 3 | 2.61 | 75 % | 1.2500 | +0.2500 | 3.49 |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert format_last(_result()) == "as saved (float32): loss 1.0000, 1.0 s"
    assert format_last(_result(small, large)) == "quanto-int2: loss 1.2500 (+0.2500), 2.0 s"
    missing = {"format": "x", "status": "missing", "reason": "x is not installed", "seconds": 0.0}
    assert format_last(_result(missing)) == "x: missing: x is not installed, 0.0 s"


def test_hqq_shows_no_bars(folders, text, capfd):
    (entry,) = _measure(folders["softpick"], text, parse_formats(["hqq-int4"]))["formats"]
    bars = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if "it/s" in line]
    assert entry["status"] == "measured" and all(line.startswith("Loading weights") for line in bars)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    spec = importlib.util.spec_from_file_location("eval_quantization", EVAL / "quantization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_writes_results_table_and_plots(command, folders, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq", None)
    poisoned = Format("poisoned", 8, (), "torch", apply=_poisoned)
    monkeypatch.setitem(FORMATS, "poisoned", poisoned)
    arguments = ["--data", text, "--seq-len", "64", "--samples", "10", "--device", "cpu", "--out", str(tmp_path)]
    formats = ["--formats", "quanto-int8", "poisoned", "hqq-int4"]
    assert command([*map(str, folders.values()), *arguments, *formats]) == 0
    output, log = capsys.readouterr()
    for name in folders:
        lines = [line.removeprefix(f"{name}: ") for line in log.splitlines() if line.startswith(f"{name}: ")]
        assert [line.partition(":")[0] for line in lines] == [
            "as saved (float32)",
            "quanto-int8",
            "poisoned",
            "hqq-int4",
        ]
        assert all(line.endswith(" s") for line in lines)
    assert output.count("| quanto-int8 | 8 |") == 2 and output.count("hqq-int4: missing: hqq is not installed") == 2
    for name in folders:
        result = json.loads((tmp_path / name / "quantization.json").read_text())
        assert result["schema"] == 1 and result["kind"] == "quantization"
        assert result["model"]["normalizer"] == name and result["versions"]["torch"]
        assert [entry["status"] for entry in result["formats"]] == ["measured", "measured", "missing"]
        assert result["formats"][1]["loss"] == result["formats"][1]["perplexity"] == "nan"
        assert result["data"]["rows"] == 10 and "text.jsonl" in result["data"]["description"]
        assert (tmp_path / name / "quantization.png").is_file()
    assert (tmp_path / "quantization.png").is_file()


def test_without_out_nothing_is_written_beside_the_reports(command, folders, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(text), "--seq-len", "64", "--samples", "4", "--device", "cpu"]
    assert command([*map(str, folders.values()), *arguments, "--formats", "quanto-int8"]) == 0
    assert not (tmp_path / "report" / "quantization.png").exists() and "all models" not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("quantization.png"))) == 2


def test_the_command_evaluates_tasks_in_every_format(command, folders, text, tmp_path, capsys):
    arguments = ["--data", text, "--seq-len", "64", "--samples", "4", "--device", "cpu", "--out", str(tmp_path)]
    tasks = ["--tasks", "offline_cloze", "--limit", "2"]
    assert command([str(folders["softpick"]), *arguments, "--formats", "quanto-int8", *tasks]) == 0
    result = json.loads((tmp_path / "quantization.json").read_text())
    for entry in result["baseline"], *result["formats"]:
        assert entry["tasks"]["offline_cloze"]["samples"] == 2 and entry["tasks"]["offline_cloze"]["metrics"]
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| task"))
    assert "as saved" in header and "quanto-int8" in header


def test_exit_codes_of_the_command(command, folders, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq", None)
    rest = ["--data", text, "--samples", "4", "--seq-len", "64", "--out", str(tmp_path / "out")]
    assert command([str(folders["softpick"]), "--formats", "hqq-int4", *rest]) == 3
    assert "no format could be measured" in capsys.readouterr().err
    assert command([str(folders["softpick"]), "--formats", "int4", *rest]) == 2
    assert "quanto-int4" in capsys.readouterr().err
    assert command([str(tmp_path), "--formats", "quanto-int8", *rest]) == 4


def test_help_and_wrong_names_come_without_torch():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import quantization\n"
        "try: code = quantization.main(sys.argv[2:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for arguments, code in (["--help"], 0), (["model", "--formats", "int5"], 2):
        found = subprocess.run([sys.executable, "-c", script, str(EVAL), *arguments], capture_output=True, text=True)
        assert found.returncode == code, found.stderr


def test_tasks_are_evaluated_in_every_format(folders, text):
    result = _measure(
        folders["softpick"],
        text,
        parse_formats(["quanto-int8"]),
        evaluate=lambda loaded: {"task": {"quantized": quantization.quantized_storage(loaded.model).weights > 0}},
    )
    assert result["baseline"]["tasks"] == {"task": {"quantized": False}}
    assert result["formats"][0]["tasks"] == {"task": {"quantized": True}}
