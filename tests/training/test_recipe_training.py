"""The section `training:`: what would change rows, resume or schedule without a word is refused."""

import pytest

from hf_softpick.errors import RecipeError
from hf_softpick.training.recipe import load_recipe

TEXT = """\
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer: {train_bpe: 300}
data: {seq_len: 64}
training: {max_steps: 5, learning_rate: 3e-4}
run: {name: small}
"""


@pytest.fixture
def path(tmp_path):
    """A minimal recipe file."""
    (tmp_path / "r.yaml").write_text(TEXT)
    return tmp_path / "r.yaml"


@pytest.fixture
def message(path):
    """The message for the recipe with overrides."""

    def load(*overrides):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        return str(caught.value)

    return load


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.save_only_model=true", "must be false: nobody could go on from a checkpoint without optimizer"),
        ("training.ignore_data_skip=true", "must be false: a resumed run would read its first rows again"),
        ("training.restore_callback_states_from_checkpoint=true", "would stop again at once"),
        ("training.dataloader_in_order=false", "must be true: the rows of a step would depend on the speed"),
        ("training.average_tokens_across_devices=false", "must be true: the loss is a mean over the tokens"),
        ("training.optim=lomo", "updates weights during the backward pass"),
        ("training.optim=galore_adamw_layerwise", "with a state that no checkpoint holds"),
        ("training.accelerator_config=x.json", "expected a mapping of keys to values or null"),
        (
            "training.accelerator_config={split_batches: true}",
            "split_batches must be false: per_device_train_batch_size",
        ),
        ("training.accelerator_config={dispatch_batches: true}", "dispatch_batches must be false"),
        ("training.accelerator_config={even_batches: false}", "even_batches must be true"),
        ("training.accelerator_config={use_seedable_sampler: false}", "must be true: a resumed run would draw other"),
        ("training.accelerator_config={num_steps: 2}", "num_steps is unknown"),
        (
            "training.accelerator_config={gradient_accumulation_kwargs: {num_steps: 4}}",
            "may hold sync_each_batch alone, not num_steps",
        ),
        ("training.lr_scheduler_type=greedy", "follows the validation loss; set eval.every"),
    ],
)
def test_what_is_refused(message, override, expected):
    assert expected in message(override)


def test_what_changes_no_row_may_be_configured(path):
    given = "{split_batches: false, non_blocking: true, gradient_accumulation_kwargs: {sync_each_batch: true}}"
    recipe = load_recipe(path, [f"training.accelerator_config={given}", "training.save_only_model=false"])
    assert recipe.training.arguments["accelerator_config"]["non_blocking"] is True


@pytest.mark.parametrize(
    ("kind", "keywords", "expected"),
    [
        ("warmup_stable_decay", "{num_decay_steps: 0.4}", "num_decay_steps is 0.4, expected an integer"),
        ("warmup_stable_decay", "{num_decay_steps: 0}", "num_decay_steps is 0, expected a number > 0"),
        ("warmup_stable_decay", "{num_decay_steps: 5}", "the decay would end after training.max_steps = 5"),
        ("warmup_stable_decay", "{num_decay_steps: 3}", None),
        ("warmup_stable_decay", "{num_decay_steps: 3, num_stable_steps: 1}", "with 2 warm-up and 1 stable steps"),
        ("warmup_stable_decay", "{num_decay_steps: 1, decay_type: linar}", "expected one of linear, cosine, 1-sqrt"),
        ("warmup_stable_decay", "{num_decay_steps: 1, min_lr_ratio: 2}", "higher than what it is the lower end of, 1"),
        ("cosine_with_restarts", "{num_cycles: 0.5}", "num_cycles is 0.5, expected an integer"),
        ("cosine", "{num_cycles: -1}", "expected a number > 0"),
        ("polynomial", "{lr_end: 1, power: 2}", "lr_end is 1, higher than"),
        ("polynomial", "{power: two}", "expected a number"),
        ("polynomial", "{lr_end: 0, power: 2}", None),
        ("inverse_sqrt", "{timescale: null}", None),
        ("cosine_with_min_lr", "{min_lr: 1}", "higher than what it is the lower end of, 0.0003"),
        ("constant", "{}", "training.warmup_steps has no meaning for lr_scheduler_type constant"),
        ("constant_with_warmup", "{}", None),
        ("linear", "{min_lr: 0}", "min_lr is unknown to lr_scheduler_type linear; allowed: nothing"),
    ],
)
def test_schedules_mean_what_they_say(message, path, kind, keywords, expected):
    """transformers takes 0.4 decay steps and never decays."""
    overrides = [f"training.lr_scheduler_type={kind}", f"training.lr_scheduler_kwargs={keywords}"]
    if expected is not None:
        assert expected in message(*overrides, "training.warmup_steps=2")
        return
    load_recipe(path, [*overrides, "training.warmup_steps=2"])


@pytest.mark.parametrize(
    ("kind", "keywords", "expected"),
    [
        ("greedy", "{factor: 1}", "factor is 1, expected a number < 1"),
        ("greedy", "{patience: 2, smooth: true}", None),
        ("reduce_lr_on_plateau", "{patience: 0.5}", "patience is 0.5, expected an integer"),
        ("reduce_lr_on_plateau", "{facto: 0.5}", "did you mean factor?"),
        ("reduce_lr_on_plateau", "{mode: min, min_lr: 1e-5}", None),
    ],
)
def test_schedules_that_follow_the_loss(message, path, kind, keywords, expected):
    """Their keywords are those of a class, of transformers or of torch."""
    overrides = [f"training.lr_scheduler_type={kind}", f"training.lr_scheduler_kwargs={keywords}", "eval.every=2"]
    assert load_recipe(path, overrides) if expected is None else expected in message(*overrides)
