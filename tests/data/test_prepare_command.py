"""`python -m hf_softpick.prepare`: exit codes, one message, a readable report, light until it works."""

import json
import subprocess
import sys

import pytest

from hf_softpick import prepare

RECIPE = """
model: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}}
tokenizer: {{train_bpe: 280}}
data:
  seq_len: 32
  validation: 0.1
  cache_dir: {cache}
  sources: [{{path: {path}}}]
training: {{per_device_train_batch_size: 2, max_steps: 1}}
run: {{name: test}}
"""


@pytest.fixture
def recipe(tmp_path):
    texts = [f"document {number} has some words" for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(cache=tmp_path / "cache", path=tmp_path / "a.jsonl"))
    return str(path)


def test_report(recipe, capsys):
    assert prepare.main([recipe, "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "51 read" in output and "1 empty" in output and "rows of 32" in output and "prepared" in output
    assert prepare.main([recipe, "--quiet"]) == 0
    assert "reused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.sources=[{path: nothing.jsonl}]", 3, "no such file"),
        ("data.seq_lem=5", 2, "seq_lem"),
        ("training.per_device_train_batch_size=100000", 3, "one optimizer step takes 100000"),
    ],
)
def test_mistake_is_one_message_and_a_code(recipe, capsys, override, code, message):
    assert prepare.main([recipe, override, "--quiet"]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not captured.out


def test_help_and_recipe_errors_import_nothing_heavy(recipe):
    code = (
        "import sys\nfrom hf_softpick import prepare\n"
        "try:\n    prepare.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    for arguments in (["--help"], [recipe, "data.seq_lem=5"], ["missing.yaml"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=60)
