"""What a reader notices first: style, length of files, and nothing that names the machine it was written on."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_softpick.modeling.normalizers import NORMALIZERS

ROOT = Path(__file__).parent.parent
SKIP = {"runs", "wandb", "build", "dist", "__pycache__"}
LIMIT = 450
MACHINE = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|opt)/[a-z]|[A-Z]:\\\\Users")
EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b")


def _files(*endings):
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            f for f in folders if (f[0] != "." or f == ".ci") and f not in SKIP and not f.endswith(".egg-info")
        ]
        # `.git` is a file, and names a path, in a worktree.
        names = sorted(set(names) - {".git"})
        yield from (Path(folder, name) for name in names if not endings or Path(name).suffix in endings)


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]], ids=["check", "format"])
def test_ruff(command):
    found = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_files_do_one_job():
    """Long files do several; about 300 lines is the aim, this is the end."""
    long = {
        str(path.relative_to(ROOT)): n for path in _files(".py") if (n := len(path.read_text().splitlines())) > LIMIT
    }
    assert long == {}


def test_nothing_names_a_machine_or_a_person():
    found = []
    for path in _files(".py", ".md", ".txt", ".yaml", ".json", ".toml", ".cfg", ""):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE.search(line) or (EMAIL.search(line) and "example." not in line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_the_patterns_find_what_they_should():
    assert MACHINE.search("/".join(["", "home", "someone", "x"]))
    assert EMAIL.search("@".join(["someone", "host.org"]))
    assert not EMAIL.search("name@1.2") and not MACHINE.search("a/".join(["", "home/x"]))


def test_public_functions_have_docstrings():
    missing = []
    for path in _files(".py"):
        if path.is_relative_to(ROOT / "hf_softpick"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))]
            for node in nodes:
                name = getattr(node, "name", "")
                if not name.startswith("_") and not ast.get_docstring(node) and (name or path.stat().st_size):
                    missing.append(f"{path.relative_to(ROOT)}: {name or 'module'}")
    assert missing == []


def test_no_unsafe_loading():
    """Beyond what ruff sees: no pickle, no unrestricted torch.load, no YAML 1.1 reader in the package.

    One file reads a pickle, by an unpickler that admits only the classes in its list; tests/conversion attacks it.
    """
    for path in _files(".py"):
        if path.is_relative_to(ROOT / "hf_softpick"):
            text = path.read_text(encoding="utf-8")
            if path.relative_to(ROOT / "hf_softpick").as_posix() == "conversion/dcp.py":
                assert set(re.findall(r"\bpickle\.(\w+)", text)) == {"Unpickler"}
                text = text.replace("import pickle\n", "")
            assert not re.search(r"^\s*(?:import|from) (?:pickle|yaml)\b", text, re.M), path
            assert "weights_only=False" not in text, path
            assert not re.search(r"shell\s*=\s*True", text), path


NAMES = {*NORMALIZERS, "scaled", "scaled_"}
STRING_METHODS = {"startswith", "endswith", "removeprefix", "removesuffix", "partition", "split", "replace", "find"}
# The word is part of another name there: of a kernel on the Hub, and of an operator of torch.
NO_NORMALIZER = {"'softpick' in attention", "'softmax' in name"}


def _names(nodes):
    """Normalizers' names that stand there, alone or in a tuple, list or set."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield node.value
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            yield from _names(node.elts)


def _decisions(code):
    """Comparisons, string methods and cases of `match` with a normalizer's name."""
    for node in ast.walk(ast.parse(code)):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in STRING_METHODS:
            parts = node.args
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        if list(_names(parts)):
            yield ast.unparse(node)


def test_no_branch_on_the_name_of_a_normalizer():
    """Code reads its description, in hf_softpick/modeling/normalizers.py, which alone knows the names."""
    files = {*(ROOT / "hf_softpick").rglob("*.py"), *(ROOT / "eval").rglob("*.py")}
    files.remove(ROOT / "hf_softpick/modeling/normalizers.py")
    found = [(path.name, text) for path in sorted(files) for text in _decisions(path.read_text(encoding="utf-8"))]
    assert [pair for pair in found if pair[1] not in NO_NORMALIZER] == []
    assert {text for _, text in found} == NO_NORMALIZER


def test_branches_on_a_name_are_found():
    cases = "x == 'softpick'; 'softmax' != x; x in ('softpick', y); x not in {'softmax'}; x.startswith('scaled_'); "
    cases += "x.endswith(('a', 'softpick')); x.removeprefix('scaled_'); 'scaled' in x; match x:\n case 'softmax': pass"
    for case in cases.split("; "):
        assert list(_decisions(case)), case
    for case in ("f(x='softmax')", "x = 'softpick'", "{'softmax': 8}[x]", "x in (y['softpick'], 1)", "x == 'sdpa'"):
        assert not list(_decisions(case)), case
