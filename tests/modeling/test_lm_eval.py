"""The lm_eval command on a saved folder, where the package does not exist, against log-likelihoods of our own."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_softpick import SIZES, double_parameters, oracle, tiny_model, without_package
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "a b c d e f g h i j k l m n o p".split()
# Two lengths a batch, so that rows are padded; the gold answers differ.
DOCUMENTS = [
    {"context": "a b c d", "choices": ["e f", "g"], "gold": 0},
    {"context": "h i", "choices": ["j", "k l m n"], "gold": 1},
    {"context": "o p a b c d e", "choices": ["f", "g h i"], "gold": 0},
]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def log_likelihood(model, tokens: PreTrainedTokenizerFast, context: str, answer: str) -> float:
    """Sum of log p of the answer's tokens after the context, through the oracle."""
    prompt, rest = (tokens(text)["input_ids"] for text in (context, answer))
    document = torch.tensor(prompt + rest)
    log_p = oracle(double_parameters(model), model.config, document)[0].log_softmax(-1)
    return float(log_p[len(prompt) - 1 : -1].gather(1, document[len(prompt) :, None]).detach().sum())


def test_lm_eval_scores_a_folder_where_the_package_does_not_exist(tmp_path):
    model, words = tiny_model("scaled_softpick"), tokenizer()
    assert len(words) <= SIZES["vocab_size"]
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    data, tasks = tmp_path / "data.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    tasks.mkdir()
    (tasks / "local_choices.yaml").write_text(TASK.format(data=data))
    pretrained = f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32,max_length=64"
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", pretrained]
    command += ["--tasks", "local_choices", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    process = subprocess.run(
        command, cwd=tmp_path, env=without_package(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]

    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    lines = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    assert len(samples) == len(DOCUMENTS)
    correct = 0
    for document, sample in zip(DOCUMENTS, samples, strict=True):
        expected = [log_likelihood(model, words, document["context"], answer) for answer in document["choices"]]
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        assert scores == pytest.approx(expected, abs=1e-3)
        correct += expected.index(max(expected)) == document["gold"]
    assert results["results"]["local_choices"]["acc,none"] == pytest.approx(correct / len(DOCUMENTS))
