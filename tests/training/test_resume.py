"""What may change between two launches of a run and what may not, and that records of older versions mean the same."""

import json
import shutil

import pytest
from training_runs import records, write_recipe

from hf_softpick.train import main
from hf_softpick.training import recipe_evolution
from hf_softpick.training.recipe import load_recipe
from hf_softpick.training.recipe_record import Settings, differences, read_settings, settings

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
    old = {"recipe": None, "changes": None, "identity": json.loads(IDENTITY_OF_SCHEMA_1 % (folder / "text.jsonl"))}
    for manifest in run.glob("checkpoints/*/manifest.json"):
        _rewrite(manifest, **old)
    if (run / "finished.json").exists():
        _rewrite(run / "finished.json", **old, final=None, length=LENGTH_OF_SCHEMA_1)


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
