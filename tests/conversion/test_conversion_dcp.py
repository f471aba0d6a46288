"""Distributed checkpoints that torch itself wrote, and pickles that torch would have run."""

import json
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp
from source_cases import ancestor, ancestor_logits, llama, llama_logits

from hf_softpick import SoftpickForCausalLM
from hf_softpick.conversion.converting import convert
from hf_softpick.errors import CheckpointError

TOKENS = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1))


def training_state(tensors):
    """What flame and torchtitan keep beside the model."""
    return {
        "optimizer": {f"state.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in tensors.items()},
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": torch.tensor(3, dtype=torch.int32), "elapsed": timedelta(1)},
        "dataloader": {"dp_rank_0": b"anything"},
    }


def save(tmp_path, config, state):
    folder = tmp_path / "step-3"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return folder


def turn(tmp_path, folder):
    report = convert(str(folder), tmp_path / "target", config=tmp_path / "config.json")
    return SoftpickForCausalLM.from_pretrained(tmp_path / "target").eval(), report


def check(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[None]).logits[0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nested", [True, False], ids=["under_model", "at_the_top"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ancestor(tmp_path, nested, tied):
    config, tensors = ancestor(attn_impl="parallel_scaled_softpick_attn", tie_word_embeddings=tied)
    expected = ancestor_logits(config, tensors, TOKENS)
    state = dict(tensors)
    if tied:
        state["lm_head.weight"] = tensors["model.embeddings.weight"]
    folder = save(tmp_path, config, {"model": state, **training_state(tensors)} if nested else state)
    model, report = turn(tmp_path, folder)
    check(model, expected)
    assert report["source"]["format"] == "torch distributed checkpoint"
    assert len(report["training_state_not_read"]) == (len(tensors) + 4 if nested else 0)
    assert {file["name"] for file in report["source"]["files"]} == {"config.json", ".metadata", "__0_0.distcp"}


def test_llama(tmp_path):
    config, tensors = llama()
    model, _ = turn(tmp_path, save(tmp_path, config, {"model": tensors}))
    check(model, llama_logits(config, tensors, TOKENS))


def test_shards_of_several_ranks(tmp_path):
    """Written by two real processes that hold half of every tensor each."""
    import subprocess
    import sys
    from pathlib import Path

    config, tensors = ancestor()
    torch.save(tensors, tmp_path / "tensors.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = Path(__file__).with_name("sharded_save.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "step-3").glob("*.distcp"))) == 2
    model, _ = turn(tmp_path, tmp_path / "step-3")
    check(model, ancestor_logits(config, tensors, TOKENS))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_runs_no_code(tmp_path):
    config, tensors = ancestor()
    folder = save(tmp_path, config, {"model": tensors})
    trap = tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(trap)))
    with pytest.raises(CheckpointError, match=r"names (io|_io)\.open, which does not belong"):
        turn(tmp_path, folder)
    assert not trap.exists()
    with (folder / ".metadata").open("rb") as file:
        pickle.load(file).close()  # noqa: S301
    assert trap.exists(), "the attack does not attack"


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "posix.system"])
def test_only_listed_names_are_found(tmp_path, name):
    from hf_softpick.conversion.dcp import _MetadataUnpickler

    module, _, attribute = name.rpartition(".")
    payload = f"c{module}\n{attribute}\n.".encode()
    (tmp_path / "x").write_bytes(payload)
    with (tmp_path / "x").open("rb") as file, pytest.raises(CheckpointError, match="does not belong"):
        _MetadataUnpickler(file).load()


