"""Recipes that are wrong: each message says where, what was given, what is allowed."""

import re

import pytest

from hf_softpick.errors import RecipeError
from hf_softpick.training.recipe import load_recipe

TEXT = """\
model:
  normalizer: softpick
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 4
tokenizer: {train_bpe: 300}
data: {seq_len: 64}
training:
  max_steps: 5
  learning_rate: 3e-4
run: {name: small}
"""


@pytest.fixture
def message(tmp_path, monkeypatch):
    """The message for TEXT after replacements and with overrides."""
    monkeypatch.chdir(tmp_path)

    def load(*overrides, old="", new="", text=None):
        assert old in TEXT
        (tmp_path / "r.yaml").write_text(text if text is not None else TEXT.replace(old, new, 1))
        with pytest.raises(RecipeError) as caught:
            load_recipe("r.yaml", overrides)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return load


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "learning_rate: 3e-4",
            "learning_rate: fast",
            "r.yaml:11:18: training.learning_rate is 'fast', expected a number > 0 (for example 3e-4)",
        ),
        (
            "learning_rate: 3e-4",
            "lerning_rate: 3e-4",
            "r.yaml:11:3: training.lerning_rate is unknown; did you mean training.learning_rate?",
        ),
        (
            "learning_rate: 3e-4",
            "learning_rate: -3e-4",
            "r.yaml:11:18: training.learning_rate is -0.0003, expected a number > 0 (for example 3e-4)",
        ),
        (
            "learning_rate: 3e-4",
            "learning_rate: '3e-4'",
            "r.yaml:11:18: training.learning_rate is '3e-4', expected a number > 0 (for example 3e-4);"
            " write 3e-4, without quotes and underscores",
        ),
        (
            "learning_rate: 3e-4",
            "learning_rate: .nan",
            "r.yaml:11:18: training.learning_rate is .nan, expected a finite number",
        ),
        (
            "learning_rate: 3e-4",
            "learning_rate: 1e999",
            "r.yaml:11:18: training.learning_rate is 1e999, expected a finite number",
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  max_steps: 6",
            "r.yaml:11:3: training.max_steps is given twice (first at r.yaml:10:3); keep one",
        ),
        (
            "max_steps: 5",
            "max_steps: 1e3",
            "r.yaml:10:14: training.max_steps is 1000.0, expected an integer >= 1; write 1000",
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  bf16: 'false'",
            "r.yaml:11:9: training.bf16 is 'false', expected true or false; write false, without quotes",
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  bf16: no",
            "r.yaml:11:9: training.bf16 is 'no', expected true or false; write false, without quotes",
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  warmup_ratio: 0.1",
            "r.yaml:11:3: training.warmup_ratio is unknown: write training.warmup_steps, where a value below 1 is a"
            " share of all steps",
        ),
        (
            "normalizer: softpick",
            "normalizer: softpik",
            "r.yaml:2:15: model.normalizer is 'softpik', expected one of softpick, softmax, rectified_softmax,"
            " scaled_softpick, scaled_softmax; did you mean softpick?",
        ),
        (
            "normalizer: softpick",
            "seq_len: 4",
            "r.yaml:2:3: model.seq_len is unknown here; it belongs to data.seq_len",
        ),
        (
            "hidden_size: 32",
            "hidden_size: 30",
            "r.yaml:3:16: model.hidden_size is 30, not divisible by model.num_attention_heads = 4",
        ),
        (
            "  hidden_size: 32\n",
            "",
            "r.yaml:2:3: model.hidden_size is missing; a new model needs it"
            " (or give model.from, a model to go on from)",
        ),
        (
            "hidden_size: 32",
            "hidden_size: 12",
            "r.yaml:3:16: model.hidden_size gives heads of 3 dimensions; rotary positions need an even number",
        ),
        (
            "normalizer: softpick",
            "normalizer: softpick\n  attn_implementation: sdpa",
            "r.yaml:3:24: model.attn_implementation is 'sdpa', which computes softmax, but model.normalizer is"
            " 'softpick'; use 'auto', 'triton', 'tiled' or 'eager'",
        ),
        (
            "normalizer: softpick",
            "normalizer: softpick\n  max_position_embeddings: 32",
            "r.yaml:9:17: data.seq_len is 64, longer than model.max_position_embeddings = 32;"
            " raise that, or scale model.rope_parameters",
        ),
        (
            "{train_bpe: 300}",
            "{train_bpe: 300, from: x}",
            "r.yaml:7:12: tokenizer is a mapping: give exactly one of 'from' (a tokenizer to load) and 'train_bpe'"
            " (a vocabulary size)",
        ),
        (
            "max_steps: 5",
            "seed: 5",
            "r.yaml:10:3: training.max_steps is missing; say how long to train by one of"
            " max_steps and num_train_epochs",
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  num_train_epochs: 1",
            "r.yaml:10:14: training.max_steps and num_train_epochs are both given; say how long to train by one of"
            " max_steps and num_train_epochs",
        ),
        ("run: {name: small}", "", "r.yaml:1:1: run is missing, expected a mapping of keys to values"),
        ("{name: small}", "[small]", "r.yaml:12:6: run is ['small'], expected a mapping of keys to values"),
    ],
)
def test_message(message, old, new, expected):
    assert message(old=old, new=new) == expected


