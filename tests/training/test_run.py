"""Whole runs through the command line: what is left behind, how they end, and that stopping them changes nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from training_runs import environment, losses, records, start, train, write_recipe

from hf_softpick.errors import RecipeError
from hf_softpick.train import main
from hf_softpick.training import checkpointing, strategy

STEPS = ["training.max_steps=60", "training.save_steps=20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one recipe; its prepared data is shared by all runs of this file."""
    path = tmp_path_factory.mktemp("runs")
    write_recipe(path)
    return path


@pytest.fixture(scope="module")
def control(folder):
    """60 steps without an interruption, with evaluation and samples: (finished process, run folder)."""
    done = train(folder / "recipe.yaml", "run.name=control", "eval.every=30", "eval.generate_every=30", *STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "runs" / "control"


def _weights(run):
    return (run / "final" / "model.safetensors").read_bytes()


def _snapshot(run):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}


def _wait_for_step(process, run, step):
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(record["step"] >= step for record in records(run)[-1:]):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not seen: {process.communicate()[0]}")


def test_the_end_of_a_run(control):
    """Everything that section 5 of the design promises is there, and the last lines say where."""
    done, run = control
    expected = "recipe.yaml environment.json metrics.jsonl finished.json report/loss.png report/samples.jsonl"
    final = "model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json README.md"
    missing = [name for name in expected.split() if not (run / name).is_file()]
    missing += [name for name in final.split() if not (run / "final" / name).is_file()]
    assert not missing
    assert not list(run.rglob("training_args.bin")) and not list(run.glob(".final*"))
    assert "Validation loss" in done.stdout and "Sample for 'def '" in done.stdout
    assert done.stdout.rstrip().endswith(f"Run folder: {run}")
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (run / "report" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [30, 60]
    assert all(sample["text"].startswith("def") for sample in samples)
    assert [record["step"] for record in records(run) if "eval_loss" in record] == [30, 60]
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["use_cache"] is True and config["normalizer"] == "softpick"
    launch = json.loads((run / "environment.json").read_text())["launches"][0]
    assert launch["versions"]["torch"] == torch.__version__ and launch["strategy"] == "one process"


def test_training_learned_something(control):
    """Word salad of 18 words has an entropy far below ln(300)."""
    _, run = control
    series = losses(run)
    assert len(series) == 60 and series[0] > 5.5 and series[-1] < 3.5


def test_model_card_and_saved_recipe(control):
    """The card warns of softmax, and the saved recipe is the run's."""
    from hf_softpick.training.recipe import load_recipe

    _, run = control
    card = (run / "final" / "README.md").read_text()
    for part in ("trust_remote_code=True", "belong to softpick attention", "eval_loss", "max_steps: 60", "train_rows"):
        assert part in card
    assert load_recipe(run / "recipe.yaml").run.name == "control"


def test_final_loads_without_the_package(control, tmp_path):
    """With the custom code alone, from a folder where hf_softpick cannot be imported, and it generates."""
    _, run = control
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'hf_softpick' not in sys.modules\n"
        "ids = t('def self return', return_tensors='pt').input_ids\n"
        "print('LOSS', m(input_ids=ids, labels=ids).loss.item())\n"
    )
    env = environment(PYTHONPATH="", HF_HOME=str(tmp_path))
    command = [sys.executable, "-P", "-c", code, str(run / "final")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("LOSS")[1]) < 4.5


def test_relaunch_of_a_finished_run_does_nothing(control, folder, capsys):
    """transformers would train one step more and change the weights."""
    _, run = control
    before = _snapshot(run)
    code = main([str(folder / "recipe.yaml"), "run.name=control", "eval.every=30", "eval.generate_every=30", *STEPS])
    assert code == 0 and "already finished at step 60" in capsys.readouterr().out
    assert _snapshot(run) == before


def test_sigterm_saves_and_the_same_command_resumes_bit_equal(control, folder):
    """Exit code 75, a checkpoint of the very step, and the end of a run that was never stopped."""
    run = folder / "runs" / "stopped"
    arguments = (folder / "recipe.yaml", "run.name=stopped", *STEPS)
    process = start(*arguments)
    _wait_for_step(process, run, 25)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    step = checkpointing.steps(run / "checkpoints")[0]
    assert 25 <= step < 60 and step % 20 != 0 and f"checkpoint-{step}" in output
    assert "Traceback" not in output and not (run / "final").exists()
    done = train(*arguments)
    assert done.returncode == 0 and f"from step {step}" in done.stdout, done.stderr
    assert losses(run) == losses(control[1])
    assert _weights(run) == _weights(control[1])