def edit_metadata(folder, change):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # noqa: S301
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _outside(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path


def _hole(metadata):
    metadata.state_dict_metadata["model.lm_head.weight"].chunks.clear()


def _unknown(metadata):
    metadata.state_dict_metadata["ema.lm_head.weight"] = metadata.state_dict_metadata["model.lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, "outside its folder"),
        (_hole, "pieces of lm_head.weight do not add up"),
        (_unknown, "'ema.lm_head.weight', which is neither"),
        (lambda metadata: metadata.state_dict_metadata.clear(), "holds no model that is known here"),
    ],
    ids=["outside", "hole", "unknown", "empty"],
)
def test_damaged_metadata(tmp_path, change, message):
    config, tensors = ancestor()
    folder = save(tmp_path, config, {"model": tensors})
    edit_metadata(folder, change)
    with pytest.raises(CheckpointError, match=message):
        turn(tmp_path, folder)


def _info(**fields):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.__dict__.update(fields)

    return change


def _entry(**fields):
    return lambda metadata: metadata.state_dict_metadata["model.lm_head.weight"].__dict__.update(fields)


def _chunk(**fields):
    return lambda metadata: metadata.state_dict_metadata["model.lm_head.weight"].chunks[0].__dict__.update(fields)


def _without_properties(metadata):
    del metadata.state_dict_metadata["model.lm_head.weight"].properties


def _huge(metadata):
    entry = metadata.state_dict_metadata["model.lm_head.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([10**14, 32])


def _properties(metadata):
    metadata.state_dict_metadata["model.lm_head.weight"].properties.dtype = "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "storage_data", None), "tables of entries and files are missing"),
        (lambda m: m.__dict__.pop("storage_data"), "tables of entries and files are missing"),
        (lambda m: setattr(m, "state_dict_metadata", []), "tables of entries and files are missing"),
        (lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, "x")), "a piece has no file"),
        (_info(relative_path=7), "a piece has no file"),
        (_info(offset="0"), "has no offset or length"),
        (_info(length=-1), "has no offset or length"),
        (_info(relative_path=chr(0)), "is missing"),
        (lambda m: m.state_dict_metadata.update({7: "x"}), "name of an entry is of type int"),
        (lambda m: m.state_dict_metadata.update({"model.lm_head.weight": "x"}), "neither a tensor nor bytes"),
        (_entry(chunks=None), "no size or no list of pieces"),
        (_entry(chunks=["x"]), "a piece of 'model.lm_head.weight' has no offsets or sizes"),
        (_entry(size=(64, 32)), "no size or no list of pieces"),
        (_entry(size=None), "no size or no list of pieces"),
        (_entry(properties=None), "neither a tensor nor bytes"),
        (_chunk(sizes="x"), "has no offsets or sizes"),
        (_chunk(sizes=torch.Size([2048])), "has no offsets or sizes"),
        (_chunk(offsets=torch.Size([-1, 0])), "has no offsets or sizes"),
        (_properties, "has no dtype"),
        (_without_properties, "neither a tensor nor bytes"),
        (_huge, "more than all files hold"),
    ],
)
def test_metadata_of_other_types(tmp_path, change, message):
    config, tensors = ancestor()
    folder = save(tmp_path, config, {"model": tensors})
    edit_metadata(folder, change)
    with pytest.raises(CheckpointError, match=message):
        turn(tmp_path, folder)
    assert not (tmp_path / "target").exists()


def test_integers_are_refused_by_name(tmp_path):
    config, tensors = ancestor()
    tensors["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has the type torch\.int8"):
        turn(tmp_path, save(tmp_path, config, {"model": tensors}))


def test_damaged_files(tmp_path):
    config, tensors = ancestor()
    folder = save(tmp_path, config, {"model": tensors})
    data = folder / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        turn(tmp_path, folder)
    data.unlink()
    with pytest.raises(CheckpointError, match="incomplete: __0_0.distcp is missing"):
        turn(tmp_path, folder)
    (folder / ".metadata").write_bytes(b"\x80\x04not a pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        turn(tmp_path, folder)
    assert not (tmp_path / "target").exists()


def test_the_configuration_is_asked_for(tmp_path):
    config, tensors = ancestor()
    folder = save(tmp_path, config, {"model": tensors})
    with pytest.raises(CheckpointError, match="by --config FILE"):
        convert(str(folder), tmp_path / "target")
