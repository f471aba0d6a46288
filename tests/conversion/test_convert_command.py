"""The command, the tokenizer, the Hub's path, and everything that is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_cases import ancestor, llama, write

from hf_softpick import convert as command
from hf_softpick.conversion.converting import convert
from hf_softpick.errors import CheckpointError, RecipeError, StorageError


def refused(tmp_path, message, config, tensors, error=CheckpointError, **options):
    """The conversion fails with `message` and leaves nothing behind."""
    source = write(tmp_path / "source", config, tensors)
    with pytest.raises(error, match=message):
        convert(str(source), tmp_path / "target", **options)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_command(tmp_path, capsys):
    source = write(tmp_path / "source", *ancestor(attn_impl="parallel_scaled_softpick_attn"))
    assert command.main([str(source), str(tmp_path / "a" / "target"), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "transformer, safetensors, scaled_softpick" in told and "23 converted, 2 checked and not stored" in told
    assert not list((tmp_path / "a").glob(".*"))
    assert {"config.json", "model.safetensors", "generation_config.json", "conversion.json"} <= set(
        os.listdir(tmp_path / "a" / "target")
    )
    assert command.main([str(source), str(tmp_path / "a" / "target")]) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nothing"), str(tmp_path / "b")]) == 4
    assert "neither a folder nor a Hub id" in capsys.readouterr().err


def test_help_is_quick_and_says_what_was_tested():
    code = "import sys; from hf_softpick import convert\ntry: convert.main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Tested on local copies" in done.stdout and "--subfolder step-100000" in done.stdout


def test_the_result_runs_without_this_package(tmp_path):
    from tiny_softpick import without_package

    convert(str(write(tmp_path / "source", *ancestor())), tmp_path / "target")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; "
        "m = M.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "print(type(m).__name__, m.config.normalizer, tuple(m(torch.ones(1, 5, dtype=torch.long)).logits.shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        env=without_package(tmp_path),
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "SoftpickForCausalLM softpick (1, 5, 64)", done.stderr[-2000:]


def tokenizer(folder, size=64):
    """A real tokenizer of `size` single-character tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(ord(" ") + i): i for i in range(size)}
    built = Tokenizer(models.WordLevel(words, unk_token=" "))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=built, bos_token="!", eos_token='"').save_pretrained(folder)
    return folder


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    source = tokenizer(write(tmp_path / "source", *llama()))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 99}))
    report = convert(str(source), tmp_path / "target")
    assert report["warnings"] == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "target")("A!").input_ids == [33, 1]
    assert GenerationConfig.from_pretrained(tmp_path / "target").eos_token_id == [2, 7]
    assert {"tokenizer.json", "generation_config.json"} <= {file["name"] for file in report["source"]["files"]}