def test_overrides_are_named(message):
    assert message("training.max_steps=many") == (
        "override training.max_steps: training.max_steps is 'many', expected an integer >= 1"
    )
    assert "override data.sources: data.sources.1.path is missing, expected text" in message(
        "data.sources=[{path: a}, {weight: 1}]"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps", "expected section.key=value"),
        ("training..x=1", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training.max_steps=[1", "override training.max_steps: not valid YAML"),
        ("data.sources.4.path=x", "data.sources"),
        ("training.max_steps.x=1", "training.max_steps has no item 'x'"),
        ("tokenizer.from=3", "tokenizer.from is 3, expected text"),
        ("modl.hidden_size=4", "modl is unknown; did you mean model?"),
        ("model=3", "model is 3, expected a mapping"),
        ("training.logging_nan_inf_filter=true", "expected false"),
        ("training.learning_rate=1_000", "write 1000, without quotes and underscores"),
        ("training.optim=adamw", "did you mean"),
        ("training.lr_scheduler_kwargs={min_lr_rate: 0.1}", "is unknown to lr_scheduler_type linear"),
        ("training.dataloader_prefetch_factor=2", "needs training.dataloader_num_workers >= 1"),
        ("model.num_key_value_heads=3", "must divide model.num_attention_heads = 4"),
        ("model.rope_parameters={rope_type: yarn, factor: 2}", "original_max_position_embeddings is missing"),
        ("model.rope_parameters={factor: 2}", "has no meaning for rope_type 'default'"),
        ("model.rope_parameters={rope_type: dynamic, factor: 2}", "depend on the longest row of a batch"),
        ("model.rope_parameters={rope_type: longrope}", "depend on the longest row of a batch"),
        ("model.rope_theta=5", "model.rope_parameters"),
        ("model.revision=main", "belongs to model.from"),
        ("model.from=some/model", "brings its own architecture"),
        ("model={from: some/model}", "say which normalizer"),
        ("model.vocab_size=200", "smaller than tokenizer.train_bpe = 300"),
        (
            "model.attention_dropout=0.1",
            "model.attn_implementation 'auto' cannot compute; set it to 0, or use 'eager'",
        ),
        ("model.attn_implementation=flash", "expected one of auto, eager, tiled, triton, triton_fast, sdpa, flash_"),
        ("training.optim_args=x", "training.optim_args is 'x', expected key=value pairs"),
        ("training.optim_args='a=1,b'", "expected key=value pairs"),
        ("training.output_dir=x", "the run folder is run.root/run.name"),
        ("training.eval_steps=5", "eval.every"),
        ("training.resume_from_checkpoint=x", "by itself"),
        ("data.sources=[{path: a, weight: 1e300}]", "expected a number > 0 and <= 1000"),
        ("data.seq_len=16777217", "expected an integer >= 8 and <= 16777216"),
        ("data.packing=wrapped", "expected one of best_fit, one_document"),
        ("training.max_steps=123456789012345678901234567890", "beyond 64-bit integers"),
        ("training.max_steps=" + "9" * 5000, "beyond 64-bit integers"),
        ("training=" + "[" * 1200, "not valid YAML"),
        (f"training.seed={2**63}", "beyond 64-bit integers"),
        (f"training.seed={2**63 - 1}", "expected an integer >= 0 and < 4294967296"),
        ("training.max_steps=", "say how long to train by one of max_steps and num_train_epochs"),
        ("data.seq_len=null", "data.seq_len is missing, expected an integer >= 8"),
        ("run.root=~nobody-of-that-name/x", "home folder of a user who does not exist"),
    ],
)
def test_what_is_refused(message, override, expected):
    assert expected in message(override)


def test_a_name_where_a_list_has_places(message):
    sources = {"old": "{seq_len: 64}", "new": "{seq_len: 64, sources: [{path: stdlib}]}"}
    assert "data.sources.first is not there" in message("data.sources.first.path=x", **sources)
    assert "data.sources has no item 'first'" in message("data.sources.first=x", **sources)


def test_two_precisions(message):
    assert "training.fp16 is true beside training.bf16" in message("training.bf16=true", "training.fp16=true")


def test_full_determinism_is_not_for_the_fast_kernels(message):
    assert "gradients of model.attn_implementation 'triton_fast' differ between runs; use 'triton'" in message(
        "training.full_determinism=true", "model.attn_implementation=triton_fast"
    )


def test_all_problems_are_reported(message):
    found = message(
        "run.name=UPPER", "data.seq_len=4", old="learning_rate: 3e-4", new="lerning_rate: 1\n  bf16: 1\n  seed: -1"
    )
    for part in ("lerning_rate", "bf16", "seed", "run.name", "data.seq_len"):
        assert part in found
    assert len(found.splitlines()) == 5


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/../../b", "a/b", "", "UPPER", ".hidden", "a\\b", "x" * 65, "con\n", "ä", "a b"]
)
def test_run_names_stay_inside_the_root(message, name):
    found = message("run.name=" + '"' + name.replace("\\", "\\\\").replace("\n", "\\n") + '"')
    assert "run.name is" in found and "1 to 64 of a-z" in found


