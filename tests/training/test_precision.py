"""What decides the precision of a run: the recipe alone. Whatever says otherwise is an error."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_foreign import foreign_model
from training_runs import write_recipe

from hf_softpick.errors import RecipeError
from hf_softpick.train import main
from hf_softpick.training.strategy import check_precision, use_float32_weights

STAGE = {"zero_optimization": {"stage": 3}}
ON, OFF = {"enabled": True}, {"enabled": False}


@pytest.mark.parametrize(
    ("launched", "recipe", "remedy"),
    [
        ("bf16", {}, "--mixed_precision no, or add training.bf16=true"),
        ("fp16", {"bf16": True}, "--mixed_precision bf16, or add training.fp16=true"),
        ("fp8", {"bf16": True}, "launch with --mixed_precision bf16."),
        ("fp8", {}, "launch with --mixed_precision no."),
        ("bf16", {"bf16": True}, None),
        ("no", {"bf16": True}, None),
    ],
)
def test_precision_of_the_launcher(launched, recipe, remedy):
    """transformers trains in float32 where the launcher alone says bf16, and in bf16 where it says fp8."""
    environment = {"ACCELERATE_MIXED_PRECISION": launched}
    if remedy is None:
        check_precision(environment, recipe)
    else:
        with pytest.raises(RecipeError) as caught:
            check_precision(environment, recipe)
        assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "config", "fault"),
    [
        ({}, {"bf16": ON}, "bf16.enabled=True where the recipe has"),
        ({"bf16": True}, {"bf16": OFF}, "bf16.enabled=False where the recipe has"),
        ({}, {"fp16": ON}, "fp16.enabled=True where the recipe has"),
        ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"bf16": True}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast"),
        ({"bf16": True}, {"bf16": {**ON, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
        ({}, {"gradient_clipping": 0.5}, "gradient_clipping=0.5 where the recipe has max_grad_norm=1.0"),
        ({}, {"optimizer": {"type": "AdamW"}}, "optimizer, which would win over training.optim"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "scheduler, which would win over training.lr_scheduler_type"),
        ({"bf16": True}, {}, None),
        ({"bf16": True}, {"bf16": ON}, None),
        ({"bf16": True}, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
        ({}, {"bf16": {"enabled": "auto"}}, None),
    ],
)
def test_precision_of_the_deepspeed_file(recipe, config, fault):
    """Refused before anything is prepared; where both agree the weights are float32, and autocast is DeepSpeed's."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import deepspeed_config, unset_hf_deepspeed_config

    args = TrainingArguments(use_cpu=True, **recipe)
    args.deepspeed_plugin = plugin = DeepSpeedPlugin(hf_ds_config=json.loads(json.dumps({**STAGE, **config})))
    plugin.set_mixed_precision(args.mixed_precision)
    try:
        if fault is not None:
            with pytest.raises(RecipeError) as caught:
                use_float32_weights(args)
            assert fault in str(caught.value)
            return
        use_float32_weights(args)
        for each in (plugin.deepspeed_config, deepspeed_config()):
            assert each.get("torch_autocast", OFF)["enabled"] == bool(recipe)
            assert not each["bf16"].get("enabled")
    finally:
        unset_hf_deepspeed_config()


def test_other_precisions_are_errors_before_the_data(tmp_path, capsys, monkeypatch):
    """They would train in float32, and say nothing. Missing data would be exit code 3."""
    recipe = write_recipe(tmp_path, data={"sources": [{"path": "missing.jsonl"}]})
    assert main([str(recipe), "training.fp16=true", "training.use_cpu=true"]) == 2
    assert "training.fp16 needs a GPU" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    assert main([str(recipe)]) == 2
    assert "training.bf16=true" in capsys.readouterr().err


def test_export_dtype_is_that_of_final_alone(tmp_path):
    """Checkpoints stay float32, and so do the scales that a model never rounds."""
    from transformers import AutoModelForCausalLM

    recipe = write_recipe(tmp_path, model={"normalizer": "scaled_softpick", "tie_word_embeddings": True})
    options = ["training.max_steps=2", "training.export_dtype=bfloat16"]
    assert main([str(recipe), *options]) == 0
    run = tmp_path / "runs" / "tiny"
    kept = load_file(run / "checkpoints/checkpoint-2/model.safetensors")
    final = load_file(run / "final/model.safetensors")
    assert kept.keys() == final.keys()
    for name, tensor in kept.items():
        expected = torch.float32 if "head_scale" in name else torch.bfloat16
        assert tensor.dtype == torch.float32 and final[name].dtype == expected
        assert torch.equal(final[name], tensor.to(expected))
    assert json.loads((run / "final/config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_export_dtype_of_several_files(tmp_path, family):
    """The index says how large the weights are now, and a sealed config.json says what they are; integers stay."""
    from transformers import AutoModelForCausalLM

    from hf_softpick.training.finalize import _cast

    model = foreign_model(family, "softpick")
    model.get_input_embeddings().register_buffer("order", torch.tensor([257]))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    _cast(tmp_path, torch.float16, ())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * model.num_parameters() + 8
    shard = index["weight_map"][next(name for name in index["weight_map"] if name.endswith("order"))]
    assert next(v for k, v in load_file(tmp_path / shard).items() if k.endswith("order")).tolist() == [257]
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.dtype == torch.float16 and not found["missing_keys"]