def test_tokenizer_from_elsewhere(tmp_path):
    source = str(write(tmp_path / "source", *ancestor()))
    tokenizer(tmp_path / "words")
    assert convert(source, tmp_path / "target", tokenizer=str(tmp_path / "words"))["warnings"] == []
    tokenizer(tmp_path / "more", 80)
    with pytest.raises(CheckpointError, match="token id 79, but the model's vocab_size is 64"):
        convert(source, tmp_path / "other", tokenizer=str(tmp_path / "more"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        convert(source, tmp_path / "other", tokenizer=str(tmp_path / "empty"))
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer in .*words cannot be loaded"):
        convert(source, tmp_path / "other", tokenizer=str(tmp_path / "words"))
    with pytest.raises(StorageError, match="cannot be read: .*Choose another folder"):
        convert(source, tmp_path / ("x" * 300))
    assert not (tmp_path / "other").exists()


def test_hub_ids(tmp_path, monkeypatch):
    """The call that goes to the Hub, answered by a local folder laid out as the Hub's cache lays it out."""
    import huggingface_hub

    commit = tmp_path / "snapshots" / "abc123"
    write(commit / "step-100", *ancestor())
    calls = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    report = convert("owner/name", tmp_path / "target", revision="main", subfolder="step-100")
    assert report["source"]["revision"] == "abc123"
    assert calls[0][:2] == ("owner/name", "main")
    assert "step-100/config.json" in calls[0][2] and "step-100/model.safetensors" in calls[0][2]
    assert not any(pattern.startswith("*") or pattern.endswith((".py", ".bin", ".pt")) for pattern in calls[0][2])


def test_the_hub_cannot_be_reached(tmp_path):
    with pytest.raises(
        CheckpointError, match="no-such-owner/no-such-name is no folder, and cannot be had from the Hub"
    ):
        convert("no-such-owner/no-such-name", tmp_path / "target")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be converted"),
        ({"model_type": "transformer_with_pruning"}, "'transformer_with_pruning' cannot be converted"),
        ({"model_type": "softpick"}, "is one of ours already"),
        ({"model_type": "qwen2"}, "have biases and its output projection has none"),
        ({"architectures": ["TransformerModel"]}, "Only causal language models"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized"),
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"qkv_bias": True}, "biases in the query, key and value"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"elementwise_affine": False}, "norms without weights"),
        ({"hidden_act": "gelu"}, "another activation than swish"),
        ({"attn_impl": "parallel_relu_softpick_1_attn"}, "'parallel_relu_softpick_1_attn' is unknown"),
        ({"window_size": 8}, "trained without a window and would be run with one"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"hidden_ratio": float("nan")}, "hidden_ratio is nan"),
        ({"attn_impl": ["flash_attn"]}, r"attn_impl \['flash_attn'\] is unknown"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], expected one of"),
        ({"model_type": {}}, r"model_type is \{\}"),
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"logit_softcap": 30.0, "use_cache": False}, r"not understood: logit_softcap=30.0\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_expressed(tmp_path, changes, message):
    _, tensors = ancestor()
    config, _ = ancestor()
    refused(tmp_path, message, {**config, **changes}, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8}, "not understood: sliding_window=8"),
        ({"partial_rotary_factor": 0.5}, r"not understood: partial_rotary_factor=0\.5"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotary embedding of a part of a head",
        ),
        ({"rope_interleaved": True}, "not understood: rope_interleaved=True"),
        ({"use_sliding_window": True}, "not understood: use_sliding_window=True"),
        ({"residual_multiplier": 0.22}, r"not understood: residual_multiplier=0\.22"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type 'spiral' is unknown"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic', whose frequencies depend"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_size": "32"}, "is no configuration of llama"),
        ({"hidden_act": "no_such_act"}, "make no softpick configuration"),
        ({"rope_parameters": 3}, "is no configuration of llama"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number above 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta in rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta in rope_parameters is -5.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "has full_attention: parameters for some"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
            "factor in rope_parameters is nan, expected finite",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_llama_settings_that_cannot_be_expressed(tmp_path, changes, message):
    config, tensors = llama()
    refused(tmp_path, message, {**config, **changes}, tensors)


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


def _nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def _wrong_lengths(tensors):
    tensors["model.layers.1.attn.logn"] = torch.arange(1, 65).float().log()[:, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model.layers.1.attn.k_proj.weight"), r"1 parameters have no tensor .*layers\.1\.self_attn\.k_proj"),
        (_drop("lm_head.weight"), "says that head and embeddings are not tied"),
        (_drop("model.layers.0.attn.s"), r"head_scale"),
        (_put("model.layers.0.attn.q_norm.weight", torch.ones(8)), r"not understood: model\.layers\.0\.attn\.q_norm"),
        (_put("model.layers.2.attn.s", torch.ones(4, 1)), r"not understood: model\.layers\.2\.attn\.s"),
        (
            _put("model.layers.0.mlp.up_proj.weight", torch.ones(88, 32)),
            r"shape \[88, 32\].* means \[256, 32\].*its rule",
        ),
        (_put("model.norm.weight", torch.ones(32).bfloat16()), r"several types \(torch.bfloat16, torch.float32\)"),
        (_put("model.norm.weight", torch.ones(32, dtype=torch.int8)), "has the type I8"),
        (_nan, r"1 tensors hold NaN or infinite values: model\.layers\.1\.mlp\.up_proj"),
        (_wrong_lengths, r"model\.layers\.1\.attn\.logn does not hold log\(position \+ 2\)"),
    ],
    ids=[
        "missing",
        "head",
        "scale",
        "unknown",
        "layer",
        "intermediate",
        "dtypes",
        "integer",
        "nan",
        "logn",
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    config, tensors = ancestor(attn_impl="parallel_scaled_softpick_attn")
    change(tensors)
    refused(tmp_path, message, config, tensors)


def test_a_tied_head_must_be_the_embeddings(tmp_path):
    config, tensors = ancestor(tie_word_embeddings=True)
    refused(tmp_path, "lm_head.weight differs", config, {**tensors, "lm_head.weight": torch.zeros(64, 32)})


def test_frequencies_of_old_llamas(tmp_path):
    config, tensors = llama()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    good = 100.0 ** (-torch.arange(0, 8, 2).float() / 8)
    report = convert(str(write(tmp_path / "good", config, {**tensors, name: good})), tmp_path / "target")
    assert [entry["source"] for entry in report["checked_and_not_stored"]] == [name]
    with pytest.raises(CheckpointError, match="frequencies of rope_theta 100.0"):
        convert(str(write(tmp_path / "bad", config, {**tensors, name: good / 2})), tmp_path / "other")


def test_values_beyond_float16(tmp_path):
    config, tensors = ancestor()
    tensors["model.norm.weight"][0] = 1e6
    refused(tmp_path, "do not fit into torch.float16", config, tensors, dtype="float16")


def test_damaged_shards(tmp_path):
    source = write(tmp_path / "source", *llama(), shards=2)
    shard = source / "model-00001-of-00002.safetensors"
    whole = load_file(shard)
    save_file({name: tensor for name, tensor in list(whole.items())[1:]}, shard)
    with pytest.raises(CheckpointError, match="promises 1 tensors that no shard holds"):
        convert(str(source), tmp_path / "target")
    save_file({**whole, "extra": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match="holds extra, which belongs elsewhere"):
        convert(str(source), tmp_path / "target")
    shard.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(str(source), tmp_path / "target")
    shard.unlink()
    with pytest.raises(CheckpointError, match="is missing. Copy the whole"):
        convert(str(source), tmp_path / "target")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/x.safetensors"}}))
    with pytest.raises(CheckpointError, match="to files of its folder"):
        convert(str(source), tmp_path / "target")


def test_folders_without_a_checkpoint(tmp_path):
    (tmp_path / "runs" / "step-5").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="It has folders: step-5; give one by --subfolder"):
        convert(str(tmp_path / "runs"), tmp_path / "target")
    (tmp_path / "runs" / "step-5" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="save the model as safetensors first"):
        convert(str(tmp_path / "runs"), tmp_path / "target", subfolder="step-5")
    with pytest.raises(RecipeError, match="has no --revision"):
        convert(str(tmp_path / "runs"), tmp_path / "target", revision="main")
    source = write(tmp_path / "source", *llama())
    with pytest.raises(RecipeError, match="Leave --config out"):
        convert(str(source), tmp_path / "target", config=source / "config.json")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from hf_softpick import SoftpickForCausalLM

    def full(self, folder, **kwargs):
        Path(folder, "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SoftpickForCausalLM, "save_pretrained", full)
    refused(tmp_path, "could not be written: .*No space left", *ancestor(), error=StorageError)


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    """A saving function that loses a bit is found out."""
    from hf_softpick import SoftpickForCausalLM

    save = SoftpickForCausalLM.save_pretrained

    def lossy(self, folder, **kwargs):
        save(self, folder, **kwargs)
        tensors = load_file(Path(folder, "model.safetensors"))
        tensors["model.norm.weight"][7] *= 1 + 2**-23
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})

    monkeypatch.setattr(SoftpickForCausalLM, "save_pretrained", lossy)
    refused(tmp_path, "is not the one that was meant: model.norm.weight", *ancestor())


@pytest.mark.parametrize(
    ("given", "warning", "kept"),
    [
        ({"do_sample": False, "temperature": 0.5, "top_p": 0.9}, "temperature, top_p left out", True),
        ({"length_penalty": 2.0}, "length_penalty left out", True),
        ({"max_new_tokens": -1}, "generation_config.json was left out: transformers refuses it", False),
        ({"num_return_sequences": "x"}, "generation_config.json was left out", False),
        ({"do_sample": True, "temperature": 0.5}, None, True),
    ],
    ids=["sampling", "beams", "wrong", "type", "good"],
)
def test_generation_settings_that_transformers_refuses(tmp_path, given, warning, kept):
    from transformers import GenerationConfig

    source = tokenizer(write(tmp_path / "source", *llama()))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], **given}))
    report = convert(str(source), tmp_path / "target")
    assert len(report["warnings"]) == (warning is not None)
    assert warning is None or warning in report["warnings"][0]
    saved = GenerationConfig.from_pretrained(tmp_path / "target")
    assert (saved.eos_token_id == [2, 7]) == kept
    assert saved.temperature == (0.5 if warning is None else None)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (ancestor, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, .* tensors of 2 layers"),
        (llama, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (llama, {"vocab_size": 10**15}, "vocab_size is 1000000000000000, but the longest side of a tensor"),
        (llama, {"intermediate_size": 10**15}, "intermediate_size is"),
        (ancestor, {"hidden_ratio": 10**12}, "intermediate_size is"),
        (llama, {"head_dim": 10**12}, "head_dim is"),
    ],
)
def test_huge_sizes_build_no_model(tmp_path, monkeypatch, make, changes, message):
    from hf_softpick.conversion import converting

    monkeypatch.setattr(converting, "_empty_model", lambda settings: pytest.fail("a model was built"))
    config, tensors = make()
    refused(tmp_path, message, {**config, **changes}, tensors)