def test_sigkill_loses_nothing_but_time(control, folder):
    """kill -9 before the first checkpoint and after it; the end is bit-equal to a run that was never killed."""
    run = folder / "runs" / "killed"
    arguments = (folder / "recipe.yaml", "run.name=killed", *STEPS)
    for step in (2, 23):
        process = start(*arguments)
        _wait_for_step(process, run, step)
        process.kill()
        process.communicate()
    assert checkpointing.steps(run / "checkpoints")[0] >= 20
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(control[1])
    assert _weights(run) == _weights(control[1])


def test_killed_between_last_step_and_final(control, folder):
    """All steps are done but final/ is missing: write it, without another step."""
    run = shutil.copytree(control[1], folder / "runs" / "headless")
    shutil.rmtree(run / "final")
    (run / "finished.json").unlink()
    assert main([str(folder / "recipe.yaml"), "run.name=headless", *STEPS]) == 0
    assert _weights(run) == _weights(control[1])
    assert records(run)[-1]["step"] == 60


@pytest.fixture
def copied(control, folder, tmp_path):
    """An unfinished copy of the control run, for in-process calls of the command: call(*overrides) -> exit code."""
    run = shutil.copytree(control[1], tmp_path / "copied")
    (run / "finished.json").unlink()

    def call(*overrides):
        return main([str(folder / "recipe.yaml"), "run.name=copied", f"run.root={tmp_path}", *STEPS, *overrides])

    return run, call


def test_another_global_batch_is_refused(copied, capsys):
    """Data order and schedule would silently mean something else."""
    assert copied[1]("training.per_device_train_batch_size=4") == 2
    message = capsys.readouterr().err
    assert "global batch of 8 rows" in message and "gradient_accumulation_steps=2 restores it" in message


def test_another_model_is_refused(copied, capsys):
    """transformers loads what fits and warns."""
    assert copied[1]("model.num_hidden_layers=3") == 2
    assert "model.num_hidden_layers: 2 -> 3" in capsys.readouterr().err


def test_nothing_loadable_is_exit_code_4(copied, capsys):
    """Never a silent restart from step 0."""
    for path in copied[0].glob("checkpoints/checkpoint-*/optimizer.pt"):
        path.write_bytes(b"torn")
    assert copied[1]() == 4
    assert "optimizer.pt" in capsys.readouterr().err


def test_a_finished_run_can_go_on_longer(control, folder, tmp_path, capsys):
    """More steps with the same recipe continue from the last checkpoint."""
    run = shutil.copytree(control[1], tmp_path / "longer")
    arguments = [str(folder / "recipe.yaml"), "run.name=longer", f"run.root={tmp_path}", "training.max_steps=62"]
    assert main([*arguments, "training.save_steps=20"]) == 0
    assert "from step 60" in capsys.readouterr().out
    assert [record["step"] for record in records(run) if "loss" in record][-2:] == [61, 62]


def test_diverging_run_is_exit_code_5(folder, capsys):
    """A learning rate of 1e30 overflows at once; the message says what to do."""
    arguments = ["run.name=diverged", "training.learning_rate=1e30", "training.max_consecutive_skips=2"]
    assert main([str(folder / "recipe.yaml"), *arguments]) == 5
    message = capsys.readouterr().err
    assert "3 updates in a row" in message and "learning_rate" in message
    skipped = [r for r in records(folder / "runs" / "diverged") if r.get("event") == "skipped_update"]
    assert len(skipped) == 3


@pytest.mark.parametrize("asked", ["environment", "recipe"])
def test_fsdp_that_is_not_in_force_is_an_error(folder, capsys, monkeypatch, asked):
    """accelerate drops FSDP on CPU and trains with DDP."""
    if asked == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    overrides = [] if asked == "environment" else ["training.fsdp=true"]
    assert main([str(folder / "recipe.yaml"), "run.name=fsdp", *overrides]) == 2
    message = capsys.readouterr().err
    assert "FSDP was asked for by" in message and "in force is one process on cpu" in message


def test_deepspeed_without_a_launcher_is_an_error(folder, capsys):
    """One process on its own is not what the recipe asks for."""
    zero3 = Path(__file__).parents[2] / "recipes" / "deepspeed" / "zero3.json"
    assert main([str(folder / "recipe.yaml"), "run.name=alone", f"training.deepspeed={zero3}"]) == 2
    assert "one process without a launcher is in force" in capsys.readouterr().err


