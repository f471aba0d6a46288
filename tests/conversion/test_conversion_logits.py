"""Converted models compute what their sources compute, by formulas on the source's own tensors in float64."""

import json

import pytest
import torch
from source_cases import ancestor, ancestor_logits, llama, llama_logits, source_weights, write

from hf_softpick import SoftpickForCausalLM, softpick
from hf_softpick.conversion.converting import convert
from hf_softpick.conversion.settings import read_settings

TOKENS = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1))
NORMALIZERS = {
    "attn": "softmax",
    "rectified_attn": "rectified_softmax",
    "softpick_attn": "softpick",
    "scaled_attn": "scaled_softmax",
    "scaled_softpick_attn": "scaled_softpick",
}


def converted(tmp_path, config, tensors, shards=1, **options):
    report = convert(str(write(tmp_path / "source", config, tensors, shards)), tmp_path / "target", **options)
    model, info = SoftpickForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info.values())
    return model.eval(), report


def check(model, expected, atol=1e-4):
    with torch.no_grad():
        logits = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits.double(), expected, atol=atol, rtol=1e-4)
    assert expected.std() > 0.1  # a model that says something


@pytest.mark.parametrize("how", ["parallel", "naive"])
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_every_attention_of_the_ancestor(tmp_path, how, kind):
    config, tensors = ancestor(attn_impl=f"{how}_{kind}")
    model, report = converted(tmp_path, config, tensors)
    check(model, ancestor_logits(config, tensors, TOKENS))
    assert model.config.normalizer == report["target"]["normalizer"] == NORMALIZERS[kind]
    assert report["warnings"] == [
        "The source has no tokenizer. Give one by --tokenizer, or save one beside the result."
    ]
    assert len(report["notes"]) == ("softpick" in kind) + ("scaled" in kind)


def test_the_attentions_differ():
    """Guards the tests above against weights with which every normalizer says the same."""
    logits = []
    for kind in NORMALIZERS:
        config, tensors = ancestor(attn_impl=f"parallel_{kind}")
        logits.append(ancestor_logits(config, tensors, TOKENS))
    for i, a in enumerate(logits):
        assert all((a - b).abs().max() > 0.05 for b in logits[:i])


@pytest.mark.parametrize(("eps", "bound"), [(1e-6, lambda s: 1e-6), (1e-8, lambda s: 1e-8 + 1e-6 / s)])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-2, 1.0, 10.0])
def test_the_difference_of_the_epsilons_is_bounded_as_told(eps, bound, size):
    scores = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
    theirs = source_weights(scores, torch.ones(200, 16, dtype=torch.bool), "softpick", eps)
    ours = softpick(scores)
    share = (theirs - ours).abs().sum(-1) / ours.sum(-1)  # the same for every weight of a row, but for rounding
    limit = bound(scores.expm1().abs().sum(-1))
    assert (share <= limit * (1 + 1e-6) + 1e-9).all()
    assert share.max() > 0


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 768, "num_heads": 12}, 2048),
        ({"hidden_size": 1024, "num_heads": 16, "hidden_ratio": None}, 2816),
        ({"hidden_size": 2048, "num_heads": 32, "num_kv_heads": None, "intermediate_size": None}, 5632),
        ({"hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}, 14336),
        ({"hidden_size": 768, "num_heads": 12, "hidden_ratio": 2}, 1024),
    ],
)
def test_widths_of_the_published_sizes(changes, width):
    config = {**ancestor()[0], **changes, "elementwise_affine": True, "fuse_swiglu": True, "pad_token_id": 2}
    del config["vocab_size"], config["norm_eps"], config["rope_theta"]
    found = read_settings(config).config
    assert found["intermediate_size"] == width
    assert (found["vocab_size"], found["rms_norm_eps"], found["pad_token_id"]) == (32000, 1e-6, 2)
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert found["num_key_value_heads"] == (changes.get("num_kv_heads") or changes["num_heads"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2, "attn_impl": "parallel_softpick_attn"},
        {"num_kv_heads": 1, "attn_impl": "parallel_attn"},
        {"tie_word_embeddings": True, "fuse_norm": False},
        {"intermediate_size": 40, "hidden_ratio": 3},
        {"norm_eps": 0.1, "rope_theta": 5000.0},
        {"attn_impl": "flash_attn", "window_size": 5},
    ],
    ids=["gqa", "mqa", "tied", "intermediate", "eps_and_theta", "window"],
)
def test_settings_of_the_ancestor(tmp_path, changes):
    config, tensors = ancestor(**changes)
    model, _ = converted(tmp_path, config, tensors, shards=3)
    check(model, ancestor_logits(config, tensors, TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_is_kept(tmp_path, dtype):
    config, tensors = ancestor(attn_impl="parallel_scaled_softpick_attn")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model, report = converted(tmp_path, {**config, "torch_dtype": "float32"}, tensors)
    assert report["target"]["dtype"] == str(dtype).removeprefix("torch.")
    assert report["warnings"][:1] == [f"config.json of the source says float32; the result is saved in {dtype}."]
    assert {str(p.dtype) for n, p in model.named_parameters() if "head_scale" not in n} == {str(dtype)}
    assert model.model.layers[0].self_attn.head_scale.dtype == torch.float32
    check(model.float(), ancestor_logits(config, tensors, TOKENS))


def test_dtype_is_changed_on_request(tmp_path):
    config, tensors = ancestor()
    model, report = converted(tmp_path, config, tensors, dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    check(model.float(), ancestor_logits(config, rounded, TOKENS))
    assert report["warnings"][0] == "Weights in torch.float32 were rounded to torch.bfloat16."


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 16},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    ],
    ids=["plain", "tied", "bias", "head_dim", "mistral_window"],
)
def test_llama_family(tmp_path, changes):
    config, tensors = llama(**changes)
    if "model_type" in changes:
        config.pop("pretraining_tp")
    model, report = converted(tmp_path, config, tensors, shards=2)
    assert model.config.normalizer == "softmax"
    check(model, llama_logits(config, tensors, TOKENS))


