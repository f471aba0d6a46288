"""Checkpoint folders: every damage is found, the newest whole one is used, nothing half-written is ever taken."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from training_runs import environment, make_trainer

from hf_softpick.errors import CheckpointError, StorageError
from hf_softpick.training import checkpointing


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, max_steps=4, save_strategy="steps", save_steps=2, hub_token="hf_secretsecret").train()
    return folder / "checkpoints"


@pytest.fixture
def root(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


FILES = ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "config.json"]


def test_a_checkpoint_is_complete_and_described(saved):
    """Optimizer, scheduler and random state are needed to go on exactly; the manifest names them all."""
    assert checkpointing.steps(saved) == [4, 2]
    manifest = checkpointing.read_manifest(saved / "checkpoint-4")
    assert set(FILES) <= manifest["files"].keys()
    assert (manifest["step"], manifest["tokens_seen"]) == (4, 4 * 8 * 32)
    assert checkpointing.find_newest(saved) == saved / "checkpoint-4"
    assert not list(saved.glob(".staging*"))


def test_no_secret_is_written(saved):
    """transformers pickles its arguments, token included, beside the weights."""
    assert not list(saved.rglob("training_args.bin"))
    for path in saved.rglob("*"):
        assert path.is_dir() or b"hf_secretsecret" not in path.read_bytes(), path


def test_files_can_be_read_by_others(saved):
    """safetensors writes 0600 whatever the umask says."""
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (saved / "checkpoint-4").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "bit flipped", "empty"])
def test_damage_is_found_and_the_older_one_is_used(root, name, damage):
    """Four of these load without an error in transformers and train on from something else."""
    path = root / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "bit flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    warnings: list[str] = []
    assert checkpointing.find_newest(root, warnings.append) == root / "checkpoint-2"
    assert len(warnings) == 1 and name in warnings[0] and "checkpoint-4" in warnings[0]
    assert (root / "checkpoint-4.corrupt").is_dir()


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', '{"format": 2, "files": {}}', "[]"])
def test_broken_manifest_is_no_manifest(root, content):
    """A manifest that cannot be read vouches for nothing."""
    (root / "checkpoint-4" / checkpointing.MANIFEST).write_text(content)
    assert checkpointing.find_newest(root, lambda _: None) == root / "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "value"), [("step", "4"), ("data", None), ("world_size", [1]), ("recipe", 3), ("changes", {})]
)
def test_manifest_that_no_run_writes(root, name, value):
    """Made by hand, or by an older version and spoilt since: whole by its digest, and of no use."""
    checkpointing.write_manifest(
        root / "checkpoint-4", {**checkpointing.read_manifest(root / "checkpoint-4"), name: value}
    )
    warnings: list[str] = []
    assert checkpointing.find_newest(root, warnings.append) == root / "checkpoint-2"
    assert f"no {name} that a resume can read" in warnings[0]


def test_torn_writes_are_never_taken(root):
    """Every prefix of the files in writing order, as a crash leaves them in the staging folder or in place."""
    whole = root / "checkpoint-4"
    order = sorted(whole.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    torn = root / "checkpoint-6"
    for count in range(len(order)):
        torn.mkdir()
        for path in order[:count]:
            if path.name != checkpointing.MANIFEST:
                shutil.copy(path, torn)
        assert checkpointing.find_newest(root, lambda _: None) == whole
        shutil.rmtree(root / "checkpoint-6.corrupt")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]
)
def test_a_checkpoint_that_never_had_what_a_resume_needs(root, name):
    """A manifest may describe every file that is there; transformers goes on with a fresh optimizer or schedule."""
    (root / "checkpoint-4" / name).unlink()
    checkpointing.write_manifest(root / "checkpoint-4", {"step": 4})
    warnings: list[str] = []
    assert checkpointing.find_newest(root, warnings.append) == root / "checkpoint-2"
    assert f"{name}, which a resume needs, was never written" in warnings[0]


def test_what_a_resume_needs_by_strategy(tmp_path):
    """Sharded weights and optimizers have one file a rank; random states do wherever there are several ranks."""
    common = ["trainer_state.json", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"]
    shards = ["optimizer.pt", "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    zero = [
        "latest",
        "g/mp_rank_00_model_states.pt",
        *(f"g/bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in "01"),
    ]
    for strategy, names in (("ddp", [*common, *shards]), ("zero2", [*common, *zero]), ("zero3", [*common, *zero])):
        whole = {"strategy": strategy, "world_size": 2}
        for left_out in [None, *names]:
            folder = tmp_path / strategy / str(names.index(left_out) if left_out else "all")
            (folder / "g").mkdir(parents=True)
            for name in names:
                text = json.dumps({"weight_map": {"a": shards[2], "b": shards[3]}}) if "index" in name else "x"
                if name != left_out:
                    (folder / name).write_text(text)
            checkpointing.write_manifest(folder, whole)
            assert (checkpointing.verify(folder) == []) is (left_out is None), left_out
    checkpointing.write_manifest(folder.parent / "all", whole | {"world_size": 3})
    assert "rng_state_2.pth" in str(checkpointing.verify(folder.parent / "all"))


def test_every_changed_bit_of_the_manifest_is_seen(root):
    """One in the settings would be "another recipe", one in a number another step."""
    path = root / "checkpoint-4" / checkpointing.MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert checkpointing.verify(root / "checkpoint-4"), place
    path.write_bytes(content)
    assert checkpointing.verify(root / "checkpoint-4") == []


def test_files_that_cannot_be_read(root, monkeypatch):
    """A broken disk is a fault of the checkpoint; a missing permission says nothing against it."""
    path = root / "checkpoint-4" / checkpointing.MANIFEST
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    warnings: list[str] = []
    assert checkpointing.find_newest(root, warnings.append) == root / "checkpoint-2"
    assert "cannot be read" in warnings[0]
    (root / "checkpoint-4.corrupt").rename(root / "checkpoint-4")
    path.rmdir()
    path.write_bytes(content)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpointing, "sha256_of", forbidden)
    with pytest.raises(StorageError, match="checkpoint-4 cannot be read: .*Permission denied"):
        checkpointing.find_newest(root, warnings.append)
    assert checkpointing.steps(root) == [4, 2] and len(warnings) == 1


def test_saving_over_an_existing_step(root):
    """The new one replaces the old; a kill between the two renames brings the old one back."""
    staged = checkpointing.staging_directory(root, 4) / "checkpoint-4"
    shutil.copytree(root / "checkpoint-4", staged)
    (staged / "optimizer.pt").write_bytes(b"newer")
    assert checkpointing.publish(root, 4) == root / "checkpoint-4"
    assert (root / "checkpoint-4" / "optimizer.pt").read_bytes() == b"newer"
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    staged.mkdir(parents=True)
    (root / "checkpoint-4").rename(staged.parent / "replaced")
    checkpointing.sweep(root)
    assert (root / "checkpoint-4" / "optimizer.pt").read_bytes() == b"newer"
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_nothing_loadable_is_an_error_now_and_next_time(root):
    """Starting again from step 0 without a word would throw the run away."""
    for step in (2, 4):
        (root / f"checkpoint-{step}" / "optimizer.pt").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="checkpoint-4.corrupt"):
            checkpointing.find_newest(root, lambda _: None)
    assert CheckpointError.exit_code == 4


def test_no_checkpoint_at_all_means_a_fresh_start(tmp_path):
    """What a crash left in staging is not a checkpoint."""
    (tmp_path / ".staging-2" / "checkpoint-2").mkdir(parents=True)
    assert checkpointing.find_newest(tmp_path) is None
    checkpointing.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_step_again_replaces_the_first(root):
    """After a resume from an older checkpoint; the new one is whole at every moment, or the old one is."""
    staged = checkpointing.staging_directory(root, 4) / "checkpoint-4"
    shutil.copytree(root / "checkpoint-2", staged)
    assert checkpointing.publish(root, 4) == root / "checkpoint-4"
    assert checkpointing.read_manifest(root / "checkpoint-4")["step"] == 2
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_rotation_keeps_two(tmp_path):
    """One would leave nothing to fall back to."""
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    assert checkpointing.steps(tmp_path / "checkpoints") == [4, 3]
    assert trainer.args.output_dir == str(tmp_path / "checkpoints")  # and no staging folder any more


DISK_FULL = """
import resource, sys, signal
from pathlib import Path
sys.path.insert(0, "tests")
from training_runs import make_trainer
from hf_softpick.errors import StorageError
from hf_softpick.training import checkpointing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer = make_trainer(Path(sys.argv[1]), max_steps=4, save_strategy="steps", save_steps=2)
save = trainer.write_checkpoint
def full(*args):
    if trainer.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    save(*args)