def test_nul_in_paths(message):
    assert "NUL" in message('run.root="a\\0b"')


def test_a_run_folder_that_links_elsewhere(message, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / "small").symlink_to(tmp_path / "outside")
    assert "leads out of run.root" in message("training.seed=1")


@pytest.mark.parametrize("key", ["hub_token", "token", "api_key"])
@pytest.mark.parametrize("section", ["training", "model", "data.sources.0"])
def test_secrets_are_refused_and_not_repeated(message, section, key):
    found = message(f"{section}.{key}=sesame", old="{seq_len: 64}", new="{seq_len: 64, sources: [{path: stdlib}]}")
    assert "log in with `hf auth login`" in found
    assert "sesame" not in found


SECRETS = [
    "hf_" + "a1B2" * 9,
    "https://user:sesame@example.org/data",
    "https://example.org/data?x=1&access_token=sesame",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 9,
    "AKIA" + "A1B2" * 4,
    "sk-proj-" + "a1B2" * 9,
]


@pytest.mark.parametrize("value", SECRETS)
def test_secret_values_are_refused_and_not_repeated(message, value):
    found = message("data.cache_dir=" + value)
    assert "looks like a token or password" in found
    assert value not in found and "sesame" not in found


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize("override", ["{}=1", "training.{}=1", "training.fsdp_config.{}=1", "{}", "run=[{}]"])
def test_secrets_in_names_are_not_repeated(message, override, value):
    found = message(override.format(value))
    assert value not in found and "sesame" not in found and "a1B2a1B2" not in found and "A1B2A1B2" not in found


def test_names_that_only_begin_like_secrets(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    for name in ("hf_internal/tiny", "data/sk-learn-documentation-2024-full", "https://example.org/a.txt?page=3"):
        assert load_recipe(tmp_path / "r.yaml", [f"data.cache_dir={name}"]).data.cache_dir == name


@pytest.mark.parametrize("name", ["\udcff", "training.\udcff"])
def test_names_that_are_not_utf8(message, name):
    assert "the name is not UTF-8 text" in message(f"{name}=1")


def test_half_a_character(message):
    """No file can hold it; JSON writes whole ones beyond 16 bits as two escapes."""
    assert "eval.prompts.0 holds half of a surrogate pair" in message(r'eval.prompts=["\ud800"]')
    assert load_recipe("r.yaml", [r'eval.prompts=["\ud83d\ude00"]']).eval.prompts == ["\U0001f600"]


def test_code_from_the_hub_is_refused(message):
    assert "must not be able to run code" in message("model.trust_remote_code=true")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "is not a mapping"),
        ("just text", "is not a mapping"),
        ("a: 1\n  b: 2\n", "r.yaml:2:"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("model: !!python/object/apply:os.system [true]\n", "has the YAML tag"),
        ("model: !include x.yaml\n", "has the YAML tag"),
        ("model: &a {x: 1}\ndata: *a\n", "anchor or alias"),
        ("&a {x: *a}\n", "anchor or alias"),
        ("model: {<<: {a: 1}}\n", "has a key that is not plain text"),
        ("? [a, b]\n: 1\n", "has a key that is not plain text"),
        ("a: " + "[" * 1200, "not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("\tmodel: 1", "not valid YAML"),
    ],
)
def test_text_that_is_no_recipe(message, text, expected):
    assert expected in message(text=text)


def test_aliases_do_not_expand(message):
    """The billion laughs: nine levels of nine references each."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "anchor or alias" in message(text="\n".join(lines))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "other.yaml").write_text(TEXT)
    with pytest.raises(RecipeError, match=r"no such recipe file; recipes there: .*other\.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("a\0b")
    (tmp_path / "utf16.yaml").write_bytes(TEXT.encode("utf-16"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "utf16.yaml")


def test_a_byte_order_mark_is_no_problem(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(TEXT.encode("utf-8-sig"))
    assert load_recipe(tmp_path / "bom.yaml").run.name == "small"


def test_hints_name_keys_that_exist():
    """A hint that sends people to a key that is itself refused would be worse than none."""
    from hf_softpick.training import recipe_arguments as a

    names = set(a.TrainingSettings.model_fields)
    for hint in (*a.REMOVED.values(), *a.REFUSED.values()):
        for key in re.findall(r"training\.([a-z0-9_]+)", hint):
            assert key in names
    assert not names & (a.REMOVED.keys() | a.REFUSED.keys() | a.SECRETS.keys())
    assert a.DEFAULTS.keys() | a.RANGES.keys() | a.TYPES.keys() <= names
