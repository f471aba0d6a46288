"""Heads besides language modelling: Llama's numbers, the right token of every row, at home with PEFT and Trainer."""

import pytest
import torch
from tiny_softpick import SIZES, close, tiny_config, tokens
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hf_softpick

TASKS = {
    "SequenceClassification": (AutoModelForSequenceClassification, LlamaForSequenceClassification),
    "TokenClassification": (AutoModelForTokenClassification, LlamaForTokenClassification),
    "QuestionAnswering": (AutoModelForQuestionAnswering, LlamaForQuestionAnswering),
}


def labels_of(task: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = torch.arange(ids.shape[0])
    return {
        "SequenceClassification": {"labels": rows % 3},
        "TokenClassification": {"labels": ids % 3},
        "QuestionAnswering": {"start_positions": rows % 5, "end_positions": rows % 5 + 2},
    }[task]


@pytest.mark.parametrize("task", TASKS)
def test_a_softmax_head_is_llamas(task):
    """Parameter names, logits and loss; also what a causal checkpoint, a Llama's included, goes on from."""
    auto, llama_class = TASKS[task]
    torch.manual_seed(0)
    model = auto.from_config(tiny_config("softmax", num_labels=3)).eval()
    assert type(model) is getattr(hf_softpick, f"SoftpickFor{task}")
    llama = llama_class(LlamaConfig(**SIZES, num_labels=3)).eval()
    weights = {name.replace("model.", f"{llama.base_model_prefix}.", 1): w for name, w in model.state_dict().items()}
    llama.load_state_dict(weights, strict=True)
    ids = tokens(2, 9)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels_of(task, ids)}
    for ours, theirs in zip(model(**arguments).to_tuple(), llama(**arguments).to_tuple(), strict=False):
        if isinstance(ours, torch.Tensor):
            close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_row_is_classified_by_its_last_token(pad, side):
    """Texts end with eos, which is the pad token as well in one case: comparing with it would skip that token."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3, pad_token_id=pad)).eval()
    documents = [torch.cat([tokens(n, seed=n), torch.tensor([2])]) for n in (8, 3, 5)]
    expected = torch.cat([model(d[None], attention_mask=torch.ones_like(d[None])).logits for d in documents])
    ids, mask = torch.full((3, 9), 0 if pad is None else pad), torch.zeros(3, 9, dtype=torch.int64)
    for row, document in enumerate(documents):
        where = slice(9 - len(document), 9) if side == "left" else slice(len(document))
        ids[row, where], mask[row, where] = document, 1
    close(model(ids, attention_mask=mask).logits, expected)
    close(model(ids, attention_mask=mask.bool(), use_cache=True).logits, expected)
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded, attention_mask=mask).logits, expected)
    if pad == 0 and side == "right":  # without a mask, padding is what equals the pad token
        close(model(ids).logits, expected)
    if pad is None:
        with pytest.raises(ValueError, match="3 rows without an attention_mask"):
            model(ids)


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_gradients_are_those_of_one_batch(task, tmp_path):
    """The losses of these heads do not know num_items_in_batch; Trainer must not believe that they do."""
    ids = tokens(4, 9)
    columns = {"input_ids": ids, **labels_of(task, ids)}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(4)]
    norms = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = TASKS[task][0].from_config(tiny_config(num_labels=3, classifier_dropout=0.0))
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        norms.append(next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_peft_knows_which_modules_to_adapt():
    """Without target_modules, which it looks up by model_type; head and adapters are trained."""
    peft = pytest.importorskip("peft")
    for config in (peft.LoraConfig(task_type="SEQ_CLS"), peft.IA3Config(task_type="SEQ_CLS")):
        model = peft.get_peft_model(AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)), config)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert any("v_proj" in name for name in trained) and any("score" in name for name in trained)
