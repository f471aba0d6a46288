"""What may change between two launches of a run and what may not, and that records of older versions mean the same."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from training_runs import REPOSITORY, losses, records, write_recipe

from hf_softpick.errors import CheckpointError, RecipeError
from hf_softpick.train import main
from hf_softpick.training import checkpointing, recipe_evolution, resume, resume_rules
from hf_softpick.training.recipe import load_recipe
from hf_softpick.training.recipe_record import SCHEMA, Settings, differences, read_settings, settings
from hf_softpick.training.recipe_training import FIXED

# `identity` and `length` as version 0.1.0 left them in manifest.json and finished.json, but for the path of the text.
IDENTITY_OF_SCHEMA_1 = """{
 "model": {"normalizer": "softpick", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 2, "max_position_embeddings": 64},
 "tokenizer": {"from": null, "revision": null, "train_bpe": 300, "add_bos": true, "add_eos": true},
 "data": {"seq_len": 64, "sources": [{"path": "%s", "name": null, "split": "train", "revision": null,
  "data_files": null, "text_column": "text", "weight": 1.0, "max_documents": null}], "packing": "best_fit",
  "isolate_documents": true, "validation": 0.1, "seed": 42},
 "training": {"seed": null, "data_seed": null, "optim": null}
}"""
LENGTH_OF_SCHEMA_1 = {"max_steps": 6, "num_train_epochs": None}
# Constant, so that a shorter and a longer run agree as far as they go.
STEPS = ["training.max_steps=6", "training.save_steps=3", "training.lr_scheduler_type=constant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one recipe; its prepared data is shared by all runs of this file."""
    path = tmp_path_factory.mktemp("resume")
    write_recipe(path)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of a run of 6 steps with checkpoints of 3 and 6, never stopped."""
    assert main([str(folder / "recipe.yaml"), "run.name=whole", *STEPS]) == 0
    return folder / "runs" / "whole"


@pytest.fixture
def halfway(whole, folder, tmp_path):
    """A copy of it as it was after step 3, and the command on it: (run folder, call(*overrides) -> exit code)."""
    run = shutil.copytree(whole, tmp_path / "whole")
    (run / "finished.json").unlink()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    return run, _command(folder, tmp_path)


def _command(folder, root):
    return lambda *more: main([str(folder / "recipe.yaml"), "run.name=whole", *STEPS, f"run.root={root}", *more])


def _weights(run):
    return (run / "final" / "model.safetensors").read_bytes()


def _rewrite(path, **changes):
    """A record with these keys; None removes one."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


def _as_schema_1(run, folder):
    old = {
        "format": 1,
        "digest": None,
        "recipe": None,
        "changes": None,
        "identity": json.loads(IDENTITY_OF_SCHEMA_1 % (folder / "text.jsonl")),
    }
    for manifest in run.glob("checkpoints/*/manifest.json"):
        _rewrite(manifest, **old)
    if (run / "finished.json").exists():
        _rewrite(run / "finished.json", **old | {"format": None}, final=None, length=LENGTH_OF_SCHEMA_1)


def test_a_run_of_an_older_version_resumes_bit_equal(halfway, whole, folder):
    """Every new field of a recipe used to refuse it."""
    run, call = halfway
    _as_schema_1(run, folder)
    assert call() == 0
    assert _weights(run) == _weights(whole)
    assert [record["step"] for record in records(run) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_changes_are_seen_in_records_of_an_older_version(halfway, folder, capsys):
    """What its records leave out stands in the recipe.yaml beside them."""
    run, call = halfway
    _as_schema_1(run, folder)
    assert call("data.isolate_documents=false") == 2
    assert "data.isolate_documents: True -> False" in capsys.readouterr().err
    assert call("training.weight_decay=0.5") == 0
    assert "training.weight_decay: 0.0 -> 0.5" in capsys.readouterr().out


def test_a_finished_run_of_an_older_version_stays_finished(whole, folder, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "whole")
    _as_schema_1(run, folder)
    call = _command(folder, tmp_path)
    assert call() == 0 and "already finished at step 6" in capsys.readouterr().out
    assert call("model.hidden_size=64") == 2
    assert "model.hidden_size: 32 -> 64" in capsys.readouterr().err
    assert call("training.max_steps=7") == 0 and "from step 6" in capsys.readouterr().out


DEFAULTS = {"a.kept": 1, "b.list.0.x": 2}


def _given(**given):
    return Settings(given, {name: value for name, value in DEFAULTS.items() if name not in given})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (Settings({}, {}), _given(), {}),  # new fields at their default
        (_given(), Settings({}, {}), {}),  # fields that are gone and were at theirs
        (Settings({}, {}), _given(**{"a.kept": 3}), {"a.kept": ("unset", 3)}),
        (_given(**{"a.kept": 3}), Settings({}, {}), {"a.kept": (3, "unset")}),
        (_given(), Settings({}, {"a.kept": 5, "b.list.0.x": 2}), {"a.kept": (1, 5)}),  # another default
        (_given(**{"c.dropped": 7}), _given(), {}),
        (_given(**{"c.dropped": 8}), _given(), {"c.dropped": (8, "unset")}),
    ],
)
def test_settings_are_compared_by_what_they_mean(monkeypatch, old, new, expected):
    monkeypatch.setitem(recipe_evolution.DROPPED, "c.dropped", 7)
    assert differences(old, new) == expected


