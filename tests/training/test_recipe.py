"""Recipes that are right: what they resolve to, overrides, and the way to a file and back."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_softpick.errors import RecipeError, StorageError
from hf_softpick.training.recipe import dump_recipe, load_recipe

TEXT = """\
model: {normalizer: softpick, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer: {train_bpe: 300}
data: {seq_len: 64}
training: {max_steps: 5, learning_rate: 3e-4}
run: {name: small}
"""


@pytest.fixture
def small(tmp_path):
    """A minimal recipe file."""
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def test_values_are_typed(small):
    """3e-4 is a string to a YAML 1.1 reader."""
    recipe = load_recipe(small)
    assert recipe.training.arguments["learning_rate"] == 3e-4
    assert recipe.training.arguments["max_steps"] == 5
    assert recipe.run.directory == Path("runs/small")
    assert recipe.data.sources[0].path == "stdlib"


def test_integers_are_accepted_for_numbers(small):
    recipe = load_recipe(small, ["training.weight_decay=0", "training.learning_rate=1"])
    assert recipe.training.arguments["weight_decay"] == 0.0


def test_yaml_12_scalars(small):
    """`no` is the name of a save strategy, not false; 0o17 is octal; 1.0e-3 and 1E3 are numbers."""
    recipe = load_recipe(small, ["training.save_strategy=no", "training.seed=0o17", "training.adam_epsilon=1E-9"])
    assert recipe.training.arguments["save_strategy"] == "no"
    assert recipe.training.arguments["seed"] == 15
    assert recipe.training.arguments["adam_epsilon"] == 1e-9


def test_a_yaml_11_directive_does_not_bring_its_booleans(small):
    small.write_text("%YAML 1.1\n---\n" + TEXT + "eval: {prompts: [yes, no]}\n")
    assert load_recipe(small).eval.prompts == ["yes", "no"]


def test_our_defaults_are_among_the_arguments(small):
    """Upstream logs a NaN loss as 0.0, logs every 500 steps and keeps every checkpoint."""
    arguments = load_recipe(small).training.arguments
    assert arguments["logging_nan_inf_filter"] is False
    assert arguments["logging_steps"] == 10
    assert arguments["save_total_limit"] == 2
    assert "weight_decay" not in arguments


def test_positions_default_to_the_rows(small):
    assert load_recipe(small).model.max_position_embeddings == 64
    assert load_recipe(small, ["data.seq_len=16"]).model.max_position_embeddings == 16
    assert load_recipe(small, ["model.max_position_embeddings=128"]).model.max_position_embeddings == 128
    continued = load_recipe(small, ["model={from: some/model, normalizer: softpick}"])
    assert continued.model.max_position_embeddings is None


def test_config_fields_are_what_the_recipe_decides(small):
    recipe = load_recipe(small, ["model.rope_parameters={rope_theta: 500000}", "model.vocab_size=512"])
    assert recipe.model.config_fields() == {
        "normalizer": "softpick",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    continued = load_recipe(small, ["model={from: some/model, normalizer: softmax}"])
    assert continued.model.config_fields() == {"normalizer": "softmax"}


def test_every_config_field_is_one_of_the_configuration():
    """A field that the configuration does not know would be stored and ignored."""
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig
    from hf_softpick.training.recipe_model import ModelSettings

    known = set(SoftpickConfig().to_dict()) | set(SoftpickConfig.__dataclass_fields__)
    ours = set(ModelSettings.model_fields) - {"from_", "revision", "attn_implementation"}
    assert ours - known == set()
    assert ModelSettings.model_fields["normalizer"].default == SoftpickConfig().normalizer


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("training.max_steps=7", "training", "max_steps", 7),
        ("model.normalizer=softmax", "model", "normalizer", "softmax"),
        ("data.sources=[{path: a.txt}, {path: b.txt, weight: 2}]", "data", "sources", None),
        ("data.sources.0.text_column=body", "data", "sources", None),
        ("eval.prompts=['a=b', c]", "eval", "prompts", ["a=b", "c"]),
        ("data.num_proc=", "data", "num_proc", None),
        ("run.root=/some where/else", "run", "root", "/some where/else"),
        ("training.lr_scheduler_kwargs={}", "training", "lr_scheduler_kwargs", {}),
    ],
)
def test_overrides(small, override, section, name, value):
    small.write_text(TEXT.replace("seq_len: 64", "seq_len: 64, sources: [{path: old.txt}]"))
    recipe = load_recipe(small, [override])
    found = getattr(getattr(recipe, section), name)
    if name == "sources":
        assert [(source.path, source.text_column) for source in found] in (
            [("a.txt", "text"), ("b.txt", "text")],
            [("old.txt", "body")],
        )
    else:
        assert found == value


def test_null_takes_away_what_the_file_says(small):
    """Where null is a value of its own, it stays one."""
    overrides = ["training.max_steps=null", "training.num_train_epochs=1", "training.save_total_limit=null"]
    recipe = load_recipe(small, [*overrides, "eval.every=3", "eval.every="])
    assert "max_steps" not in recipe.training.arguments and recipe.training.arguments["num_train_epochs"] == 1
    assert recipe.training.arguments["save_total_limit"] is None
    assert recipe.eval.every == 0


def test_the_home_folder(small, monkeypatch):
    """`~/x` used to make a folder called `~`."""
    monkeypatch.setenv("HOME", "/people/me")
    recipe = load_recipe(small, ["run.root=~/x", "training.deepspeed=~/zero3.json"])
    assert recipe.run.directory == Path("/people/me/x/small")
    assert recipe.training.arguments["deepspeed"] == "/people/me/zero3.json"


def test_nothing_is_measured_on_the_way_unless_asked(small):
    evaluation = load_recipe(small).eval
    assert (evaluation.every, evaluation.generate_every, evaluation.statistics) == (0, 0, 0)


def test_overrides_make_sections_and_apply_in_order(small):
    recipe = load_recipe(small, ["eval.every=3", "eval.every=4", "model.rope_parameters.rope_theta=5e5"])
    assert recipe.eval.every == 4
    assert recipe.model.rope_parameters.rope_theta == 5e5


def test_a_dumped_recipe_reads_back_equal(small, tmp_path):
    recipe = load_recipe(
        small,
        [
            "training.deepspeed=a.json",
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs={min_lr_rate: 0.1}",
            "training.save_total_limit=null",
            "training.max_consecutive_skips=3",
            "model.rope_parameters={rope_type: linear, factor: 2}",
        ],
    )
    dump_recipe(recipe, tmp_path / "again.yaml")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.training.arguments == recipe.training.arguments
    assert again.model.config_fields() == recipe.model.config_fields()
    assert again.resolved() == recipe.resolved()


@settings(max_examples=60, deadline=None)
@example(prompt="\x85", epsilon=1.0)
@example(prompt="a\u2028b\r", epsilon=1.0)
@given(prompt=st.text(max_size=30), epsilon=st.floats(1e-30, 1.0))
def test_any_text_and_number_survives_the_file(tmp_path_factory, prompt, epsilon):
    """Text that looks like a number, a boolean or YAML syntax must come back as text."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "a.yaml").write_text(TEXT)
    recipe = load_recipe(folder / "a.yaml")
    evaluation = recipe.eval.model_copy(update={"prompts": [prompt, "1e5", "no", "0x1f", "~", "12:30", "1_0"]})
    training = recipe.training.model_copy(update={"adam_epsilon": epsilon})
    training.model_fields_set.add("adam_epsilon")
    changed = recipe.model_copy(update={"eval": evaluation, "training": training})
    dump_recipe(changed, folder / "b.yaml")
    again = load_recipe(folder / "b.yaml")
    assert again.eval.prompts == evaluation.prompts
    assert again.training.arguments["adam_epsilon"] == epsilon


def test_a_recipe_that_cannot_be_written(small, tmp_path):
    with pytest.raises(StorageError, match=r"a\.yaml cannot be written"):
        dump_recipe(load_recipe(small), small / "a.yaml")


def test_settings_cannot_be_changed(small):
    with pytest.raises(Exception, match="frozen"):
        load_recipe(small).data.seq_len = 8


def test_older_transformers_names(small, monkeypatch):
    """5.17 calls it gradient_checkpointing; a recipe has one name for both."""
    from hf_softpick.training import recipe_arguments

    recipe = load_recipe(small, ["training.activation_checkpointing=true"])
    installed = recipe_arguments.installed_name("activation_checkpointing")
    assert recipe.training.arguments[installed] is True
    monkeypatch.setitem(recipe_arguments._INSTALLED_NAMES, "activation_checkpointing", "gradient_checkpointing")
    assert recipe.training.arguments["gradient_checkpointing"] is True
    assert recipe.training.written["activation_checkpointing"] is True
    with pytest.raises(RecipeError, match="it is called training.activation_checkpointing"):
        load_recipe(small, ["training.gradient_checkpointing=true"])


def test_arguments_are_accepted_by_transformers(small, tmp_path):
    """Names and types are read from source text; the class itself has the last word."""
    from transformers import TrainingArguments

    recipe = load_recipe(
        small,
        [
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs={min_lr_rate: 0.1}",
            "training.warmup_steps=2",
            "training.optim=adamw_torch",
            "training.report_to=[tensorboard]",
            "training.save_strategy=no",
            "training.log_level=warning",
        ],
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **recipe.training.arguments)
    assert arguments.max_steps == 5
    assert arguments.get_warmup_steps(5) == 2