# What the config.json of published folders holds beside Llama's own fields.
PUBLISHED = {
    "SmolLM2-135M-Instruct": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_llama_config": True,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
    },
    "Llama-2-7b-hf": {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pad_token_id": 0, "pretraining_tp": 1},
    "from a GGUF file": {"_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2", "_name_or_path": "x"},
    "fine-tuned": {"unk_token_id": 0, "model_max_length": 64, "neftune_noise_alpha": 5, "unsloth_version": "2025.1.1"},
    "exported": {"use_sliding_window": False, "max_window_layers": 28, "partial_rotary_factor": 1.0, "head_dim": 8},
}


@pytest.mark.parametrize("extra", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_keys_of_published_folders(tmp_path, extra):
    config, tensors = llama(**extra)
    model, report = converted(tmp_path, config, tensors)
    used = {entry["source"] for entry in report["settings"]}
    assert set(extra) <= used | set(report["settings_without_effect"])
    check(model, llama_logits(config, tensors, TOKENS))


def test_llama_with_another_normalizer(tmp_path):
    config, tensors = llama()
    model, report = converted(tmp_path, config, tensors, normalizer="softpick")
    check(model, llama_logits(config, tensors, TOKENS, kind="softpick"))
    assert report["warnings"][0].startswith("The weights were trained with softmax. With softpick the model computes")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_embedding(tmp_path, scaling):
    """Against transformers' own Llama, whose formulas these are."""
    from transformers import LlamaForCausalLM

    config, tensors = llama(rope_scaling=scaling, rope_theta=10000.0)
    model, _ = converted(tmp_path, config, tensors)
    peer = LlamaForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = peer(TOKENS[None]).logits[0].double()
    check(model, expected)
    plain = llama_logits({**config, "rope_scaling": None}, tensors, TOKENS)
    assert (plain - expected).abs().max() > 0.01


def test_a_llama_that_another_trainer_saved_under_softpick(tmp_path):
    """Its config.json is sealed; what it was trained with is what it becomes."""
    from transformers import LlamaForCausalLM

    write(tmp_path / "plain", *llama())
    peer = LlamaForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="softpick")
    peer.save_pretrained(tmp_path / "source")
    report = convert(str(tmp_path / "source"), tmp_path / "target")
    assert (
        len(report["warnings"]) == 1 and report["source"]["normalizer"] == report["target"]["normalizer"] == "softpick"
    )
    check(SoftpickForCausalLM.from_pretrained(tmp_path / "target"), peer(TOKENS[None]).logits[0].detach().double())


@pytest.mark.parametrize(
    ("start", "end"), [("attn", "scaled_softpick"), ("scaled_softpick_attn", "softpick")], ids=["to", "from"]
)
def test_scale_of_heads_appears_and_goes_with_a_warning(tmp_path, start, end):
    config, tensors = ancestor(attn_impl=f"parallel_{start}")
    model, report = converted(tmp_path, config, tensors, normalizer=end)
    assert "trained further" in report["warnings"][0]
    if end == "scaled_softpick":
        assert torch.equal(model.model.layers[1].self_attn.head_scale, torch.full((4,), 0.3))
        assert [entry["value"] for entry in report["created"]] == [0.3, 0.3]
    else:
        assert [entry["source"] for entry in report["dropped"]] == [f"model.layers.{i}.attn.s" for i in range(2)]
        assert sum("was dropped" in warning for warning in report["warnings"]) == 2


def test_the_report_accounts_for_everything(tmp_path):
    config, tensors = ancestor(attn_impl="naive_scaled_softpick_attn", tie_word_embeddings=True)
    _, report = converted(tmp_path, config, {**tensors, "lm_head.weight": tensors["model.embeddings.weight"].clone()})
    assert json.loads((tmp_path / "target" / "conversion.json").read_text()) == json.loads(json.dumps(report))
    told = {e["source"] for part in ("tensors", "checked_and_not_stored", "dropped") for e in report[part]}
    assert told == {*tensors, "lm_head.weight"}
    assert {e["source"] for e in report["settings"]} | set(report["settings_without_effect"]) >= set(config)
    scale = next(e for e in report["tensors"] if e["source"] == "model.layers.0.attn.s")
    assert scale["shape"] == [4, 1] and scale["target_shape"] == [4]
    import hashlib

    for file in report["source"]["files"]:
        content = (tmp_path / "source" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {file["name"] for file in report["source"]["files"]} == {"config.json", "model.safetensors"}
