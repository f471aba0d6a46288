"""Nobody's code runs unasked: transformers asks on standard input where trust_remote_code is left out, and a `y` that
lies there (`yes | ...`, a script on standard input) is an answer."""

import ast
import json
import subprocess
import sys

from training_runs import REPOSITORY, environment, write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

AUTO_MAP = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": [None, "code.T"]}
# Runs every command line of its first argument in one process, and says how each ended.
COMMANDS = """
import json, runpy, sys
sys.path.insert(0, "eval")
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    except SystemExit as end:
        print("ended", name, end.code)
        print("ended", name, file=sys.stderr)
"""


def test_no_command_runs_the_code_of_a_repository(tmp_path):
    """With `y` on standard input; each says what to do instead."""
    evil, plain, marker = tmp_path / "evil", tmp_path / "plain", tmp_path / "marker"
    evil.mkdir()
    (evil / "code.py").write_text(f"open({str(marker)!r}, 'w')\nC = M = T = None\n")
    (evil / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": AUTO_MAP}))
    (evil / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": AUTO_MAP}))
    (evil / "tokenizer.json").write_text("{}")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes)).save_pretrained(plain)
    recipe = json.loads(write_recipe(tmp_path).read_text())
    for name, section in {
        "model": {"from": str(evil), "normalizer": "softpick"},
        "tokenizer": {"from": str(evil)},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe | {name: section}))
    calls = [
        ("hf_softpick.train", str(tmp_path / "model.yaml"), 2, "never run here; give a model"),
        ("hf_softpick.prepare", str(tmp_path / "tokenizer.yaml"), 3, "repository code is never run"),
        ("hf_softpick.convert", str(plain), str(tmp_path / "out"), "--tokenizer", str(evil), 4, "--tokenizer takes"),
        ("eval/activations.py", str(evil), 4, "give --trust-remote-code"),
        ("eval/compare.py", str(evil), str(plain), "--out", str(tmp_path / "report"), 0, "give --trust-remote-code"),
    ]
    command = [sys.executable, "-c", COMMANDS, json.dumps([arguments for *arguments, _, _ in calls])]
    streams = {"input": "y\n" * 100, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), timeout=200, **streams)
    assert not marker.exists()
    said = done.stderr.split("ended ")
    for (name, *_, code, words), before in zip(calls, said, strict=False):
        assert f"ended {name} {code}" in done.stdout, done.stderr
        assert words in before and "Traceback" not in before
    assert len(said) == len(calls) + 1


def test_every_loader_says_whether_it_trusts():
    """False, or what --trust-remote-code said: left out means that transformers asks."""
    asked = 0
    for path in [*REPOSITORY.glob("hf_softpick/**/*.py"), *REPOSITORY.glob("eval/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", None)
            if name in ("from_pretrained", "from_config"):
                trust = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("trust_remote_code")
                assert trust in ("False", "trust_remote_code"), f"{path}:{node.lineno}: {ast.unparse(node)}"
                asked += 1
    assert asked >= 9
