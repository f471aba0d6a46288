"""TRL's trainers and PEFT's adapters on our model, as their users start them: no flag of ours, no network."""

import pytest
import torch
from datasets import Dataset
from tiny_softpick import SIZES, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_softpick.modeling.modeling_softpick import SoftpickForSequenceClassification

peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
WORDS = "one two three four five six seven".split()
COMMON = dict(
    per_device_train_batch_size=4,
    max_steps=4,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
    max_length=24,
)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def texts(count):
    return [" ".join(WORDS[(first + i) % len(WORDS)] for i in range(3 + first % 5)) for first in range(count)]


@pytest.mark.parametrize(
    "choice", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=lambda x: next(iter(x))
)
def test_sft_keeps_documents_apart(choice, tokenizer, tmp_path):
    """TRL hands over position_ids, seq_idx and no mask; a row of it is its documents, each alone."""
    arguments = trl.SFTConfig(str(tmp_path), dataset_text_field="text", **{**COMMON, **choice})
    data = Dataset.from_dict({"text": texts(24)})
    trainer = trl.SFTTrainer(tiny_model(), arguments, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    assert "attention_mask" not in inputs and (inputs["position_ids"] == 0).sum() >= 4
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[0]
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        bounds = zip(starts, [*starts[1:], len(logits)], strict=True)
        alone = [trainer.model(inputs["input_ids"][:, a:b]).logits[0] for a, b in bounds]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def test_dpo(tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": ["one two"] * 8, "chosen": [" three four"] * 8, "rejected": [" six"] * 8})
    arguments = trl.DPOConfig(str(tmp_path), **COMMON)
    tiny_model().save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")  # the reference is loaded from it as well
    trainer = trl.DPOTrainer(folder, args=arguments, train_dataset=data, processing_class=tokenizer)
    assert trainer.model.config.normalizer == "softpick"
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693, abs=0.01)  # the policy is the reference yet
    assert losses(trainer)[-1] < 0.6


def test_reward(tokenizer, tmp_path):
    data = Dataset.from_dict({"chosen": ["one two three four"] * 8, "rejected": ["one two six"] * 8})
    torch.manual_seed(0)
    model = SoftpickForSequenceClassification(tiny_config(num_labels=1))
    arguments = trl.RewardConfig(str(tmp_path), **COMMON)
    trainer = trl.RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
def test_lora(normalizer, tmp_path):
    """The default modules of model_type softpick; saved, loaded on the base, merged into a folder of ours."""
    tiny_model(normalizer).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 12))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted = {name.rsplit(".", 1)[-1] for name in model.targeted_module_names}
    assert adapted == {"q_proj", "v_proj"}
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and "lora" not in name} == set()
    expected = model.eval()(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.normalizer == normalizer
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