def test_a_killed_build_is_not_waited_for(tmp_path, monkeypatch):
    """torch waits for the lock of another build as long as the file is there, whoever left it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        strategy.check_launch({"deepspeed": "x"}, {"RANK": "0"})
    with pytest.raises(RecipeError, match="deepspeed_shm_comm/lock was left by a killed build.*Delete it"):
        strategy.check_launch({"deepspeed": "x"}, {"RANK": "0"})
    strategy.check_launch({}, {"RANK": "0"})


@pytest.mark.parametrize("name", ["triton", "triton_fast"])
def test_gpu_kernels_without_a_gpu_are_an_error_before_the_data(folder, capsys, name):
    """Missing data would be exit code 3."""
    overrides = [f"model.attn_implementation={name}", "training.use_cpu=true", "data.sources=[{path: missing.jsonl}]"]
    assert main([str(folder / "recipe.yaml"), "run.name=kernels", *overrides]) == 2
    message = capsys.readouterr().err
    assert f"model.attn_implementation='{name}' cannot run: " in message and "Use 'auto' or 'tiled'" in message
    assert not (folder / "runs" / "kernels" / "recipe.yaml").exists()


def test_too_few_rows_is_exit_code_3(folder, capsys):
    """Fewer rows than one step takes."""
    assert main([str(folder / "recipe.yaml"), "run.name=few", "training.per_device_train_batch_size=4096"]) == 3
    assert "4096" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["missing.yaml"], ["{recipe}", "training.learning_rat=1"]])
def test_help_and_recipe_errors_are_light(folder, arguments):
    """Neither torch nor transformers is imported to say that something is wrong."""
    code = "import sys; from hf_softpick.train import main\n"
    code += "try: rc = main(sys.argv[1:])\nexcept SystemExit as e: rc = e.code\n"
    code += (
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & sys.modules.keys()\nprint('HEAVY', heavy, rc)"
    )
    command = [sys.executable, "-c", code, *(a.format(recipe=folder / "recipe.yaml") for a in arguments)]
    begin = time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begin < 10  # 2 s are promised on a machine of one's own
    assert f"HEAVY set() {0 if arguments == ['--help'] else 2}" in done.stdout
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(folder):
    """For whoever mends the code."""
    done = train(folder / "missing.yaml", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "Traceback" not in train(folder / "missing.yaml").stderr


def test_local_rank_of_the_deepspeed_launcher_is_accepted(folder, capsys):
    """It comes before the recipe and between the overrides alike."""
    assert main(["--local_rank=0", str(folder / "missing.yaml"), "run.name=x"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_failed_upload_is_exit_code_69(folder, capsys):
    """Offline: training is done and kept, and the message holds the command for later."""
    overrides = ["run.name=pushed", "training.max_steps=1", "training.push_to_hub=true", "training.hub_model_id=me/x"]
    assert main([str(folder / "recipe.yaml"), *overrides]) == 69
    run = folder / "runs" / "pushed"
    assert (run / "finished.json").exists() and (run / "final" / "model.safetensors").exists()
    assert f"hf upload me/x {run / 'final'} ." in capsys.readouterr().err


def test_environment_is_left_alone(control, copied, monkeypatch):
    """A second run in the same process must not report into the first one's folder."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert copied[1]() == 0
    assert "WANDB_DIR" not in os.environ and "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_second_launch_into_the_same_folder_is_refused(copied, capsys):
    """Two processes that write one folder would both look as if they had gone well."""
    with FileLock(copied[0] / ".lock"):
        assert copied[1]() == 2
    assert "in use by another process" in capsys.readouterr().err


def test_another_seed_is_refused(copied, capsys):
    """The rest of the run would draw other batches: some rows twice, some never."""
    assert copied[1]("training.seed=7") == 2
    assert "training.seed: " in capsys.readouterr().err


def test_relaunch_goes_on_counting_refused_updates(folder, capsys):
    """A run that diverged must not end well because somebody restarts it often enough."""
    arguments = ["run.name=requeued", "training.learning_rate=1e30", "training.max_consecutive_skips=3"]
    for _ in range(2):
        assert main([str(folder / "recipe.yaml"), *arguments, "training.save_steps=2", "training.max_steps=60"]) == 5
        assert "4 updates in a row" in capsys.readouterr().err


def test_spoilt_record_of_the_end_is_not_a_traceback(control, copied):
    """Whatever is in finished.json, the checkpoints say where the run is."""
    record = json.loads((control[1] / "finished.json").read_text())
    forged = [record | {"step": math.inf}, record | {"final": {"model.safetensors": 3}}]
    for text in ("{}", "[]", "3", "\x00", *map(json.dumps, forged)):
        (copied[0] / "finished.json").write_text(text)
        assert copied[1]() == 0