@pytest.mark.parametrize(
    "written",
    [
        "model.num_key_value_heads=2",
        "model.head_dim=16",
        "model.attention_bias=false",
        "model.rope_parameters={rope_theta: 10000}",
        "training.seed=42",
        "training.lr_scheduler_type=linear",
        "training.save_total_limit=2",
        "eval.every=0",
        "data.sources.0.weight=1",
    ],
)
def test_a_default_that_is_written_out_changes_nothing(folder, written):
    plain, explicit = (load_recipe(folder / "recipe.yaml", overrides) for overrides in ([], [written]))
    assert differences(settings(plain), settings(explicit)) == {}
    other = load_recipe(folder / "recipe.yaml", ["model.rope_parameters={rope_theta: 5000}", "eval.every=2"])
    assert set(differences(settings(plain), settings(other))) == {"model.rope_parameters.rope_theta", "eval.every"}


def test_renamed_fields_are_read_under_their_present_name(folder, tmp_path, monkeypatch):
    """In records, in files and in overrides; a place in a list stays; under both names is an error."""
    monkeypatch.setitem(recipe_evolution.RENAMED, "data.files.*.where", "data.sources.*.path")
    monkeypatch.setitem(recipe_evolution.RENAMED, "training.patience", "training.max_consecutive_skips")
    monkeypatch.setitem(recipe_evolution.DROPPED, "eval.kind", "plain")
    recipe = load_recipe(folder / "recipe.yaml", ["training.patience=4", "eval.kind=plain"])
    assert recipe.training.max_consecutive_skips == 4
    record = settings(recipe).record()
    for names in (record["settings"], record["defaults"]):
        for new, old in (
            ("data.sources.0.path", "data.files.0.where"),
            ("training.max_consecutive_skips", "training.patience"),
        ):
            if new in names:
                names[old] = names.pop(new)
    assert differences(read_settings({"recipe": record}, tmp_path), settings(recipe)) == {}
    text = (folder / "recipe.yaml").read_text().replace('"max_steps"', '"patience": 4, "max_steps"')
    (tmp_path / "old.yaml").write_text(text)
    assert load_recipe(tmp_path / "old.yaml") == recipe
    (tmp_path / "old.yaml").write_text(text.replace('"patience"', '"max_consecutive_skips": 5, "patience"'))
    with pytest.raises(Exception, match="training.patience is called training.max_consecutive_skips, which is given"):
        load_recipe(tmp_path / "old.yaml")


# Changed settings


def _changed(folder, *overrides, before=()):
    """Settings of the recipe before and after, and what a run cannot take: {name: reason}."""
    old, new = (settings(load_recipe(folder / "recipe.yaml", each)) for each in (before, (*before, *overrides)))
    changes = differences(old, new)
    assert changes
    return changes, lambda strategy=None: resume_rules.refused(changes, old, new, strategy)


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_act=relu",
        "model.rope_parameters.rope_theta=5e5",
        "tokenizer.add_eos=false",
        "data.seq_len=32",
        "data.validation=0.2",
        "data.isolate_documents=false",
        "data.seed=7",
        "training.seed=7",
        "training.data_seed=7",
        "training.optim=sgd",
        "training.optim_args='a=1'",
        "training.fp16=true",
    ],
)
def test_what_a_run_cannot_change(folder, override):
    name = override.split("=")[0]
    assert name in _changed(folder, override)[1]()


@pytest.mark.parametrize(
    "override",
    [
        "model.attn_implementation=eager",
        "data.cache_dir=elsewhere",
        "data.num_proc=2",
        "data.sources.0.path=elsewhere.jsonl",
        "training.learning_rate=1",
        "training.max_steps=9",
        "training.warmup_steps=2",
        "training.weight_decay=0.5",
        "training.max_grad_norm=0.5",
        "training.gradient_accumulation_steps=2",
        "training.activation_checkpointing=true",
        "training.dataloader_num_workers=1",
        "training.save_total_limit=null",
        "training.report_to=tensorboard",
        "training.push_to_hub=true",
        "eval.every=2",
        "run.root=elsewhere",
    ],
)
def test_what_a_run_can_change(folder, override):
    changes, refused = _changed(folder, override)
    assert override.split("=")[0] in changes and refused() == {}


