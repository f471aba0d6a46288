"""kernels/softpick_attention as a kernel of the Hub: what its builder and its loader ask for, and what it does."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from kernels._rust import Build

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "kernels/softpick_attention"
SOURCES = FOLDER / "torch-ext/softpick_attention"
NAME = "softpick-attention"
REPOSITORY = "hf-softpick/softpick-attention"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A folder as the Hub's builder makes it of these sources, but for any device, so that a CPU loads it."""
    variant = tmp_path_factory.mktemp("hub") / "build/torch-universal"
    shutil.copytree(SOURCES, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": "_softpick_attention_cpu_test",
        "name": NAME,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return variant.parent.parent


def _pytest(*paths, **environment):
    """Tests in a process of their own: Triton's interpreter is chosen when the kernels are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *map(str, paths)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    environment.pop("PYTEST_ADDOPTS", None)
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout
    return int(re.search(r"(\d+) passed", found.stdout).group(1))


def test_local_build(build):
    """The models of transformers on it, and the folder's own tests."""
    cases = Path(__file__).parent / "hub_kernel_cases.py"
    assert _pytest(cases, FOLDER / "tests", LOCAL_KERNELS=f"{REPOSITORY}={build}") > 45


def test_the_folders_own_tests_on_the_sources():
    assert _pytest(FOLDER / "tests", LOCAL_KERNELS="") > 8


def test_description_of_the_build():
    description = Build.open(FOLDER)
    assert {str(backend) for backend in description.general.backends} == {"cuda", "rocm", "xpu"}
    text = (FOLDER / "build.toml").read_text()
    assert f'repo-id = "{REPOSITORY}"' in text and f'name = "{NAME}"' in text and "[torch-noarch]" in text
    assert NAME.replace("-", "_") == SOURCES.name, "the builder looks for the sources there"
    assert "flash" not in REPOSITORY, "transformers would take it for flash attention"


def test_card_shows_the_public_functions():
    """Rendered as the builder does: the names are read from __all__, which must therefore be a plain list."""
    tree = ast.parse((SOURCES / "__init__.py").read_text())
    (names,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    card = jinja2.Template((FOLDER / "CARD.md").read_text(), trim_blocks=True, undefined=jinja2.StrictUndefined)
    values = dict(repo_id=REPOSITORY, version=1, license="apache-2.0", layers=None, has_benchmark=True, upstream=None)
    text = card.render(functions=ast.literal_eval(names), source=None, **values)
    assert "- `softpick_attn_func`\n- `softpick_attn_varlen_func`\n" in text
    assert f'get_kernel("{REPOSITORY}", version=1' in text and "{" not in text.replace("{i", "").replace("_{", "")


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.name)
def test_sources_run_on_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Match)
        for annotation in filter(None, [getattr(node, "annotation", None), getattr(node, "returns", None)]):
            unions = [n for n in ast.walk(annotation) if isinstance(n, ast.BinOp)]
            assert not unions, f"{ast.unparse(annotation)} fails at import on Python 3.9"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            assert not any(keyword.arg == "strict" for keyword in node.keywords), "zip(strict=) came with 3.10"
