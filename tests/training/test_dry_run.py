"""What --dry-run says must be true: parameters exactly, memory within a fifth of what autograd really keeps."""

import json
import os
import shutil

import pytest
import torch

from hf_softpick.training.dry_run import describe, vocabulary_size, warnings
from hf_softpick.training.estimates import count_parameters, count_saved_parameters, estimate_disk, estimate_memory
from hf_softpick.training.recipe import load_recipe

TEXT = """\
model:
  normalizer: softpick
  hidden_size: 128
  intermediate_size: 352
  num_hidden_layers: 3
  num_attention_heads: 4
tokenizer: {train_bpe: 512}
data: {seq_len: 256}
training:
  max_steps: 100
  learning_rate: 3e-4
  warmup_steps: 10
  save_steps: 50
  per_device_train_batch_size: 4
eval: {every: 50}
run: {name: small}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with overrides, read in an empty folder on a machine with one process."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "r.yaml").write_text(TEXT)
    return lambda *overrides: load_recipe("r.yaml", overrides)


def _build(recipe, vocabulary):
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig
    from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM

    config = SoftpickConfig(**recipe.model.config_fields(), vocab_size=vocabulary)
    return SoftpickForCausalLM._from_config(config, attn_implementation=recipe.model.attn_implementation)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_word_embeddings=true"],
        ["model.num_key_value_heads=1", "model.head_dim=64"],
        ["model.attention_bias=true", "model.mlp_bias=true"],
        ["model.normalizer=scaled_softpick"],
        ["model.normalizer=softmax", "model.vocab_size=777"],
    ],
    ids=" ".join,
)
def test_parameters_are_exact(recipe, overrides):
    recipe = recipe(*overrides)
    vocabulary, _ = vocabulary_size(recipe.model, recipe.tokenizer)
    with torch.device("meta"):
        model = _build(recipe, vocabulary)
    assert count_parameters(recipe.model, vocabulary) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.attn_implementation=eager"],
        ["model.attn_implementation=eager", "model.normalizer=softmax"],
        ["training.bf16=true"],
        ["model.num_key_value_heads=1"],
    ],
    ids=" ".join,
)
def test_kept_activations_are_estimated(recipe, overrides):
    """Against the storages that autograd saves in one forward pass of the layers."""
    recipe = recipe(*overrides)
    model = _build(recipe, 512).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    half = bool(recipe.training.arguments.get("bf16"))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.model(input_ids=torch.randint(0, 512, (4, 256)), use_cache=False)
    measured = sum(size for size, _ in kept.values())
    if half:
        # Casts of the weights, which the estimate counts as weights.
        measured -= sum(2 * p.numel() for p in model.model.layers.parameters())
    memory = estimate_memory(recipe, count_parameters(recipe.model, 512), 512, 1)
    assert measured * 0.8 < memory.activations < measured * 1.2


def test_memory_counts_what_it_says(recipe):
    parameters = count_parameters(recipe().model, 512)
    plain = estimate_memory(recipe(), parameters, 512, 1)
    assert plain.weights == plain.gradients == 4 * parameters
    assert plain.optimizer == 8 * parameters
    assert plain.logits == 4 * 256 * 512 * 12
    assert plain.total == plain.weights + plain.gradients + plain.optimizer + plain.activations + plain.logits
    light = estimate_memory(recipe("training.activation_checkpointing=true"), parameters, 512, 1)
    assert light.activations < plain.activations / 2
    unknown = estimate_memory(recipe("training.optim=adafactor"), parameters, 512, 1)
    assert unknown.optimizer is None
    assert "optimizer's state not counted" in describe(recipe("training.optim=adafactor"))


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ([], 2),  # 100 steps, every 50
        (["training.save_steps=10"], 3),  # two are kept while the third is written
        (["training.save_steps=10", "training.save_total_limit=1"], 3),  # never fewer than two are kept
        (["training.save_steps=10", "training.save_total_limit=5"], 6),
        (["training.save_steps=30", "training.save_total_limit=null"], 4),  # and one at the last step
        (["training.save_steps=0.4"], 3),
        (["training.save_strategy=no"], 0),
    ],
)
def test_disk_holds_what_is_kept_what_is_written_and_final(recipe, overrides, checkpoints):
    disk = estimate_disk(recipe(*overrides), 1000)
    assert (disk.checkpoints, disk.checkpoint, disk.final) == (checkpoints, 12_000, 4_000)
    assert disk.total == checkpoints * 12_000 + 4_000 and disk.missing == 0


def test_a_disk_that_will_be_full(recipe, tmp_path):
    """What the run holds already needs no more room."""
    free = shutil.disk_usage(tmp_path).free
    each = free // 28 + 2**20  # 2 checkpoints of 12 bytes a parameter and final/ of 4
    lacks = estimate_disk(recipe(), each).missing
    assert 0 < lacks
    assert any("run.root lacks" in text for text in warnings(recipe(), None, None, estimate_disk(recipe(), each)))
    run = recipe().run.directory
    run.mkdir(parents=True)
    with (run / "held").open("wb") as file:
        file.truncate(2 * int(lacks) + 2**30)
    assert estimate_disk(recipe(), each).missing == 0


def test_zero3_divides_the_states(recipe, tmp_path, monkeypatch):
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    sharded = estimate_memory(recipe("training.deepspeed=zero3.json"), 1000, 512, 8)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (500, 500, 1000)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero3.json")
    assert estimate_memory(recipe(), 1000, 512, 8).optimizer == 1000
    (tmp_path / "zero3.json").write_text("[]")
    assert estimate_memory(recipe(), 1000, 512, 8).optimizer == 8000


def test_the_summary(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = describe(recipe("training.gradient_accumulation_steps=2"))
    assert "max_position_embeddings: 256" in text
    assert "tokens per step   8,192 = 4 rows x 2 accumulated x 4 processes x 256 tokens" in text
    assert "tokens in total   819,200 in 100 steps" in text
    assert f"{count_parameters(recipe().model, 512):,}" in text
    assert "512 (tokenizer.train_bpe)" in text
    assert "disk              about" in text and "2 x" in text
    assert "Nothing looks wrong." in text


def test_epochs_leave_the_steps_open(recipe, tmp_path):
    (tmp_path / "e.yaml").write_text(TEXT.replace("max_steps: 100", "num_train_epochs: 2"))
    assert "2 times the prepared data" in describe(load_recipe(tmp_path / "e.yaml"))


def test_a_vocabulary_that_is_not_known_offline(recipe, tmp_path):
    text = describe(recipe("tokenizer={from: some/tokenizer}"))
    assert "unknown until some/tokenizer is loaded; model.vocab_size would say it" in text
    assert "parameters        unknown" in text
    known = recipe("tokenizer={from: some/tokenizer}", "model.vocab_size=600")
    assert f"{count_parameters(known.model, 600):,}" in describe(known)


def test_a_local_tokenizer_is_read(recipe, tmp_path):
    (tmp_path / "tok").mkdir()
    saved = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1}, {"id": 2}]}
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(saved))
    local = recipe("tokenizer={from: tok}")
    assert vocabulary_size(local.model, local.tokenizer)[0] == 3


def test_a_local_model_is_counted(recipe, tmp_path):
    continued = recipe("model={from: saved, normalizer: softpick}")
    assert "unknown until the model is loaded" in describe(continued)
    model = _build(recipe("model.tie_word_embeddings=true"), 512)
    model.save_pretrained(tmp_path / "saved")
    expected = sum(p.numel() for p in model.parameters())
    assert count_saved_parameters(tmp_path / "saved") == expected
    assert f"{expected:,}" in describe(continued)
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"\xff" * 64)
    assert count_saved_parameters(tmp_path / "saved") is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.warmup_steps=100", "never ends"),
        ("training.warmup_steps=0", "begins at the full learning rate"),
        ("eval.every=101", "validation runs only at the end"),
        ("eval.every=0", "validation runs only at the end"),
        ("eval.generate_every=101", "only at the end"),
        ("eval.statistics=101", "only at both ends"),
        ("eval.prompts=[]", "no sample"),
        ("data.validation=0", "no validation loss"),
        ("data.isolate_documents=false", "see each other"),
        ("training.save_steps=101", "loses everything"),
        ("training.save_strategy=no", "loses everything"),
        ("training.logging_steps=101", "no loss is logged"),
        ("training.learning_rate=1", "far above"),
        ("training.per_device_train_batch_size=1", "noisy"),
        ("training.per_device_train_batch_size=1024", "micro-batch"),
        ("training.deepspeed=missing.json", "there is no file missing.json"),
        ("training.dataloader_num_workers=10000", "cores"),
        ("data.sources=[{path: some/dataset}]", "no revision is given for some/dataset"),
        ("model.vocab_size=4096", "more than twice"),
        ("model.hidden_size=1048576", "this machine has"),
    ],
)
def test_what_looks_wrong(recipe, override, expected):
    assert expected not in describe(recipe())
    assert expected in describe(recipe(override)).split("What looks wrong:")[1]


def test_paths_that_are_too_long(recipe):
    """They are not there, as far as a dry run is concerned."""
    assert "no revision is given for" in describe(recipe("data.sources=[{path: " + "x" * 300 + "}]"))


@pytest.mark.skipif(torch.cuda.is_available() or os.cpu_count() == 1, reason="several cores and no GPU")
def test_one_thread_on_several_cores(recipe, monkeypatch):
    """What `accelerate launch` gives a single process on a CPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "launch with OMP_NUM_THREADS=" in describe(recipe())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launch with OMP_NUM_THREADS=" not in describe(recipe())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is wrong without a GPU")
@pytest.mark.parametrize(
    "overrides",
    [
        ["training.bf16=true"],
        ["training.fp16=true"],
        ["model.attn_implementation=flash_attention_2", "model.normalizer=softmax"],
        ["model.attn_implementation=triton"],
        ["model.attn_implementation=triton_fast"],
    ],
)
def test_what_looks_wrong_without_a_gpu(recipe, overrides):
    assert any("GPU" in warning for warning in warnings(recipe(*overrides), None, None))
