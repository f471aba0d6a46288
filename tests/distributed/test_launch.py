"""Two real processes over gloo: the same run as one process, whatever the launcher and the sharding."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launchers import accelerate, deepspeed, free_port, run_command
from tiny_foreign import save_source
from training_runs import REPOSITORY, environment, losses, records, write_recipe

from hf_softpick.train import main
from hf_softpick.training import checkpointing

HERE = Path(__file__).parent
# Half the rows in each of two processes: the same global batch as one process. Two micro-batches each.
HALF = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
STEPS = ["eval.every=5", "training.save_total_limit=4", "eval.statistics=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one recipe; all runs of this file share its prepared data."""
    path = tmp_path_factory.mktemp("launch")
    write_recipe(path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process that all others must equal."""
    assert main([str(folder / "recipe.yaml"), "run.name=alone", *STEPS]) == 0
    return folder / "runs" / "alone"


def _check_equal(run, alone):
    """Loss series, evaluation, tokens and final weights of one process; final/ complete."""
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert len(losses(run)) == 5
    mine, theirs = (next(r for r in records(each) if "eval_loss" in r) for each in (run, alone))
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert mine["eval_tokens"] == theirs["eval_tokens"]
    assert records(run)[-1]["step"] == 5 and (run / "finished.json").exists()
    names = {path.name for path in (alone / "final").iterdir()}
    assert {path.name for path in (run / "final").iterdir()} == names
    from transformers import AutoModelForCausalLM

    import hf_softpick.modeling.modeling_softpick  # noqa: F401

    weights = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    for name, expected in AutoModelForCausalLM.from_pretrained(alone / "final").state_dict().items():
        assert weights[name].dtype == torch.float32
        # Rounding of a gradient near 0 can turn an update of AdamW round, so 5 steps may part by some of them.
        assert (weights[name] - expected).abs().mean() < 2e-4, name


def test_ddp_equals_one_process(folder, alone):
    """accelerate launch with recipes/accelerate/ddp.yaml."""
    recipe = folder / "recipe.yaml"
    done = run_command(*accelerate("ddp.yaml", "-m", "hf_softpick.train", recipe, "run.name=ddp", *HALF, *STEPS))
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "ddp"
    _check_equal(run, alone)
    launch = json.loads((run / "environment.json").read_text())["launches"][0]
    assert (launch["strategy"], launch["processes"]) == ("ddp", 2)
    assert done.stdout.count("Run folder:") == 1
    _check_statistics(run, 2)


def _check_statistics(run, ranks):
    """The last statistics are those of the saved model over the first row of every rank."""
    from transformers import AutoModelForCausalLM

    from hf_softpick.analysis.statistics import measure
    from hf_softpick.data.preparing import prepare_data
    from hf_softpick.training.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    rows = prepare_data(recipe.data, recipe.tokenizer, progress=False).validation
    model = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    columns = ("input_ids", "position_ids")
    batches = [
        {name: torch.as_tensor(rows[row][name])[: rows[row]["num_tokens"]][None].long() for name in columns}
        for row in range(ranks)
    ]
    expected = measure(model, batches).summary()
    logged = [record for record in records(run) if "stats_kurtosis" in record]
    assert [record["step"] for record in logged] == [0, 3, 5]
    for name in ("sink_rate", "sparsity", "row_mass", "entropy", "kurtosis", "hidden_max"):
        assert logged[-1][f"stats_{name}"] == pytest.approx(expected[name], rel=1e-4), name


def test_statistics_of_one_process(alone):
    """One row, where two ranks look at two."""
    _check_statistics(alone, 1)


@pytest.fixture(scope="module")
def zero3(folder):
    """The same under ZeRO-3, launched by accelerate."""
    recipe = folder / "recipe.yaml"
    done = run_command(*accelerate("zero3.yaml", "-m", "hf_softpick.train", recipe, "run.name=zero3", *HALF, *STEPS))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "zero3"


def test_zero3_equals_one_process(zero3, alone):
    """Weights are drawn sharded, and still are those of one process."""
    _check_equal(zero3, alone)
    _check_statistics(zero3, 2)
    launch = json.loads((zero3 / "environment.json").read_text())["launches"][0]
    assert (launch["strategy"], launch["processes"]) == ("zero3", 2)


def test_zero3_proves_a_model_of_another_architecture(tmp_path):
    """The proof runs before an engine gathers the weights; the run is that of one process."""
    source = tmp_path / "source"
    save_source(source, "gpt_neox")
    model = {"from": str(source), "normalizer": "softpick"}
    recipe = write_recipe(tmp_path, model=model, tokenizer={"from": str(source)})
    steps = [recipe, "training.max_steps=2"]
    done = run_command(*accelerate("zero3.yaml", "-m", "hf_softpick.train", *steps, "run.name=zero3", *HALF))
    assert done.returncode == 0, done.stderr
    assert main([*map(str, steps), "run.name=alone"]) == 0
    sharded, whole = (losses(tmp_path / "runs" / name) for name in ("zero3", "alone"))
    assert sharded == pytest.approx(whole, abs=1e-5) and len(whole) == 2


@pytest.mark.slow
def test_changed_settings_take_effect_under_zero3(folder, zero3, alone):
    """ZeRO restores the optimizer's settings in its own way; the next steps must be those of one process."""
    name = "changed"
    new = "learning_rate=3e-3 weight_decay=0.5 adam_beta1=0.5 max_grad_norm=0.1 max_steps=7".split()
    changed = [f"training.{setting}" for setting in new]
    expected = shutil.copytree(alone, folder / "one" / name)
    root = f"run.root={expected.parent}"
    assert main([str(folder / "recipe.yaml"), f"run.name={name}", root, *STEPS, *changed]) == 0
    run = shutil.copytree(zero3, folder / "runs" / name)
    arguments = [folder / "recipe.yaml", f"run.name={name}", *HALF, *STEPS, *changed]
    done = run_command(*accelerate("zero3.yaml", "-m", "hf_softpick.train", *arguments))
    assert done.returncode == 0, done.stderr
    assert "training.learning_rate: 0.01 -> 0.003" in done.stdout
    assert len(losses(run)) == 7 and losses(run) == pytest.approx(losses(expected), abs=1e-5)
    rates = [[record["learning_rate"] for record in records(each) if "loss" in record] for each in (run, expected)]
    assert rates[0] == pytest.approx(rates[1]) and rates[0][5] < 1e-3


def test_deepspeed_launcher_resumes_zero3(folder, zero3, alone):
    """The deepspeed launcher, going on from step 2 of accelerate's run."""
    run = shutil.copytree(zero3, folder / "runs" / "deepspeed")
    (run / "finished.json").unlink()
    shutil.rmtree(run / "final")
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    config = REPOSITORY / "recipes" / "deepspeed" / "zero3.json"
    arguments = [folder / "recipe.yaml", "run.name=deepspeed", f"training.deepspeed={config}", *HALF, *STEPS]
    done = run_command(*deepspeed(*arguments))
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    _check_equal(run, alone)


@pytest.mark.parametrize("config", ["ddp.yaml", "zero3.yaml"])
def test_nan_on_one_rank_is_refused_by_all(folder, alone, tmp_path, config):
    """Rank 1 has a NaN loss in step 2 and a NaN gradient in step 3: neither update goes in, anywhere."""
    name = f"poisoned_{config[:-5]}"
    arguments = [folder / "recipe.yaml", f"run.name={name}", *HALF, *STEPS]
    done = run_command(*accelerate(config, HERE / "poisoned_run.py", tmp_path, *arguments))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        after = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert after[0] == after[1] == after[2] and len({*after[2:5]}) == 3, after
    lines = records(folder / "runs" / name)
    skipped = [record for record in lines if record.get("event") == "skipped_update"]
    assert [(record["step"], record["reason"]) for record in skipped] == [
        (2, "non-finite loss"),
        (3, "non-finite gradient"),
    ]
    assert skipped[0]["ranks"] == [1]
    by_step = {record["step"]: record for record in lines if "loss" in record}
    assert [by_step[step]["loss"] for step in (2, 3)] == ["nan", "nan"]
    rates = [record["learning_rate"] for record in records(alone) if "loss" in record]
    assert [by_step[step]["learning_rate"] for step in range(1, 6)] == rates


def test_signal_to_one_rank_stops_all_and_one_process_goes_on(folder, tmp_path):
    """SIGTERM to rank 1 alone: both save the same step. The run ends on one process as if nothing had happened."""
    long = ["training.max_steps=80", "training.save_steps=50", "training.learning_rate=1e-3"]
    recipe, run = folder / "recipe.yaml", folder / "runs" / "signalled"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [*launcher, "-m", "hf_softpick.train", str(recipe), "run.name=signalled", *HALF, *long]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        deadline = time.monotonic() + 90
        while not ((run / "metrics.jsonl").exists() and len(losses(run)) >= 5):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        workers = [child for child in psutil.Process(process.pid).children() if "hf_softpick.train" in child.cmdline()]
        (second,) = [child for child in workers if child.environ()["RANK"] == "1"]
        second.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        process.wait(timeout=60)
    output = (tmp_path / "log").read_text()
    step = checkpointing.steps(run / "checkpoints")[0]
    assert f"Stopped by a signal at step {step} of 80" in output
    assert "exitcode  : 75" in output and time.monotonic() - begin < 40
    assert step % 50 != 0
    # Same global batch on one process: allowed, and the same run.
    assert main([str(recipe), "run.name=signalled", *long]) == 0
    assert main([str(recipe), "run.name=unbroken", *long]) == 0
    ours, theirs = losses(run), losses(folder / "runs" / "unbroken")
    assert len(ours) == len(theirs) == 80
    # Rounding of the halves of a batch grows with the steps; other rows would differ by more than 0.05.
    assert ours == pytest.approx(theirs, abs=2e-3)
