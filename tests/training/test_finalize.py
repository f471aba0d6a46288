"""The end of a run: final/ is whole, is made again when it is not, and its upload is not forgotten."""

import importlib
import json
import os
import resource
import shutil
import signal

import fake_hub
import pytest
from training_runs import environment, losses, records, train, write_recipe

from hf_softpick.train import main
from hf_softpick.training.model_card import without_paths
from hf_softpick.versions import hub_commit

PUSH = ["training.push_to_hub=true", "training.hub_model_id=me/tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(write_recipe(folder))]) == 0
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the run, and the command that made it: (run folder, call(*overrides) -> exit code)."""
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny")
    return run, lambda *overrides: main([str(finished / "recipe.yaml"), f"run.root={tmp_path}", *overrides])


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine; huggingface_hub talks to it."""
    yield from fake_hub.serve(monkeypatch)


def _commits(hub):
    return [path for path, _ in hub.requests if "/commit/" in path]


def test_a_failed_upload_is_made_up_for(again, hub, capsys):
    """Also one that was not asked for when the run finished; once it is there, nothing is sent again."""
    run, call = again
    hub.refuse = 403
    assert call(*PUSH) == 69
    assert "uploads" not in json.loads((run / "finished.json").read_text())
    hub.refuse = 0
    assert call(*PUSH) == 0
    assert "Uploaded: " in capsys.readouterr().out and len(_commits(hub)) == 1
    assert call(*PUSH) == 0
    assert "nothing to do" in capsys.readouterr().out and len(_commits(hub)) == 1
    assert call(*PUSH, "training.hub_revision=v1") == 0
    assert len(_commits(hub)) == 2


def test_the_upload_of_the_run_itself_is_recorded(finished, tmp_path, hub, capsys):
    """As part of the command that trains."""
    arguments = [str(finished / "recipe.yaml"), f"run.root={tmp_path}", "training.max_steps=1", *PUSH]
    for commits in (1, 1):
        assert main(arguments) == 0
        assert len(_commits(hub)) == commits
    assert "nothing to do" in capsys.readouterr().out


def test_all_of_final_is_uploaded(again, hub):
    """The list of what may go is written by hand; a model without one of its code files loads nowhere."""
    run, call = again
    assert call(*PUSH) == 0
    lines = [json.loads(line) for path, body in hub.requests if "/commit/" in path for line in body.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {path.name for path in (run / "final").iterdir()}


DAMAGE = {
    "gone": lambda final: shutil.rmtree(final),
    "no weights": lambda final: (final / "model.safetensors").unlink(),
    "bit flipped": lambda final: (final / "model.safetensors").write_bytes(
        (final / "model.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "no code": lambda final: (final / "modeling_softpick.py").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_final_is_written_again_without_a_step(again, finished, damage, capsys):
    """The checkpoint of the last step holds the same weights."""
    run, call = again
    whole, trained = (run / "final" / "model.safetensors").read_bytes(), losses(run)
    DAMAGE[damage](run / "final")
    (run / ".final-staging").mkdir()
    (run / ".final-staging" / "optimizer.pt").write_text("of a crash")
    assert call() == 0
    assert not (run / "final" / "optimizer.pt").exists()
    assert "is damaged" in capsys.readouterr().out
    assert (run / "final" / "model.safetensors").read_bytes() == whole
    assert losses(run) == trained and max(record["step"] for record in records(run)) == 5
    assert call() == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_damaged_final_without_its_checkpoint_is_exit_code_4(again, capsys):
    """Neither "nothing to do" nor training on from an older state without a word."""
    run, call = again
    (run / "final" / "model.safetensors").unlink()
    (run / "checkpoints" / "checkpoint-5" / "optimizer.pt").write_bytes(b"torn")
    for _ in range(2):  # found torn; already set aside
        assert call() == 4
        message = capsys.readouterr().err
        assert "model.safetensors is missing" in message and "of step 4" in message and "finished.json" in message
    shutil.rmtree(run / "checkpoints")
    assert call() == 4
    assert "there is none at all" in capsys.readouterr().err


def test_what_people_edit_in_final_is_theirs(again, capsys):
    """A model card is there to be edited."""
    run, call = again
    (run / "final" / "README.md").write_text("# Mine\n")
    assert call() == 0
    assert "nothing to do" in capsys.readouterr().out and (run / "final" / "README.md").read_text() == "# Mine\n"


def test_a_run_that_an_older_version_finished(again, capsys):
    """Its record says nothing of files: weights and configuration have to be there."""
    run, call = again
    record = json.loads((run / "finished.json").read_text())
    del record["final"]
    (run / "finished.json").write_text(json.dumps(record))
    assert call() == 0
    assert "nothing to do" in capsys.readouterr().out
    (run / "final" / "model.safetensors").unlink()
    assert call() == 0
    assert "model.safetensors is missing" in capsys.readouterr().out


@pytest.fixture(scope="module")
def llama(finished):
    """A folder of a tied Llama with generation settings that load and cannot be saved, as Llama-2 checkpoints have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = finished / "llama"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, tie_word_embeddings=True, pad_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 99, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("trial", ["with weights", "without"])
def test_generation_settings_that_cannot_be_saved(llama, finished, tmp_path, trial, caplog, monkeypatch):
    """The first checkpoint would raise, and all that was trained be lost."""
    if trial == "without":
        monkeypatch.setattr("hf_softpick.training.finalize._TRIAL_BYTES", 0)
    recipe = write_recipe(tmp_path, model={"from": str(llama), "normalizer": "softpick"})
    assert main([str(recipe), "training.max_steps=1"]) == 0
    assert "temperature, top_p left out" in caplog.text
    saved = json.loads((tmp_path / "runs" / "tiny" / "final" / "generation_config.json").read_text())
    assert saved["max_length"] == 99 and saved["use_cache"] is True
    assert not {"temperature", "top_p"} & saved.keys()
    assert not list((tmp_path / "runs" / "tiny").glob(".*staging"))


def test_a_model_that_cannot_be_saved_is_found_before_a_step(llama, tmp_path, capsys, monkeypatch):
    """Whatever it is that transformers refuses only when it saves."""

    def refuse(*_, **__):
        raise TypeError("unhashable rope")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", refuse)
    recipe = write_recipe(tmp_path, model={"from": str(llama), "normalizer": "softpick"})
    assert main([str(recipe), "training.max_steps=1"]) == 2
    assert "cannot be saved, so nothing was trained (TypeError: unhashable rope)" in capsys.readouterr().err
    run = tmp_path / "runs" / "tiny"
    assert not (run / "metrics.jsonl").exists() and not list((run / "checkpoints").iterdir())
    assert not list(run.glob(".*staging"))


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_data(finished, tmp_path, capsys):
    """A chat template with half of a surrogate pair loads, and no file can hold it."""
    tokenizer = shutil.copytree(finished / "runs" / "tiny" / "final", tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"chat_template": "\ud800"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main([str(write_recipe(tmp_path, tokenizer={"train_bpe": None, "from": str(tokenizer)}))]) == 3
    assert "cannot be saved: 'utf-8' codec" in capsys.readouterr().err


@pytest.fixture
def full(monkeypatch):
    """full(target, limit): no file grows beyond `limit` bytes from the call of `target` on; full.over() ends it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def arrange(target, limit):
        module, name = target.rsplit(".", 1)
        original = getattr(importlib.import_module(f"hf_softpick.training.{module}"), name)

        def call(*arguments, **named):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            return original(*arguments, **named)

        monkeypatch.setattr(f"hf_softpick.training.{target}", call)

    arrange.over = lambda: (monkeypatch.undo(), resource.setrlimit(resource.RLIMIT_FSIZE, before))
    yield arrange
    arrange.over()


@pytest.mark.parametrize(
    ("target", "limit", "named"),
    [
        ("finalize.write_samples", 1, "samples.jsonl"),
        ("finalize.write_final", 20_000, "final could not be written"),  # safetensors
        ("finalize.write_final", 500, "final could not be written"),  # transformers
        ("finalize.plot_losses", 5_000, "loss.png"),
        ("resume.write_finished", 500, "finished.json"),
        ("run.dump_recipe", 500, "recipe.yaml"),
        ("finalize.check_saving", 20_000, "cannot hold a checkpoint"),
    ],
)
def test_a_full_disk_at_the_end_costs_nothing(again, finished, full, target, limit, named, capsys):
    """One message, exit code 6, and the same command finishes as if nothing had been."""
    run, call = again
    whole = (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    (run / "finished.json").unlink()
    full(target, limit)
    assert call() == 6
    assert named in capsys.readouterr().err
    full.over()
    assert not list(run.glob(".*staging"))
    assert call() == 0
    assert (run / "final" / "model.safetensors").read_bytes() == whole
    assert losses(run) == losses(finished / "runs" / "tiny")


def test_a_full_disk_while_training_saves_and_stops(again, finished, full, capsys):
    """metrics.jsonl has no room from the first step on; a checkpoint has. No step and no record is lost."""
    run, call = again
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints")
    limit = 600_000  # a checkpoint's largest file is the optimizer's, 2 * 4 bytes a parameter
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "pad": "x" * (limit - 100)}) + "\n")
    full("run.prepare_data", limit)
    assert call("training.save_steps=100") == 6
    message = capsys.readouterr().err
    assert "metrics.jsonl cannot be written" in message and "newest checkpoint is of step 2" in message
    full.over()
    assert call("training.save_steps=100") == 0
    assert losses(run) == losses(finished / "runs" / "tiny")
    assert (run / "final" / "model.safetensors").read_bytes() == (
        finished / "runs" / "tiny" / "final" / "model.safetensors"
    ).read_bytes()


LINKS = (
    ".final-staging .trial-staging .lock metrics.jsonl environment.json recipe.yaml report report/loss.png "
    "report/samples.jsonl checkpoints checkpoints/.staging-2"
).split()


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_run_folder_is_not_followed(finished, tmp_path, name, capsys):
    """Who can write into a shared run folder must not make others write elsewhere."""
    victim, link = tmp_path / "victim", tmp_path / "tiny" / name
    link.parent.mkdir(parents=True)
    victim.mkdir() if "staging" in name or "." not in name else victim.write_text("mine")
    link.symlink_to(victim)
    assert main([str(finished / "recipe.yaml"), f"run.root={tmp_path}"]) == 6
    assert str(link) in capsys.readouterr().err
    assert (victim.read_text() == "mine") if victim.is_file() else not list(victim.iterdir())


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("run.prepare_data", signal.SIGUSR1),
        ("finalize.plot_losses", signal.SIGUSR1),
        ("finalize.plot_losses", signal.SIGTERM),
    ],
)
def test_a_signal_outside_the_training_loop(again, target, number, monkeypatch, capsys):
    """Preparing and finishing stop at once; the same command goes on."""
    run, call = again
    (run / "finished.json").unlink()
    monkeypatch.setattr(f"hf_softpick.training.{target}", lambda *_, **__: signal.raise_signal(number))
    # Without a handler of the command, the signal would end the tests.
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert call() == 75
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert call() == 0


def test_a_run_without_targets_is_exit_code_3(tmp_path, capsys):
    """Documents of one token have nothing to predict; final/ would hold the weights that the run began with."""
    recipe = write_recipe(tmp_path, tokenizer={"train_bpe": 300, "add_bos": False, "add_eos": False})
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 2000)
    assert main([str(recipe), "training.max_steps=2", "data.validation=0"]) == 3
    assert "None of the 2 updates had a target token" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "final").exists()