@pytest.mark.parametrize("depth", [40, 400, 100_000])
def test_deeply_nested_json(tmp_path, depth):
    source = write(tmp_path / "source", *llama())
    (source / "config.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: its values are nested"):
        convert(str(source), tmp_path / "target")


def test_a_link_is_refused_before_the_work(tmp_path, monkeypatch):
    from hf_softpick.conversion import converting

    monkeypatch.setattr(converting, "open_source", lambda *_, **__: pytest.fail("the source was opened"))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing"):
        link = tmp_path / f"to_{name}"
        link.symlink_to(tmp_path / name)
        with pytest.raises(RecipeError, match="is a link"):
            convert("source", link)


def test_two_conversions_to_one_place(tmp_path, monkeypatch):
    """A whole conversion happens while another one writes: the first to end stays, the other says so."""
    from hf_softpick.conversion import converting

    source = write(tmp_path / "source", *llama())
    write_model, inside = converting._write_model, []

    def twice(*arguments):
        write_model(*arguments)
        if not inside:
            inside.append(1)
            convert(str(source), tmp_path / "target")

    monkeypatch.setattr(converting, "_write_model", twice)
    with pytest.raises(StorageError, match="could not be written: .*not empty"):
        convert(str(source), tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]
    assert {"config.json", "model.safetensors", "conversion.json"} <= set(os.listdir(tmp_path / "target"))
    assert (tmp_path / "target").stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_sigterm_leaves_nothing(tmp_path, monkeypatch, capsys):
    import signal

    from hf_softpick.conversion import converting

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(converting, "_check", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    source = write(tmp_path / "source", *llama())
    assert command.main([str(source), str(tmp_path / "target"), "--quiet"]) == 130
    assert "nothing half-written is kept" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"] and signal.getsignal(signal.SIGTERM) == before
