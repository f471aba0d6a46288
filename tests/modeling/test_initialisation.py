"""Every way to a fresh model gives the same start: initializer_range for matrices, 1 for norms, 0.3 for head_scale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_softpick import NORMALIZERS, SIZES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_softpick import SoftpickForCausalLM

STD = 0.05
# Wide enough that a deviation is known to 3 %; unlike 0.02, so that a default cannot pass for it.
WIDE = dict(hidden_size=64, intermediate_size=128, vocab_size=256, initializer_range=STD)


def check(deviations: dict[str, tuple[float, float]]) -> None:
    """(mean, deviation) by parameter name."""
    assert len(deviations) > 10
    for name, (mean, deviation) in deviations.items():
        if "norm" in name:
            assert (mean, deviation) == (1.0, 0.0), name
        elif "head_scale" in name:
            assert mean == pytest.approx(0.3, abs=1e-6) and deviation < 1e-6, name
        else:
            assert abs(mean) < 0.1 * STD and deviation == pytest.approx(STD, rel=0.06), name


def statistics(model: nn.Module) -> dict[str, tuple[float, float]]:
    assert not any(p.is_meta for p in model.parameters())
    return {name: (float(p.detach().mean()), float(p.detach().float().std())) for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_from_config(normalizer):
    config = tiny_config(normalizer, **WIDE)
    for build in (AutoModelForCausalLM.from_config, SoftpickForCausalLM._from_config, SoftpickForCausalLM):
        model = build(config)
        check(statistics(model))
        assert any("head_scale" in name for name, _ in model.named_parameters()) == normalizer.startswith("scaled_")


@pytest.mark.parametrize("pad", [0, 1, 2, -1, 255])
def test_a_pad_token_is_drawn_and_learns_like_any_other(pad, tmp_path):
    """pad = bos, eos or unk is common; `padding_idx` would set its vector to 0 for good, -1 that of the last token."""
    models = []
    for pad_token_id in (None, pad):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(tiny_config(**{**WIDE, "pad_token_id": pad_token_id})))
    without, model = models
    for name, parameter in without.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    embedding = model.get_input_embeddings().weight
    ids = torch.tensor([[pad % 256, 5, pad % 256, 6]])
    model(ids, labels=ids).loss.backward()
    assert (embedding.grad[pad] != 0).any() and (embedding[pad] != 0).any()
    with torch.no_grad():
        embedding[pad] = 0  # as an older version trained it; it goes on from there
    model.generation_config.pad_token_id = None  # 5.17 saves no negative one
    model.save_pretrained(tmp_path)
    loaded = SoftpickForCausalLM.from_pretrained(tmp_path)
    assert (loaded.get_input_embeddings().weight[pad] == 0).all()
    loaded(ids, labels=ids).loss.backward()
    assert (loaded.get_input_embeddings().weight.grad[pad] != 0).any()


def test_head_scale_is_float32_in_a_half_model():
    model = AutoModelForCausalLM.from_config(tiny_config("scaled_softpick", **WIDE), dtype=torch.bfloat16)
    check(statistics(model))
    assert model.model.layers[0].self_attn.head_scale.dtype == torch.float32


def test_from_pretrained_without_head_scale(tmp_path):
    """Going on from an unscaled model, or from Llama."""
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **WIDE}))
    llama.save_pretrained(tmp_path)
    model, report = SoftpickForCausalLM.from_pretrained(
        tmp_path, config=tiny_config("scaled_softpick", **WIDE), output_loading_info=True
    )
    check(statistics(model))
    assert set(report["missing_keys"]) == {f"model.layers.{i}.self_attn.head_scale" for i in (0, 1)}
    for name, parameter in llama.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_from_pretrained_with_parts_missing(tmp_path):
    """What is missing is initialised, what is there is loaded, head_scale included."""
    model = SoftpickForCausalLM(tiny_config("scaled_softpick", **WIDE))
    with torch.no_grad():
        model.model.layers[0].self_attn.head_scale.fill_(0.7)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name in ("self_attn.head_scale", "mlp.up_proj.weight", "input_layernorm.weight"):
        del weights[f"model.layers.1.{name}"]
    save_file(weights, path, metadata={"format": "pt"})
    loaded = SoftpickForCausalLM.from_pretrained(tmp_path)
    deviations = statistics(loaded)
    mean, deviation = deviations.pop("model.layers.0.self_attn.head_scale")
    assert mean == pytest.approx(0.7) and deviation == 0
    check(deviations)


def test_from_the_meta_device():
    """What FSDP and large models do: build without memory, then to_empty and init_weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("scaled_softpick", **WIDE))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    check(statistics(model))


def test_parameters_of_another_size_are_counted_on_meta():
    with torch.device("meta"):
        plain, scaled = (SoftpickForCausalLM(tiny_config(n, **WIDE)) for n in ("softpick", "scaled_softpick"))
    assert scaled.num_parameters() - plain.num_parameters() == 2 * 4


ZERO3 = """
import json, sys
import deepspeed, torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
import hf_softpick
from hf_softpick import SoftpickConfig
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
keep = HfDeepSpeedConfig(settings)
torch.manual_seed(dist.get_rank())
config = SoftpickConfig(**json.loads(sys.argv[1]))
models = {"from_config": AutoModelForCausalLM.from_config(config)}
models["from_pretrained"] = AutoModelForCausalLM.from_pretrained(sys.argv[2], config=config)
out = {}
for way, model in models.items():
    out[way] = {}
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "ds_id"), "this is not ZeRO-3"
        with deepspeed.zero.GatheredParameters([parameter]):
            out[way][name] = (float(parameter.float().mean()), float(parameter.float().std()))
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, out)
assert all(rank == out for rank in ranks), "ranks gathered different parameters"
if dist.get_rank() == 0:
    print("RESULT" + json.dumps(out))
dist.destroy_process_group()
"""


def test_under_zero_3(tmp_path):
    """Partitioned as it is built, on two real ranks: init in __init__ is lost there, and only _init_weights counts."""
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **WIDE}))
    llama.save_pretrained(tmp_path / "llama")
    script = tmp_path / "zero3.py"
    script.write_text(ZERO3)
    arguments = json.dumps({**SIZES, **WIDE, "normalizer": "scaled_softpick"}), str(tmp_path / "llama")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=127.0.0.1:0", str(script), *arguments]
    root = str(Path(__file__).parents[2])
    process = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    line = next(line for line in process.stdout.splitlines() if "RESULT" in line)
    out = json.loads(line.partition("RESULT")[2])
    expected = statistics(llama)
    for way, deviations in out.items():
        check({name: tuple(values) for name, values in deviations.items()})
        assert sum("head_scale" in name for name in deviations) == 2, way
    for name, values in out["from_pretrained"].items():
        if "head_scale" not in name:
            assert values == pytest.approx(expected[name], abs=1e-6), name