trainer.write_checkpoint = full
try:
    trainer.train()
except StorageError as error:
    print("MESSAGE", error)
"""


@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, limit):
    """The limit hits the weights (Rust) or the optimizer (C++), which raise different errors."""
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=100,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )
    assert "MESSAGE" in done.stdout, done.stderr
    assert "step 4 could not be written" in done.stdout and "last good checkpoint is step 2" in done.stdout
    root = tmp_path / "checkpoints"
    assert checkpointing.find_newest(root) == root / "checkpoint-2"
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (SafetensorError("I/O error"), StorageError),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), StorageError),
        (Exception("File too large (os error 27)"), StorageError),  # tokenizers
        (RuntimeError("CUDA error: out of memory"), RuntimeError),
        (KeyError("a bug"), KeyError),
    ],
)
def test_a_failed_save_is_what_it_is(tmp_path, error, expected):
    """A full disk is exit code 6; anything else is a fault of ours, and must not look like one."""

    def save(*_):
        raise error

    trainer = make_trainer(tmp_path)
    with pytest.raises(expected, match=None if expected is StorageError else str(error.args[0])) as caught:
        trainer._save_together(save, 7)
    assert (caught.value is error) == (expected is not StorageError)


def test_manifest_is_written_last(saved):
    """A manifest that exists before its files would vouch for a torn checkpoint."""
    times = {path.name: path.stat().st_mtime_ns for path in (saved / "checkpoint-4").iterdir()}
    assert max(times, key=times.get) == checkpointing.MANIFEST
    assert json.loads((saved / "checkpoint-4" / checkpointing.MANIFEST).read_text())["format"] == checkpointing.FORMAT