def test_what_depends_on_the_rest(folder):
    """The precision of sharded state cannot change; where the state of the schedule is the rate, nor can the rate."""
    _, refused = _changed(folder, "training.bf16=true")
    assert refused("ddp") == {} and "training.bf16" in refused("zero2")
    greedy = ["training.lr_scheduler_type=greedy", "eval.every=1"]
    assert "training.learning_rate" in _changed(folder, "training.learning_rate=1", before=greedy)[1]()
    assert "training.lr_scheduler_type" in _changed(folder, *greedy)[1]()
    assert _changed(folder, "training.weight_decay=0.5", before=greedy)[1]() == {}


def test_every_key_has_a_rule_and_the_docs_show_it(folder):
    """An argument that a newer transformers brings is refused by name until somebody looks at it."""
    record = settings(load_recipe(folder / "recipe.yaml"))
    default = resume_rules.RULES[-1][2]
    unknown = {name for name in (*record.given, *record.defaults) if resume_rules.rule(name)[1] == default}
    assert unknown == {f"training.{name}" for name in FIXED if not name.startswith("dataloader_")}
    assert resume_rules.rule("training.new_in_transformers_9")[0] == resume_rules.REFUSED
    assert resume_rules.rule("future.section")[0] == resume_rules.REFUSED
    table = (REPOSITORY / "docs" / "resume.md").read_text()
    for names, meaning, why in resume_rules.RULES:
        assert f"| `{'`, `'.join(names.split())}` | {meaning} | {why} |" in table


def test_changed_optimizer_settings_take_effect(halfway, whole, capsys):
    """A loaded optimizer used to bring its old settings back, while recipe and model card stated the new ones."""
    run, call = halfway
    new = {"learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_epsilon": 1e-6}
    assert call(*(f"training.{name}={value}" for name, value in new.items())) == 0
    groups = torch.load(run / "checkpoints" / "checkpoint-6" / "optimizer.pt")["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.5, 0.999), 1e-6)
    rates = [record["learning_rate"] for record in records(run) if "loss" in record]
    assert rates == [1e-2] * 3 + [1e-3] * 3
    output = capsys.readouterr().out
    assert "training.adam_beta1: 0.9 -> 0.5; training.adam_epsilon: 1e-08 -> 1e-06;" in output
    assert "Learning rate of the next step: 0.001; the checkpoint left it at 0.01." in output
    expected = {"step": 3, "setting": "training.learning_rate", "before": 0.01, "after": 0.001}
    for record in (run / "finished.json", run / "checkpoints" / "checkpoint-6" / "manifest.json"):
        assert expected in json.loads(record.read_text())["changes"]
    assert "| 3 | training.learning_rate | 0.01 | 0.001 |" in (run / "final" / "README.md").read_text()
    text = (run / "recipe.yaml").read_text()
    assert text.startswith("# changed at") and json.dumps(expected) in text
    assert load_recipe(run / "recipe.yaml").training.arguments["learning_rate"] == 1e-3
    assert "changed when the run" not in (whole / "final" / "README.md").read_text()


def test_a_lower_learning_rate_saves_a_run_that_diverged(halfway, whole, capsys):
    """What exit code 5 advises: it was ignored. The good checkpoint is that of step 3."""
    run, call = halfway
    assert call("training.learning_rate=1e30", "training.max_consecutive_skips=1", "training.save_strategy=no") == 5
    assert "Lower training.learning_rate" in capsys.readouterr().err
    assert call() == 0
    assert _weights(run) == _weights(whole)


def test_a_tied_head_is_not_missed(folder, tmp_path, capsys, caplog):
    command = _command(folder, tmp_path)
    for steps in (1, 2):
        assert command("model.tie_word_embeddings=true", "training.save_steps=1", f"training.max_steps={steps}") == 0
    assert "Resuming" in capsys.readouterr().out
    assert "missing keys" not in caplog.text


def test_changed_intervals_take_effect(halfway):
    """They came back from trainer_state.json."""
    run, call = halfway
    more = ["training.save_steps=1", "training.save_total_limit=null", "training.logging_steps=2", "eval.every=2"]
    assert call(*more) == 0
    assert checkpointing.steps(run / "checkpoints") == [6, 5, 4, 3]
    logged = records(run)
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3, 4, 6]
    assert [record["step"] for record in logged if "eval_loss" in record] == [4, 6]


