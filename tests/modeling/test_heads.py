"""Heads besides language modelling: Llama's numbers, the right token of every row, at home with PEFT and Trainer."""

import subprocess
import sys

import pytest
import torch
from tiny_softpick import SIZES, close, tiny_config, tiny_model, tokens, without_package
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

COMMON = ("num_labels", "problem_type")


def labels_of(task: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = torch.arange(ids.shape[0])
    return {
        "SequenceClassification": {"labels": rows % 3},
        "TokenClassification": {"labels": ids % 3},
        "QuestionAnswering": {"start_positions": rows % 5, "end_positions": rows % 5 + 2},
    }[task]


def llamas(task: str, model):
    """Llama's class with the model's weights."""
    llama = TASKS[task][1](LlamaConfig(**SIZES, **{name: getattr(model.config, name) for name in COMMON})).eval()
    weights = {name.replace("model.", f"{llama.base_model_prefix}.", 1): w for name, w in model.state_dict().items()}
    llama.load_state_dict(weights, strict=True)
    return llama


def same(model, llama, arguments: dict) -> None:
    """Every output, the loss and the gradient of every parameter."""
    ours, theirs = model(**arguments), llama(**arguments)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"past_key_values"}:
        for one, other in zip(
            *((o[name],) if torch.is_tensor(o[name]) else o[name] for o in (ours, theirs)), strict=True
        ):
            close(one, other, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    # On purpose ours has no padding_idx: where no mask hides it, a pad token is a token like any other.
    if "input_ids" in arguments:
        model.get_input_embeddings().weight.grad[SIZES["pad_token_id"]] = 0
    for (name, parameter), other in zip(model.named_parameters(), llama.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None) == ("embed" in name and "input_ids" not in arguments)
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("call", ["no mask", "left", "right", "embeds", "everything"])
@pytest.mark.parametrize("task", TASKS)
def test_a_softmax_head_is_llamas(task, call):
    """Parameter names, outputs, loss and gradients; what a causal checkpoint, a Llama's included, goes on from."""
    torch.manual_seed(0)
    model = TASKS[task][0].from_config(tiny_config("softmax", num_labels=3)).eval()
    assert type(model) is getattr(hf_softpick, f"SoftpickFor{task}")
    ids = tokens(2, 9)
    arguments = {"input_ids": ids, **labels_of(task, ids)}
    if call in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[1, : 3 if call == "left" else None][-3:] = 0
        arguments |= {"attention_mask": mask, "input_ids": ids.masked_fill(mask == 0, SIZES["pad_token_id"])}
        if task == "TokenClassification":
            arguments["labels"] = arguments["labels"].masked_fill(mask == 0, -100)
    llama = llamas(task, model)
    if call == "embeds":  # whose last column is each row's last token
        arguments["inputs_embeds"] = model.get_input_embeddings()(arguments.pop("input_ids")).detach()
    if call == "everything":
        model.set_attn_implementation("eager")
        llama.set_attn_implementation("eager")
        arguments |= {"output_hidden_states": True, "output_attentions": True}
    if call == "left" and task != "SequenceClassification":
        del arguments["attention_mask"]  # logits of padding, which sees nothing, are nobody's
    same(model, llama, arguments)


@pytest.mark.parametrize(
    ("problem", "labels", "count"),
    [
        ("regression", torch.tensor([0.5, -1.0]), 1),
        ("regression", torch.tensor([[0.5, 1.0], [-1.0, 0.0]]), 2),
        ("single_label_classification", torch.tensor([0, 2]), 3),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 3),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_every_kind_of_label_of_a_row(problem, labels, count, named):
    """Named by problem_type, or guessed from the labels; the guess is written into the configuration."""
    torch.manual_seed(0)
    config = tiny_config("softmax", num_labels=count, problem_type=problem if named else None)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    same(model, llamas("SequenceClassification", model), {"input_ids": tokens(2, 9), "labels": labels})
    guess = "multi_label_classification" if problem == "regression" and count > 1 else problem
    assert model.config.problem_type == (problem if named else guess)


@pytest.mark.parametrize("normalizer", ["softmax", "scaled_softpick"])
@pytest.mark.parametrize("task", TASKS)
def test_a_head_on_a_causal_checkpoint_is_trained_saved_and_loaded(task, normalizer, tmp_path):
    """num_labels comes with from_pretrained; the head is new, the rest the checkpoint's; a cache holds the prefix."""
    causal, auto = tiny_model(normalizer), TASKS[task][0]
    causal.save_pretrained(tmp_path / "causal")
    labels = {} if task == "QuestionAnswering" else {"num_labels": 5}
    model = auto.from_pretrained(tmp_path / "causal", **labels).eval()
    head = model.qa_outputs if task == "QuestionAnswering" else model.score
    assert head.out_features == labels.get("num_labels", 2) == len(model.config.id2label)
    assert all(torch.equal(w, model.model.state_dict()[name]) for name, w in causal.model.state_dict().items())
    ids = tokens(2, 9)
    columns = {"input_ids": ids, **labels_of(task, ids)}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(2)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = auto.from_pretrained(tmp_path / "saved")
    expected, out = model(**columns), loaded(**columns)
    close(out.loss, expected.loss)
    past = loaded.model(ids[:, :6], use_cache=True).past_key_values
    name = "start_logits" if task == "QuestionAnswering" else "logits"
    rest = loaded(ids[:, 6:], past_key_values=past)[name]
    close(rest, expected[name] if task == "SequenceClassification" else expected[name][:, 6:])


def test_heads_load_from_the_saved_code_alone(tmp_path):
    """Without the package, through trust_remote_code."""
    code, ids = "import sys, torch, transformers\n", tokens(1, 9)
    for task, (auto, _) in TASKS.items():
        model = auto.from_config(tiny_config(num_labels=3)).eval()
        model.save_pretrained(tmp_path / task)
        torch.save(model(ids)[0], tmp_path / task / "expected.pt")
        code += f"folder = {str(tmp_path / task)!r}\n"
        code += f"model = transformers.{auto.__name__}.from_pretrained(folder, trust_remote_code=True)\n"
        code += "expected = torch.load(folder + '/expected.pt')\n"
        code += f"torch.testing.assert_close(model(torch.tensor({ids.tolist()}))[0], expected)\n"
    code += "assert 'hf_softpick' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, env=without_package(tmp_path), cwd=tmp_path)


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