def test_the_card_holds_no_path_of_this_machine(finished, tmp_path):
    """It is uploaded: whose home it was is nobody's business. The run's own recipe.yaml keeps the paths."""
    card = (finished / "runs" / "tiny" / "final" / "README.md").read_text()
    assert str(finished) not in card and "path: '.../text.jsonl'" in card and "Sources: .../text.jsonl." in card
    assert str(finished) in (finished / "runs" / "tiny" / "recipe.yaml").read_text()
    value = {"a": ["~/x.json", "/srv/me/data/*.parquet", "../up/", "file:///srv/me/y"], "/srv/me/z": 1}
    assert without_paths(value) == {"a": [".../x.json", ".../*.parquet", ".../up", ".../y"], ".../z": 1}
    kept = {"prompts": ["/srv/me"], "path": "HuggingFaceFW/fineweb-edu", "url": "s3://b/c", "text": "a /b", "n": None}
    assert without_paths(kept) == kept


def test_commits_of_the_hub_are_recorded(llama, finished, tmp_path, monkeypatch):
    """A branch means something else tomorrow. What the cache holds offline is what a download leaves in it."""
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--me--base"
    shutil.copytree(llama, repository / "snapshots" / commit)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finished / "runs" / "tiny" / "final" / name, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    recipe = write_recipe(
        tmp_path, model={"from": "me/base", "normalizer": "softpick"}, tokenizer={"train_bpe": None, "from": "me/base"}
    )
    done = train(recipe, "training.max_steps=1", env=environment(HF_HUB_CACHE=str(tmp_path / "hub")))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    expected = {"model.from": commit, "tokenizer.from": commit}
    assert json.loads((run / "environment.json").read_text())["launches"][-1]["commits"] == expected
    card = (run / "final" / "README.md").read_text()
    assert f"| commit of model.from | {commit} |" in card and "base_model: me/base" in card
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub_commit(str(finished)) is None and hub_commit("me/base", "no") is None
    assert hub_commit("me/base", "f" * 40) == "f" * 40


def test_the_end_is_on_the_disk_before_it_is_recorded(again, monkeypatch):
    """After a power failure a record without its files would say "nothing to do"."""
    run, call = again
    shutil.rmtree(run / "final")
    (run / "finished.json").unlink()
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), sync(number))
    )
    assert call() == 0
    staged = [str(run / ".final-staging" / path.name) for path in (run / "final").iterdir()]
    assert len(staged) > 5 and {*staged, str(run / ".final-staging"), str(run)} <= set(synced)
    record = next(place for place in synced if "finished.json" in place)
    assert max(map(synced.index, staged)) < synced.index(record)