def test_the_schedule_of_a_longer_run_is_that_of_its_new_length(whole, folder, tmp_path, capsys):
    """The first step after the resume used to be made with the learning rate of the old schedule."""
    run = shutil.copytree(whole, tmp_path / "whole")
    assert _command(folder, tmp_path)("training.max_steps=8", "training.lr_scheduler_type=linear") == 0
    assert [record["learning_rate"] for record in records(run) if record["step"] > 6 and "loss" in record] == [
        pytest.approx(1e-2 * (8 - step) / 8) for step in (6, 7)
    ]
    output = capsys.readouterr().out
    assert "training.max_steps: 6 -> 8" in output and "next step: 0.0025; the checkpoint left it at 0.01" in output


@pytest.mark.parametrize(
    "shorter", [["training.max_steps=4"], ["training.max_steps=null", "training.num_train_epochs=0.1"]]
)
def test_a_run_cannot_be_cut_short_of_where_it_is(whole, folder, tmp_path, capsys, shorter):
    """It would write final/ again, under a recipe that did not train it."""
    run = shutil.copytree(whole, tmp_path / "whole")
    before = _weights(run), (run / "recipe.yaml").read_text()
    assert _command(folder, tmp_path)(*shorter) == 2
    assert "is at step 6 already" in capsys.readouterr().err
    assert (_weights(run), (run / "recipe.yaml").read_text()) == before


def test_a_finished_run_says_what_has_no_effect_on_it(whole, folder, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "whole")
    call = _command(folder, tmp_path)
    assert call("training.weight_decay=0.5") == 0
    assert "without effect on it: training.weight_decay: 0.0 -> 0.5." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    assert call("training.max_steps=8") == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err


def test_sources_may_move_but_not_change(halfway, whole, folder, tmp_path, capsys):
    """Data is known by its content, wherever it lies; the same global batch may be made in another way."""
    run, call = halfway
    text = (folder / "text.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text + json.dumps({"text": "one more"}) + "\n")
    moved = [f"data.sources.0.path={tmp_path / 'moved.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}"]
    batch = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    assert call(*moved, *batch) == 2
    assert "the sources have changed" in capsys.readouterr().err
    (tmp_path / "moved.jsonl").write_text(text)
    assert call(*moved, *batch) == 0
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize(
    ("manifest", "facts", "expected"),
    [
        ({}, {}, None),
        ({}, {"strategy": "ddp", "world_size": 4}, None),
        ({}, {"strategy": "zero3"}, "by 1 processes under one process and cannot be loaded by 1 under zero3"),
        ({"strategy": "zero2", "world_size": 2}, {"strategy": "zero2", "world_size": 2}, None),
        ({"strategy": "zero2", "world_size": 2}, {"strategy": "zero2", "world_size": 4}, "as it was launched before"),
        ({"strategy": "zero2", "world_size": 2}, {"strategy": "zero3", "world_size": 2}, "as it was launched before"),
        ({"global_batch": 16}, {}, "gradient_accumulation_steps=2 restores it"),
        ({"global_batch": 12}, {}, "so that their product times 1 processes is 12"),
        ({"step": 9}, {}, "is at step 9 already"),
        ({"data": "other rows"}, {}, "was trained on other rows"),
        ({"world_size": None}, {}, "manifest.json lacks 'world_size'"),
        ({"recipe": None}, {}, "manifest.json lacks 'identity'"),
        ({"recipe": {"schema": SCHEMA + 1}}, {}, "was written by a newer version"),
    ],
)
def test_checkpoints_of_other_launches(folder, tmp_path, manifest, facts, expected):
    """Replicated checkpoints know no number of processes; sharded ones belong to theirs."""
    recipe = load_recipe(folder / "recipe.yaml", STEPS)
    launch = {"strategy": "one process", "world_size": 1, "global_batch": 8, "per_device_batch": 8, "data": "rows"}
    written = {**launch, "step": 3, "recipe": settings(recipe).record(), **manifest}
    (tmp_path / "x").write_text("x")
    checkpointing.write_manifest(tmp_path, {name: value for name, value in written.items() if value is not None})
    data = SimpleNamespace(matches=lambda recorded: recorded == "rows")
    if expected is None:
        assert resume.check_resume(tmp_path, launch | facts, recipe, data, 6)[1] == {}
        return
    with pytest.raises((RecipeError, CheckpointError), match=re.escape(expected)):
        resume.check_resume(tmp_path, launch | facts, recipe, data, 6)
